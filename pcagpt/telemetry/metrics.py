"""The metrics of a run: metrics.jsonl, and the boards that show them."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from pcagpt.errors import UserError, naming
from pcagpt.files import keep_copy, open_file, write_text
from pcagpt.json_files import check_fields, parse_json, strict
from pcagpt.telemetry.boards import Boards, Wanted
from pcagpt.telemetry.tensorboard_files import VAL_LOSS

_LOGGER = logging.getLogger(__name__)
_NUMBER = (int, float, None)
# {field of a line in metrics.jsonl: its types}; all others are numbers, too.
_ENTRY = {"step": (int,), "tokens": (int,), "split": (str,), "loss": _NUMBER}
_TAGS = {("val", "loss"): VAL_LOSS}
_UNSHOWN = ("tokens_predicted",)  # The same at each step, it would be a flat curve.


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; none if it does not exist.

    Other lines are left out with one warning. The last line may be torn, because a
    killed run can leave the first half of a line.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries, the numbers of the lines that are left out)."""
    entries, bad, lines = [], [], []
    if path.exists():
        with open_file(path) as file:
            lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            fields = dict.fromkeys(entry, _NUMBER) if isinstance(entry, dict) else {}
            check_fields(entry, fields | _ENTRY, f"line {number}", "leave it out")
            entries.append(entry)
        except (ValueError, UserError):
            is_torn = number == len(lines) and line.startswith(b"{")
            if line.strip() and not is_torn:
                bad.append(str(number))
    if bad:
        _LOGGER.warning("%s: damaged lines are left out: %s", path, ", ".join(bad))
    return entries, bad


class Telemetry(Boards):
    """Records one run in its folder, and shows it; a context manager.

    The methods do nothing on other processes than the first.
    """

    _path = None  # stays None except on the first process

    def __init__(
        self,
        run_dir: Path,
        wanted: Wanted,
        *,
        check_lock: Callable[[], None],
        resume_step: int | None = None,
        **of_boards: Any,
    ):
        """Opens metrics.jsonl and the boards.

        With a `resume_step`, it removes later lines of metrics.jsonl and does not write
        existing lines again, so that each (step, split) has one line. With None, it
        starts a new metrics.jsonl.

        Args:
          run_dir: the run's folder.
          wanted: which boards.
          check_lock: called before each line; raises UserError if the folder belongs to
            another command now.
          resume_step: the step of the state that the run goes on from; None: it is new.
          **of_boards: `workdir`, `command` and `config`, as in `Boards`.

        Raises:
          UserError: W&B cannot start. metrics.jsonl is then unchanged.
        """
        last_step = -1 if resume_step is None else resume_step
        first_step = last_step + 1
        super().__init__(
            run_dir, wanted, job="train", first_step=first_step, **of_boards
        )
        if jax.process_index() > 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        entries, others = _read(self._path)
        if others:  # A person may have written them.
            keep_copy(self._path)
        kept = {
            (entry["step"], entry["split"]): json.dumps(entry) + "\n"
            for entry in entries
            if entry["step"] <= last_step
        }
        if self._path.exists():
            write_text(self._path, "".join(kept.values()))
        self._logged, self._check_lock = set(kept), check_lock

    def log(
        self, step: int, tokens: int, split: str, metrics: Mapping[str, Any]
    ) -> None:
        """Records scalars after `step` updates on `tokens` training tokens.

        None means that a metric was not measured. NaN and infinities become null in
        metrics.jsonl. The boards have them as SPLIT/NAME, but the validation loss as
        VAL_LOSS. Raises UserError as `check_lock` does.
        """
        if self._path is None or (step, split) in self._logged:
            return
        self._check_lock()
        counts = {"step": int(step), "tokens": int(tokens)}
        line = json.dumps(strict({**counts, "split": split, **metrics}))
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        scalars = {
            _TAGS.get((split, name), f"{split}/{name}"): float(value)
            for name, value in metrics.items()
            if value is not None and name not in _UNSHOWN
        }
        if self._board:
            self._board.scalars(scalars, step)
        if self._wandb:
            self._wandb.scalars(counts | scalars)
