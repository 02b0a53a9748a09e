"""What a run says while it lasts: metrics.jsonl, TensorBoard, W&B and progress."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pcagpt.errors import UserError

PLAIN_SECONDS = 10.0  # least time between two lines of one label in a log file

_open_bars: list["Progress"] = []  # of this process, the outermost first
_live: Any = None  # the one rich display that the open bars share on a terminal


def _json_number(value: Any) -> float | int | None:
    """A metric as JSON can hold it: NaN and infinities become None."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)  # also of a numpy or jax scalar
    return number if math.isfinite(number) else None


def _cut_metrics(path: Path, last_step: int) -> set[str]:
    """Cut later and torn lines off a metrics file; the splits seen at `last_step`."""
    kept, splits = [], set()
    if not path.exists():
        return splits
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
            step, split = entry["step"], entry["split"]
        except (ValueError, KeyError, TypeError):
            continue  # it was being written when the run was killed
        if step <= last_step:
            kept.append(line + "\n")
        if step == last_step:
            splits.add(split)
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept), "utf-8")
    os.replace(replacement, path)
    return splits


def import_wandb() -> ModuleType:
    """The optional package; raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "W&B logging was asked for, but the package wandb is not installed: "
            "pip install 'pcagpt[wandb]', or --config.telemetry.wandb=False"
        ) from None
    return wandb


def _start_wandb(
    run_dir: Path, config: Mapping[str, Any], name: str, project: str, resume: bool
) -> Any:
    """A W&B run, the same again when a training is resumed; WANDB_MODE is honoured."""
    wandb = import_wandb()
    run_dir.mkdir(parents=True, exist_ok=True)
    id_file = run_dir / "wandb_id"
    known = resume and id_file.exists()
    run_id = id_file.read_text("utf-8").strip() if known else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=dict(config),
            # Its copy of the console would garble the bar.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"W&B did not start: {reason}; log in with `wandb login`, set "
            "WANDB_MODE=offline, or switch W&B off"
        ) from None
    id_file.write_text(run_id + "\n", "utf-8")
    # W&B drops what goes back behind its own step counter, as a resumed run does: so
    # our step is a metric, and the axis of all others.
    run.define_metric("*", step_metric="step")
    return run


class Telemetry:
    """The record of one run, in its folder; a context manager.

    Args:
      run_dir: the run's folder, made if missing.
      config: the run's resolved config (nested mappings), for W&B.
      run_name: its name in W&B.
      resume_step: updates done by the checkpoint that is continued; None begins anew
        and empties metrics.jsonl. What was logged after that step is dropped: there is
        one line per (step, split).
      tensorboard: write TensorBoard event files.
      wandb: log to Weights & Biases as well.
      wandb_project: the project there.

    Raises:
      UserError: W&B was asked for and cannot start; nothing has been logged then.
    """

    _path = _lines = _board = _wandb = None  # as they stay in a silent one

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        config: Mapping[str, Any],
        run_name: str,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: bool = False,
        wandb_project: str = "pcagpt",
    ):
        run_dir, resume = Path(run_dir), resume_step is not None
        if wandb:  # first, because it is the one that can fail
            self._wandb = _start_wandb(run_dir, config, run_name, wandb_project, resume)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"  # made by the first line
        self._resume_step = resume_step
        # Splits that were measured at the checkpoint before the run was stopped.
        self._seen = _cut_metrics(
            self._path, -1 if resume_step is None else resume_step
        )
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir),
                purge_step=resume_step + 1 if resume else 0,
                # Its own file names repeat within a second: the later would win.
                filename_suffix=f".{time.time_ns()}",
            )

    @classmethod
    def silent(cls) -> "Telemetry":
        """One that records nothing: for every process but the first."""
        return object.__new__(cls)

    def log(
        self, step: int, tokens: int, split: str, metrics: Mapping[str, Any]
    ) -> None:
        """Record scalars (None: not measured) as of `step` updates, `tokens` tokens."""
        if self._path is None or (step == self._resume_step and split in self._seen):
            return
        if self._lines is None:
            self._lines = self._path.open("a", encoding="utf-8", buffering=1)
        counts = {"step": int(step), "tokens": int(tokens)}
        values = {name: _json_number(value) for name, value in metrics.items()}
        line = json.dumps({**counts, "split": split, **values}, allow_nan=False)
        self._lines.write(line + "\n")
        scalars = {
            f"{split}/{k}": float(v) for k, v in metrics.items() if v is not None
        }
        if self._board:
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)
        if self._wandb:
            self._wandb.log(counts | scalars)

    def text(self, tag: str, markdown: str) -> None:
        """A page of markdown for TensorBoard (W&B has the config itself)."""
        if self._board:
            self._board.add_text(tag, markdown)

    def figure(self, tag: str, figure: Any) -> None:
        """A matplotlib Figure as an image; pyplot is not needed for it."""
        if not (self._board or self._wandb):
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        if self._board:
            self._board.add_image(tag, pixels, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({tag: wandb.Image(pixels)})

    def hyperparameters(
        self, flat_dict: Mapping[str, Any], final_metrics: Mapping[str, Any]
    ) -> None:
        """The run's row in TensorBoard's HPARAMS table; metrics become final/name."""
        numbers = {f"final/{k}": _json_number(v) for k, v in final_metrics.items()}
        metrics = {tag: value for tag, value in numbers.items() if value is not None}
        if self._board:
            from tensorboardX.summary import hparams

            settings = {
                name: value if isinstance(value, (int, float, str)) else str(value)
                for name, value in flat_dict.items()
                if value is not None
            }
            # SummaryWriter.add_hparams would make a second run in a folder below.
            for summary in hparams(settings, metrics):
                self._board.file_writer.add_summary(summary)
            for tag, value in metrics.items():
                self._board.add_scalar(tag, value)
        if self._wandb:
            self._wandb.summary.update(metrics)

    def close(self, exit_code: int = 0) -> None:
        """Write out what is pending; W&B marks the run failed unless the code is 0."""
        if self._lines:
            self._lines.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)
        self._path = self._lines = self._board = self._wandb = None

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def _clock(seconds: float | None) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03; unknown as -:--."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _live_display() -> Any:
    """A rich display whose bars take the width that the text leaves."""
    from rich import console, progress
    from rich.table import Column

    def text(template: str) -> progress.TextColumn:
        column = Column(no_wrap=True)
        return progress.TextColumn(template, table_column=column, markup=False)

    bar = progress.BarColumn(None, table_column=Column(ratio=1, max_width=40))
    return progress.Progress(
        text("{task.description}"),
        bar,
        text("{task.fields[status]}"),
        console=console.Console(stderr=True),
        refresh_per_second=4,
    )


class Progress:
    """How far a counted piece of work is, on stderr; a context manager.

    A terminal gets a live bar; a log file gets a line at once, then one at most every
    PLAIN_SECONDS, and one at the end. Bars may follow each other or nest: an inner one
    vanishes when it is done, and stays out of a log unless it lasts.

    Args:
      label: what is being done, e.g. 'D gpt_baseline'.
      total: steps when it is done.
      start: steps done before, by the run that is resumed.
    """

    def __init__(self, label: str, total: int, start: int = 0):
        self.label, self.total, self.step = label, total, start
        self._readings: list[str] = []
        self._first: tuple[float, int] | None = None  # time and step of update 1
        self._task = self._printed = None

    def __enter__(self) -> "Progress":
        global _live
        self._began = time.monotonic()
        self._last_line = self._began if _open_bars else -math.inf
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if terminal and _live is None:
            _live = _live_display()
            _live.start()
        if _live is not None:
            self._task = _live.add_task(
                self.label, total=self.total, completed=self.step, status=self._status()
            )
        _open_bars.append(self)
        return self

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Show that `step` steps are done, with the loss in nats per token."""
        now = time.monotonic()
        self.step = step
        self._first = self._first or (now, step)
        self._readings = [] if loss is None else [f"loss {float(loss):.3f}"]
        if tokens_per_second is not None:
            self._readings.append(f"{float(tokens_per_second):,.0f} tok/s")
        if self._task is not None:
            _live.update(self._task, completed=step, status=self._status())
        elif now - self._last_line >= PLAIN_SECONDS:
            self._print_line()

    def _status(self) -> str:
        """Steps, readings, time since the start and time left, in 60 columns."""
        now, left = time.monotonic(), None
        if self.step >= self.total:
            left = 0.0
        elif self._first and self.step > self._first[1]:
            # Counted from the first update on, because compilation lies before it.
            since, first_step = self._first
            left = (now - since) / (self.step - first_step) * (self.total - self.step)
        share = self.step / self.total if self.total else 1.0
        steps = f"{self.step:,}/{self.total:,} {share:4.0%}"
        times = f"{_clock(now - self._began)}, {_clock(left)} left"
        return "  ".join([steps, *self._readings, times])

    def _print_line(self) -> None:
        """One line for a log file."""
        print(f"{self.label}  {self._status()}", file=sys.stderr, flush=True)
        self._last_line, self._printed = time.monotonic(), self.step

    def __exit__(self, *_: object) -> None:
        global _live
        _open_bars.remove(self)
        if self._task is None:
            if self._printed not in (None, self.step):
                self._print_line()
        elif _open_bars:
            _live.remove_task(self._task)
        else:
            _live.stop()
            _live = None


class SilentProgress(Progress):
    """One that shows nothing: for every process but the first."""

    def __init__(self):
        super().__init__("", 0)

    def __enter__(self) -> "SilentProgress":
        return self

    def update(self, *_: object, **__: object) -> None:
        """Shows nothing."""

    def __exit__(self, *_: object) -> None:
        pass
