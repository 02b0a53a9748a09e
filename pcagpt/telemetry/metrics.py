"""The metrics of a run: metrics.jsonl, TensorBoard and W&B."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from pcagpt.errors import UserError, naming
from pcagpt.files import check_fields, open_file, parse_json, strict, write_text

_LOGGER = logging.getLogger(__name__)
# {field of a line in metrics.jsonl: its types}
_ENTRY = {
    "step": (int,),
    "tokens": (int,),
    "split": (str,),
    "loss": (int, float, None),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; none if it does not exist.

    Other lines are left out with one warning. The last line may be torn, because a
    killed run can leave the first half of a line.
    """
    entries, bad, lines = [], [], []
    if path.exists():
        with open_file(path) as file:
            lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            check_fields(entry, _ENTRY, f"line {number}", "leave it out")
            entries.append(entry)
        except (ValueError, UserError):
            is_torn = number == len(lines) and line.startswith(b"{")
            if line.strip() and not is_torn:
                bad.append(str(number))
    if bad:
        _LOGGER.warning("%s: damaged lines are left out: %s", path, ", ".join(bad))
    return entries


def import_wandb() -> ModuleType:
    """Imports the optional package wandb; UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "telemetry.wandb needs the package wandb, which is not installed: "
            "pip install 'pcagpt[wandb]', or --config.telemetry.wandb=False"
        ) from None
    return wandb


def _start_wandb(
    run_dir: Path, config: Mapping[str, Any] | None, project: str, resume: bool
) -> Any:
    """Starts a W&B run, or continues the run of the folder's wandb_id."""
    wandb = import_wandb()
    run_dir.mkdir(parents=True, exist_ok=True)
    id_file = run_dir / "wandb_id"
    known = resume and id_file.is_file()
    try:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text("utf-8").strip() if known else None,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=config,
            # W&B's capture of the console would break the progress bar.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"W&B did not start: {reason}; log in with `wandb login`, set "
            "WANDB_MODE=offline, or switch it off with --config.telemetry.wandb=False"
        ) from None
    write_text(id_file, run.id + "\n")
    # W&B ignores entries with a step below its own counter, but a resumed run writes
    # such entries. So our step is a metric, and it is the x-axis of all other metrics.
    run.define_metric("*", step_metric="step")
    return run


class Telemetry:
    """Records one run in its folder; a context manager.

    The methods do nothing on other processes than the first. `config` is for W&B.

    With a `resume_step`, it removes later lines of metrics.jsonl and does not write
    existing lines again, so that each (step, split) has one line. With None, it starts
    a new metrics.jsonl. Raises UserError if W&B cannot start; metrics.jsonl is then
    unchanged.
    """

    _path = _board = _wandb = None  # stay None except on the first process

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: bool = False,
        wandb_project: str = "pcagpt",
    ):
        if jax.process_index() > 0:
            return
        run_dir, resume = Path(run_dir), resume_step is not None
        if wandb:  # first, because it can fail and must leave metrics.jsonl unchanged
            self._wandb = _start_wandb(run_dir, config, wandb_project, resume)
        run_dir.mkdir(parents=True, exist_ok=True)
        last_step = resume_step if resume else -1
        self._path = run_dir / "metrics.jsonl"
        kept = {
            (entry["step"], entry["split"]): json.dumps(entry) + "\n"
            for entry in read_metrics(self._path)
            if entry["step"] <= last_step
        }
        if self._path.exists():
            write_text(self._path, "".join(kept.values()))
        self._logged = set(kept)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir),
                purge_step=last_step + 1,
                # Without this, two writers in one second would have the same file name.
                filename_suffix=f".{time.time_ns()}",
            )

    def log(
        self, step: int, tokens: int, split: str, metrics: Mapping[str, Any]
    ) -> None:
        """Records scalars after `step` updates on `tokens` training tokens.

        None means that a metric was not measured. NaN and infinities become null in
        metrics.jsonl.
        """
        if self._path is None or (step, split) in self._logged:
            return
        counts = {"step": int(step), "tokens": int(tokens)}
        line = json.dumps(strict({**counts, "split": split, **metrics}))
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        scalars = {
            f"{split}/{name}": float(value)
            for name, value in metrics.items()
            if value is not None
        }
        if self._board:
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)
        if self._wandb:
            self._wandb.log(counts | scalars)

    def text(self, tag: str, markdown: str) -> None:
        """Adds a page of Markdown to TensorBoard."""
        if self._board:
            self._board.add_text(tag, markdown)

    def figure(self, tag: str, figure: Any) -> None:
        """Adds a figure of `pcagpt.report` as an image to TensorBoard."""
        if self._board:
            from tensorboardX.proto.summary_pb2 import Summary

            picture = figure.png()
            width, height = (
                int.from_bytes(picture[n : n + 4], "big") for n in (16, 20)
            )
            image = Summary.Image(
                width=width, height=height, colorspace=4, encoded_image_string=picture
            )
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            self._board.file_writer.add_summary(summary)

    def hyperparameters(
        self, flat_dict: Mapping[str, Any], final_metrics: Mapping[str, Any]
    ) -> None:
        """Adds the run to TensorBoard's HPARAMS table, with metrics `final/NAME`."""
        metrics = {
            f"final/{name}": float(value)
            for name, value in final_metrics.items()
            if value is not None and math.isfinite(value)
        }
        if self._board:
            settings = {
                name: value if isinstance(value, (int, float, str)) else str(value)
                for name, value in flat_dict.items()
            }
            # add_hparams opens a second file, and TensorBoard then ignores the first.
            self._board.flush()
            # "." is the run's own folder; another name would show up as a second run.
            self._board.add_hparams(settings, metrics, name=".")
        if self._wandb:
            self._wandb.summary.update(metrics)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)
