"""What TensorBoard and W&B show of all runs of a workdir together.

It is in the folder WORKDIR/experiment, which is a run there: the columns of HPARAMS,
the command, and the results of an experiment.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pcagpt.config import Settings
from pcagpt.errors import UserError
from pcagpt.json_files import is_sealed, read_json
from pcagpt.pipeline.job import Job
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.report import means_over_seeds, size_figure, summary_table
from pcagpt.run.folder import read_record
from pcagpt.run.hyperparameters import columns
from pcagpt.telemetry.boards import Boards

FOLDER = "experiment"


def show_plan(settings: Settings, to_do: Iterable[Job], command: str) -> None:
    """Shows the columns of HPARAMS and the command, before the first run begins.

    Also the results of the workdir's last experiment. W&B shows all of this beside the
    runs.
    """
    if runs := [job for job in to_do if isinstance(job, TrainJob)]:
        in_files = settings.replace({"telemetry.wandb": False})
        show_results(in_files, command, results_in(Path(settings.workdir)), runs)


def show_results(
    settings: Settings,
    command: str,
    results: dict[str, Any],
    to_do: Iterable[TrainJob] = (),
) -> None:
    """Shows the columns, the command, and an experiment: a figure and a table.

    The columns are of the workdir's runs, and of those that are `to_do`.
    """
    workdir = Path(settings.workdir)
    with Boards.of_command(settings, workdir / FOLDER, FOLDER, command) as boards:
        if boards.is_shown:  # The first process, which may read the other runs.
            # A run that is trained anew moves the one in its folder aside: both show.
            planned = [job.settings.to_dict() for job in to_do]
            boards.columns(columns([*_records(workdir), *planned]))
        if results:
            models = means_over_seeds(results["rows"], results["comparisons"])
            # A sweep's figure of loss and size has the same name.
            boards.figure("pareto", size_figure(models))
            boards.table("table", *summary_table(models))


def results_in(workdir: Path) -> dict[str, Any]:
    """The content of results.json; {} if it is missing or a person changed it."""
    path = workdir / "results.json"
    return read_json(path, "") if path.is_file() and is_sealed(path) else {}


def _records(workdir: Path) -> Iterator[dict[str, Any]]:
    """The records of the workdir's runs."""
    for path in sorted(workdir.glob("*/config.json")):
        with contextlib.suppress(UserError, OSError):  # It may be anything.
            record = read_record(path.parent) or {}
            if {"arm", "model", "train"} <= record.keys():
                yield record
