"""What TensorBoard and W&B show of a folder."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax

from pcagpt.errors import UserError, explain, warn_once
from pcagpt.telemetry.tensorboard_files import TensorBoard, write_projector
from pcagpt.telemetry.wandb_run import WandbRun, import_wandb


class Wanted(Protocol):
    """The knobs of `telemetry` that decide where things are shown."""

    tensorboard: bool
    wandb: bool
    wandb_project: str


class Figure(Protocol):
    """A figure of `pcagpt.report`."""

    def png(self) -> bytes:
        """The figure as a PNG file."""


class Boards:
    """Shows what a folder holds in TensorBoard, and in W&B; a context manager.

    The methods do nothing on other processes than the first.
    """

    _board: TensorBoard | None = None  # Both stay None on other processes.
    _wandb: WandbRun | None = None

    def __init__(
        self,
        folder: Path,
        wanted: Wanted,
        *,
        workdir: Path,
        job: str,
        command: str = "",
        config: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ):
        """Opens the boards and adds the command to their texts.

        If W&B cannot start, training is refused. Other jobs may have worked for long
        already: a line says so, and TensorBoard alone shows them.

        Args:
          folder: a run in TensorBoard and in W&B.
          wanted: which boards.
          workdir: all its folders are one group in W&B.
          job: the type of the run in W&B. The next command continues that run, unless
            it is 'train' and `first_step` is 0.
          command: what the person has called; '': nothing to show.
          config: for W&B.
          first_step: earlier commands showed what comes before this step. What they
            showed of later ones is dropped.

        Raises:
          UserError: W&B is not installed, or it cannot start for `job` 'train'. Nothing
            was shown yet, and no file was written.
        """
        project = wanted.wandb_project
        self._folder = folder
        if jax.process_index() > 0:
            return
        if wanted.wandb:  # First, because it can fail.
            import_wandb()
            try:
                self._wandb = WandbRun(
                    folder,
                    workdir=workdir,
                    project=project,
                    job=job,
                    config=config or {},
                    continues=job != "train" or first_step > 0,
                )
            except (UserError, OSError) as error:
                if job == "train":
                    raise
                warn_once(explain(error) or str(error))
        try:
            if wanted.tensorboard:
                self._board = TensorBoard(folder, first_step)
            if command:
                self.text("command", command, first_step)
        except BaseException as error:
            with contextlib.suppress(OSError):  # The first error says more.
                self.__exit__(type(error))
            raise

    @classmethod
    def of_command(cls, settings: Any, folder: Path, job: str, command: str) -> Self:
        """The boards of what a command makes; `settings` are a `config.Settings`."""
        return cls(
            folder,
            settings.telemetry,
            workdir=Path(settings.workdir),
            job=job,
            command=command,
            config=settings.to_dict(),
        )

    @property
    def is_shown(self) -> bool:
        """Whether there is a board."""
        return bool(self._board or self._wandb)

    def text(self, tag: str, text: str, step: int) -> None:
        """Shows plain text of this step."""
        for board in self._boards():
            board.text(tag, text, step)

    def table(self, tag: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        """Shows a table."""
        rows = list(rows)
        for board in self._boards():
            board.table(tag, columns, rows)

    def figure(self, tag: str, figure: Figure | None) -> None:
        """Shows a figure as a picture, if there is one."""
        if figure and self.is_shown:
            picture = figure.png()
            for board in self._boards():
                board.picture(tag, picture)

    def begin(
        self,
        knobs: Mapping[str, Any],
        chosen: Mapping[str, Any],
        sizes: Mapping[str, Any],
    ) -> None:
        """Shows a run's knobs as a table, and its row in HPARAMS, if it is new there.

        The row has the `chosen` knobs and the sizes. W&B has the knobs already, as its
        config.
        """
        if self._board and self._board.is_new:
            self._board.charts()
            # TensorBoard opens the first two texts in the alphabet: command and sample.
            self._board.table("settings", ["knob", "value"], knobs.items())
            self._board.session({**chosen, **sizes})
        if self._wandb:
            self._wandb.session(sizes)

    def columns(self, examples: Mapping[str, Any]) -> None:
        """Names the columns of HPARAMS, with a value of each; W&B has a menu."""
        if self._board:
            self._board.columns(examples)

    def end(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Shows that a run is done after `step` updates, with its final numbers.

        TensorBoard has them already, at the ends of the curves. W&B gets them as
        `final/NAME`.
        """
        if self._board:
            # A run that ends again, because it was killed now, drops this step.
            self._board.end_session(step + 1)
        if self._wandb:
            finite = {
                f"final/{name}": float(value)
                for name, value in numbers.items()
                if value is not None and math.isfinite(value)
            }
            self._wandb.end(finite)

    @property
    def has_projector(self) -> bool:
        """Whether `projector` shows anything."""
        return bool(self._board)

    def projector(self, *arguments: Any) -> None:
        """As `write_projector` of the folder, for TensorBoard alone."""
        if self._board:
            write_projector(self._folder, *arguments)

    def flush(self) -> None:
        """Returns when TensorBoard's files have everything."""
        if self._board:
            self._board.flush()

    def _boards(self) -> list[TensorBoard | WandbRun]:
        return [board for board in (self._board, self._wandb) if board]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if self._board:
                self._board.close()
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            if self._wandb:
                self._wandb.close(has_failed=kind is not None)
