"""Executes a plan: checks everything, does the missing jobs, writes the report."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax

from pcagpt.errors import UserError
from pcagpt.pipeline.job import DONE, TO_DO, Job
from pcagpt.pipeline.plan import Plan
from pcagpt.report import collect_results, write_report
from pcagpt.sharding import processes
from pcagpt.telemetry.metrics import import_wandb
from pcagpt.training.setup import Setup


def check(plan: Plan) -> dict[Job, str]:
    """Makes the fast checks; returns {job: status} of the jobs that are needed.

    A finished run does not need its prerequisites, unless the factorization on disk
    differs from the one in the settings. Writes nothing.

    Raises:
      UserError: the workdir is not writable, W&B is not installed, a folder holds a run
        with other settings, a prerequisite is missing and `build_prerequisites` is off,
        or the corpus does not exist.
    """
    settings = plan.settings
    check_workdir(settings.workdir)
    if settings.telemetry.wandb:
        import_wandb()
    # Other commands may be at work: every process must see the same.
    needed = processes.from_first(lambda: _needed(plan))
    to_do = [job for job, status in needed.items() if status != DONE]
    for job in to_do:
        if not job.is_target and not settings.build_prerequisites:
            raise job.missing()
    for job in to_do:
        job.check_vocabulary({job.folder for job in to_do})
    return needed


def describe(needed: dict[Job, str]) -> list[str]:
    """A line for each job that `check` returned: name, amount and status."""
    return [
        f"{job.label:<32} {job.made if status == DONE else job.amount:>14}  {status}"
        for job, status in needed.items()
    ]


def execute(plan: Plan, command: str) -> None:
    """Does the missing jobs in order, and writes the report of an experiment.

    The report shows `command`.

    Raises:
      UserError: as for `check`, or a job does not fit the corpus or the devices. In
        this case, only the token files of the corpus were written.
    """
    needed, checked = check(plan), {}
    say(*describe(needed))
    for job, status in needed.items():
        if status != DONE or job.sources & checked.keys():
            checked[job.folder] = job.check(set(checked))
    for job, status in needed.items():
        # New runs are compared with finished ones: both must have the same tokens.
        if status != TO_DO and (line := job.compare_corpus(bool(checked))):
            say(line)
    for corpus in _corpora_without_text(checked.values()):
        say(
            f"{corpus} holds bare token ids: its models cannot be sampled, unless "
            "--config.data.tokenizer names the tokenizer"
        )
    for job in needed:
        if job.folder in checked:
            # `pop` frees the memory of a teacher before the next job.
            job.run(checked.pop(job.folder))
    if plan.reported and jax.process_index() == 0:
        workdir = Path(plan.settings.workdir)
        results = collect_results(workdir, plan.reported, plan.factors, command)
        write_report(workdir, results)
        say(f"report: {workdir / 'report.html'}")


def _needed(plan: Plan) -> dict[Job, str]:
    """As `check` returns."""
    jobs, target = plan.jobs, plan.jobs[-1]
    known = {target: target.status()}
    is_all = plan.reported or known[target] != DONE
    if not is_all and not any(job.differing() for job in jobs):
        jobs = tuple(job for job in jobs if job.is_target)
    return {job: known.get(job) or job.status() for job in jobs}


def _corpora_without_text(checked: Iterable[Setup | None]) -> set[str]:
    """Names of the corpora of training runs whose tokens stand for no known text."""
    corpora = [setup.corpus for setup in checked if setup is not None]
    return {c.name for c in corpora if c.tokenizer is None and c.characters is None}


def check_workdir(workdir: str) -> None:
    """Raises UserError if nothing can be written there."""
    path = Path(workdir).absolute()
    there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    try:  # In /proc, the permissions alone would allow it.
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        raise UserError(
            f"workdir is {workdir}: {there} is not a writable folder; name another one "
            "as --config.workdir=FOLDER"
        ) from None


def say(*lines: str) -> None:
    """Prints lines, on the first process only."""
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)
