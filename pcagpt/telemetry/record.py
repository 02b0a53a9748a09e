"""The metrics of a run: metrics.jsonl, TensorBoard and W&B."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from pcagpt.errors import UserError
from pcagpt.files import strict, write_text


def _cut_metrics(path: Path, last_step: int) -> set[tuple[int, str]]:
    """Removes torn lines and lines after a step; returns each (step, split) left."""
    kept = {}
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= last_step:
                    kept[entry["step"], entry["split"]] = line + "\n"
            except (ValueError, KeyError, TypeError):
                continue  # The run was killed while it wrote this line.
        write_text(path, "".join(kept.values()))
    return set(kept)


def import_wandb() -> ModuleType:
    """The optional package wandb.

    Raises:
      UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "W&B logging was asked for, but the package wandb is not installed: "
            "pip install 'pcagpt[wandb]', or --config.telemetry.wandb=False"
        ) from None
    return wandb


def _start_wandb(
    run_dir: Path, config: Mapping[str, Any] | None, project: str, resume: bool
) -> Any:
    """Starts a W&B run, or continues the one that the folder names."""
    wandb = import_wandb()
    run_dir.mkdir(parents=True, exist_ok=True)
    id_file = run_dir / "wandb_id"
    known = resume and id_file.exists()
    try:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text("utf-8").strip() if known else None,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=config,
            # Its copy of the console would break the progress bar.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"W&B did not start: {reason}; log in with `wandb login`, set "
            "WANDB_MODE=offline, or switch it off with --config.telemetry.wandb=False"
        ) from None
    write_text(id_file, run.id + "\n")
    # W&B ignores entries behind its own step counter, and a resumed run writes such
    # entries. So our step is a metric and the x-axis of all others.
    run.define_metric("*", step_metric="step")
    return run


class Telemetry:
    """Records one run in its folder; a context manager.

    On all processes but the first, every method does nothing.

    Args:
      run_dir: the run's folder; made if it does not exist.
      config: the resolved config (nested mappings), for W&B.
      resume_step: step of the checkpoint that the run continues from; None starts
        metrics.jsonl anew. Lines after that step are removed, and a line that is
        already there is not written again: there is one line per (step, split).
      tensorboard: whether to write TensorBoard event files.
      wandb: whether to log to Weights & Biases.
      wandb_project: the project there.

    Raises:
      UserError: W&B cannot start; nothing has been written to metrics.jsonl then.
    """

    _path = _board = _wandb = None  # stay None on all processes but the first

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
        if wandb:  # first, because it can fail
            self._wandb = _start_wandb(run_dir, config, wandb_project, resume)
        run_dir.mkdir(parents=True, exist_ok=True)
        last_step = resume_step if resume else -1
        self._path = run_dir / "metrics.jsonl"
        self._logged = _cut_metrics(self._path, last_step)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir),
                purge_step=last_step + 1,
                # Two writers within a second would otherwise share one file name.
                filename_suffix=f".{time.time_ns()}",
            )

    def log(
        self, step: int, tokens: int, split: str, metrics: Mapping[str, Any]
    ) -> None:
        """Records scalars after `step` updates, which took `tokens` tokens.

        A metric is None if it was not measured. NaN and infinities become null in
        metrics.jsonl.
        """
        if self._path is None or (step, split) in self._logged:
            return
        counts = {"step": int(step), "tokens": int(tokens)}
        line = json.dumps(strict({**counts, "split": split, **metrics}))
        with self._path.open("a", encoding="utf-8") as file:
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
        """Adds a matplotlib Figure as an image."""
        if self._board:
            self._board.add_figure(tag, figure)
        if self._wandb:
            self._wandb.log({tag: import_wandb().Image(figure)})

    def hyperparameters(
        self, flat_dict: Mapping[str, Any], final_metrics: Mapping[str, Any]
    ) -> None:
        """Adds the run to TensorBoard's HPARAMS table, each metric as `final/name`."""
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
            # It opens a second file, and TensorBoard never goes back to the first one.
            self._board.flush()
            # The folder "." is the run's own; a name would make a second run.
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
