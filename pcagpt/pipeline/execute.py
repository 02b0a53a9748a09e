"""Executes a plan: checks everything, does the missing jobs, writes the report."""

import operator
import os
import shlex
from pathlib import Path

import jax

from pcagpt import factorize
from pcagpt.arms import ARMS
from pcagpt.compress.sweep import add_recovered, folder_of
from pcagpt.config import KNOBS, Settings, override
from pcagpt.data.corpus import describe_corpus
from pcagpt.errors import UserError
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.plan import Job, Plan, recovery_plan
from pcagpt.pipeline.train_job import DONE, TrainJob
from pcagpt.report import collect_results, recovered_rows, write_report
from pcagpt.run import checkpoint
from pcagpt.run.folder import read_record
from pcagpt.telemetry.record import import_wandb

# The `model` knobs that D and an arm must share, by what the arm takes from D.
SHARED_WITH_BASELINE = {
    "factors": ("n_embd",),
    "blocks": ("n_embd", "n_layer", "n_head", "block_size", "bias"),
    "weights": (),
}


def describe(plan: Plan) -> list[str]:
    """A line for each job: name, amount and status; UserError as for `Job.status`."""
    return [
        f"{job.label:<32} {job.amount:>14}  {status}"
        for job, status in _needed(plan).items()
    ]


def check(plan: Plan, settings: Settings) -> None:
    """Checks what can be checked at once; writes nothing.

    Raises:
      UserError: the workdir is not writable, W&B is not installed, a run with other
        settings is there, a prerequisite is missing and `build_prerequisites` is off,
        or there is no such corpus or method.
    """
    _check_workdir(settings.workdir)
    if settings.telemetry.wandb:
        import_wandb()
    if settings.factorize.method not in factorize.METHODS:
        raise UserError(
            f"factorize.method is '{settings.factorize.method}': it must be one of "
            f"{', '.join(factorize.METHODS)}"
        )
    needed = _needed(plan)
    to_do = [job for job, status in needed.items() if status != DONE]
    for job in to_do:
        if not job.is_target and not settings.build_prerequisites:
            raise _missing(job)
    if any(isinstance(job, TrainJob) for job in to_do):
        corpus = describe_corpus(settings.data.source, settings.data.tokenizer)
        for job in to_do:
            job.check_vocabulary(corpus.vocab_size)
    for job, status in needed.items():
        if isinstance(job, TrainJob) and not job.is_target and status == DONE:
            _check_baseline(job.folder, settings)


def execute(plan: Plan, settings: Settings, command: str) -> None:
    """Does the missing jobs in order, and writes the report of an experiment.

    `settings` are what the plan was made from. The report shows the `command`.

    Raises:
      UserError: as for `check`, or something does not fit the corpus or the devices.
        Then only the token files of the corpus have been written.
    """
    check(plan, settings)
    _say(*describe(plan))
    needed, checked = _needed(plan), {}
    for job, status in needed.items():
        if status != DONE or job.sources & checked.keys():
            checked[job.folder] = job.check(set(checked))
    for job in needed:
        # New runs are compared with finished ones: both must have the same tokens.
        if checked and isinstance(job, TrainJob) and job.folder not in checked:
            job.check_corpus()
    for job in needed:
        if job.folder in checked:
            # Dropped after its run: a teacher's weights take memory.
            job.run(checked.pop(job.folder))
    if plan.reported and jax.process_index() == 0:
        workdir = Path(settings.workdir)
        results = collect_results(workdir, plan.reported, command)
        write_report(workdir, results)
        _say(f"report: {workdir / 'report.html'}")


def recover(settings: Settings) -> None:
    """Trains the best models of a sweep and D further; adds them to its report."""
    folder = folder_of(settings)
    plan = recovery_plan(settings, folder)
    execute(plan, plan.jobs[0].settings, command="")
    if jax.process_index() == 0:
        runs = [job.folder.name for job in plan.jobs]
        baseline = checkpoint.find(settings.model_path)[0]
        rows = recovered_rows(folder, runs, baseline)
        _say(f"report: {add_recovered(folder, rows)}")


def _needed(plan: Plan) -> dict[Job, str]:
    """The jobs of the plan with their status, without prerequisites of a finished run.

    They stay if the factorization on disk differs from the one that is asked for.
    """
    jobs, target = plan.jobs, plan.jobs[-1]
    is_done = not plan.reported and target.status() == DONE
    if is_done and not any(
        isinstance(job, FactorizeJob) and job.differing() for job in jobs
    ):
        jobs = tuple(job for job in jobs if job.is_target)
    return {job: job.status() for job in jobs}


def _check_workdir(workdir: str) -> None:
    """Raises UserError if nothing can be written there."""
    path = Path(workdir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"workdir is {workdir}: {there} is not a writable folder; name another one "
            "as --config.workdir=FOLDER"
        )


def _check_baseline(folder: Path, settings: Settings) -> None:
    """Raises UserError if a finished D is too different to start from."""
    trained, asked = Settings.of(read_record(folder) or {}).model, settings.model
    takes = ARMS[settings.arm].takes
    shared = [name for taken in takes for name in SHARED_WITH_BASELINE[taken]]
    differing = [
        f"model.{name} (there {getattr(trained, name)}, here {getattr(asked, name)})"
        for name in dict.fromkeys(shared)
        if getattr(trained, name) != getattr(asked, name)
    ]
    if differing:
        raise UserError(
            f"{folder} has another {', another '.join(differing)}: use another "
            "--config.workdir, or the same model"
        )


def _missing(job: Job) -> UserError:
    """Says which prerequisite is missing, with the command that makes it."""
    settings = job.settings
    if isinstance(job, TrainJob):
        lacks, config_file = "is not trained", "configs/baseline.py"
    else:
        lacks, config_file = f"lacks {job.amount}", "configs/factorize.py"
        kept = ("workdir", "ranks", "factorize", "telemetry.tensorboard")
        # Statistics also depend on these.
        kept += ("compress.calibration_tokens", "train.batch_size")
        known = {path: operator.attrgetter(path)(settings) for path in kept}
        settings = Settings(model_path=str(job.source)).replace(known)
    set_by_file = ("task", "arm", "build_prerequisites", "overwrite")
    words = [
        override(path, value)
        for path, value in settings.flat().items()
        if path not in set_by_file and value != KNOBS[path].default
    ]
    command = ["python", "-m", "pcagpt.main", f"--config={config_file}", *words]
    return UserError(
        f"{job.folder} {lacks} and build_prerequisites is off; make it with: "
        f"{shlex.join(command)}"
    )


def _say(*lines: str) -> None:
    """Prints lines, on the first process only."""
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)
