"""What TensorBoard and W&B show of all runs of a workdir together.

It is in the folder WORKDIR/experiment, which is a run there: the columns of HPARAMS,
the command, and the results of an experiment.
"""

import contextlib
from pathlib import Path
from typing import Any

from pcagpt.errors import UserError
from pcagpt.files import is_sealed, read_json
from pcagpt.pipeline.plan import Plan
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.report import means_over_seeds, size_figure, summary_table
from pcagpt.run.folder import read_record
from pcagpt.run.hyperparameters import columns
from pcagpt.telemetry.boards import Boards

FOLDER = "experiment"


def show_plan(plan: Plan, command: str) -> None:
    """Shows the columns of HPARAMS and the command, before the first run begins.

    Also the results of the workdir's last experiment. W&B shows all of this beside the
    runs.
    """
    if any(isinstance(job, TrainJob) for job in plan.jobs):
        in_files = plan.settings.replace({"telemetry.wandb": False})
        known = results_in(Path(plan.settings.workdir))
        show_results(plan._replace(settings=in_files), command, known)


def show_results(plan: Plan, command: str, results: dict[str, Any]) -> None:
    """Shows the columns, the command, and an experiment: a figure and a table."""
    folder = Path(plan.settings.workdir) / FOLDER
    with Boards.of_command(plan.settings, folder, FOLDER, command) as boards:
        if boards.is_shown:  # The first process, which may read the other runs.
            boards.columns(columns(_records(plan)))
        if results:
            models = means_over_seeds(results["rows"], results["comparisons"])
            # A sweep's figure of loss and size has the same name.
            boards.figure("pareto", size_figure(models))
            boards.table("table", *summary_table(models))


def results_in(workdir: Path) -> dict[str, Any]:
    """The content of results.json; {} if it is missing or a person changed it."""
    path = workdir / "results.json"
    return read_json(path, "") if path.is_file() and is_sealed(path) else {}


def _records(plan: Plan) -> list[dict[str, Any]]:
    """The records of the workdir's runs, and of those that the plan makes there."""
    found = {}
    for path in sorted(Path(plan.settings.workdir).glob("*/config.json")):
        with contextlib.suppress(UserError, OSError):  # It may be anything.
            record = read_record(path.parent) or {}
            if {"arm", "model", "train"} <= record.keys():
                found[path.parent] = record
    for job in plan.jobs:
        if isinstance(job, TrainJob):
            found.setdefault(job.folder, job.settings.to_dict())
    return list(found.values())
