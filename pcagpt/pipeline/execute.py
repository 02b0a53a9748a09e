"""Executes a plan: checks everything, does the missing jobs, writes the report."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from pcagpt.data.tokenizer import how_to_name_tokens
from pcagpt.errors import FAILING, READ_ONLY, UserError, warn_once
from pcagpt.pipeline.job import TO_DO, Job, Kind, Status
from pcagpt.pipeline.overview import results_in, show_plan, show_results
from pcagpt.pipeline.plan import Plan
from pcagpt.pipeline.samples import experiment_samples
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.report import (
    check_dtype,
    check_runs,
    collect_results,
    experiment_lines,
    write_report,
)
from pcagpt.run import lock
from pcagpt.sharding import processes
from pcagpt.telemetry.wandb_run import import_wandb
from pcagpt.training.setup import Setup


def check(plan: Plan, writes: bool = True) -> dict[Job, Status]:
    """Makes the fast checks; returns the status of each job that is needed.

    A finished run does not need its prerequisites, unless the factorization on disk
    differs from the one in the settings. Writes only caches. If no job writes anything,
    the workdir may be read-only. Without `writes`, this is a preview: the workdir may
    be read-only, and the device another one. All processes must call this.

    Raises:
      UserError: the workdir is not writable, W&B is not installed, a folder holds a run
        with other settings, a prerequisite is missing and `build_prerequisites` is off,
        the corpus does not exist, or the report could not compare the runs.
    """
    # Other commands may be at work: every process must see the same.
    return processes.from_first(lambda: _check(plan, writes))


def _check(plan: Plan, writes: bool) -> dict[Job, Status]:
    """As `check`, in one process."""
    settings = plan.settings
    if not writes:
        jobs = (dataclasses.replace(job, is_preview=True) for job in plan.jobs)
        plan = plan._replace(jobs=tuple(jobs))
    check_workdir(settings.workdir, writes=False)
    if settings.telemetry.wandb:
        import_wandb()
    needed = _needed(plan)
    to_do = [job for job, status in needed.items() if status.kind != Kind.DONE]
    if to_do and writes:
        check_workdir(settings.workdir)
    for job in to_do:
        if not job.is_target and not settings.build_prerequisites:
            raise job.missing_error()
    for job in to_do:
        job.check_early({job.folder for job in to_do})
    _check_compared(plan, needed)
    return {
        job: Status(kind, words if kind == Kind.TO_DO else words + job.remark())
        for job, (kind, words) in needed.items()
    }


def _check_compared(plan: Plan, needed: dict[Job, Status]) -> None:
    """Raises UserError if the runs could not be compared when all are finished.

    A single arm need not be. But that the device chose another compute dtype than D's
    would only show in the report of an experiment, after the arm was trained.
    """
    runs = [job for job in needed if isinstance(job, TrainJob)]
    done = [job for job in runs if needed[job].kind == Kind.DONE]
    if plan.start and runs[-1] not in done:
        check_dtype(plan.start, runs[-1].planned_row())
    if not (plan.reported or plan.baseline):
        return
    folders = filter(None, (plan.baseline, *(job.folder for job in done)))
    # The tokens of runs to do are compared when their text is tokenized.
    check_runs(folders, [job.planned_row() for job in runs if job not in done])


def describe(needed: dict[Job, Status]) -> list[str]:
    """A line for each job that `check` returned: name, amount and status."""
    missing = {job.folder for job, (kind, _) in needed.items() if kind != Kind.DONE}
    lines = []
    for job, (kind, words) in needed.items():
        if kind == Kind.DONE and job.sources & missing:
            words += f", made again if {min(job.sources & missing).name} changes"
        amount = job.made if kind == Kind.DONE else job.amount
        lines.append(f"{job.label:<32} {amount:>14}  {words}")
    return lines


def execute(plan: Plan, command: str) -> None:
    """Does the missing jobs in order, and writes the report of an experiment.

    The report and the boards show `command`. All processes must call this.

    Raises:
      UserError: as for `check`, or a job does not fit the corpus or the devices. In
        this case, only the token files of the corpus were written.
    """
    needed = check(plan)
    say(*describe(needed))
    missing: set[Path] = set()  # folders
    setups: dict[Job, Setup | None] = {}  # of the jobs to run
    there = {path for job in needed for path in job.sources if path.exists()}
    for job, status in needed.items():
        if status.kind != Kind.DONE or job.sources & missing:
            with _naming_removed(job, there):
                setups[job] = job.check(set(missing))
            missing.add(job.folder)
    for job, status in needed.items():
        # New runs are compared with finished ones: both must have the same tokens.
        if status.kind != Kind.TO_DO and (line := job.compare_corpus(bool(setups))):
            say(line)
    for name, vocab_size in _corpora_without_text(setups.values()):
        say(
            f"{name} holds bare token ids: to sample its models, "
            f"{how_to_name_tokens(vocab_size)}"
        )
    is_new = bool(setups)
    if is_new:
        processes.from_first(lambda: show_plan(plan.settings, setups, command))
    for job in list(setups):
        processes.from_first(partial(_check_sources, job, there))
        there |= {path for one in setups for path in one.sources if path.exists()}
        with _naming_removed(job, there):
            # `pop` lets go of what one job holds before the next one begins.
            job.run(setups.pop(job), command)
        there.add(job.folder)
    # Another command may have replaced what is told or reported now.
    for job, (kind, _) in check(plan).items():
        if kind != Kind.DONE:
            raise UserError(
                f"{job.folder} was replaced or changed while this command ran: run the "
                "same command again"
            )
    if plan.reported:
        processes.from_first(lambda: _report(plan, is_new, command))
    else:
        say(*(line for job in needed if job.is_target for line in job.found()))


@contextlib.contextmanager
def _naming_removed(job: Job, there: set[Path]) -> Iterator[None]:
    """An error in this context becomes that of `_check_sources`, if that is the cause.

    If its own place is gone, the job's own error says so.
    """
    is_new = not job.folder.parent.exists()
    try:
        yield
    except Exception:
        if is_new or job.folder.parent.exists():
            _check_sources(job, there)
        raise


def _check_sources(job: Job, there: set[Path]) -> None:
    """Raises UserError if what a job reads was `there`, and is gone."""
    if gone := [path for path in job.sources & there if not path.exists()]:
        raise UserError(
            f"{min(gone)} was removed while this command ran: restore it, or run the "
            "same command again"
        )


def _report(plan: Plan, is_new: bool, command: str) -> None:
    """Shows the finished runs of an experiment and writes its report, in one process.

    is_new: this command made a part of them.
    """
    workdir = Path(plan.settings.workdir)
    page, known = workdir / "report.html", results_in(workdir)
    results = collect_results(workdir, plan.reported, plan.factors, command)
    results |= experiment_samples(plan.settings, workdir, results, known)
    try:
        # All files of a report are of one command.
        with lock.held(page, meanwhile=lambda: None) as check_lock:
            # Other commands may have trained all runs. The boards come first: the rows
            # of a report count as shown.
            if is_new or known.get("rows") != results["rows"]:
                show_results(plan.settings, command, results)
            check_lock()
            replaced = results_in(workdir)  # Perhaps by a command at the same time.
            write_report(workdir, results)
            _tell_of_others(workdir, replaced, results)
    except OSError as error:
        if is_new or error.errno not in READ_ONLY:
            raise
        warn_once(f"the report in {workdir} is not renewed: {error.strerror}")
    else:
        say(f"report: {page}")
    finally:  # Also if the report cannot be written.
        say(*experiment_lines(results, workdir))


def _tell_of_others(
    workdir: Path, replaced: dict[str, Any], results: dict[str, Any]
) -> None:
    """Prints a line if a report showed runs that it no longer shows."""
    before, now = (
        {row["folder"] for row in one.get("rows", ())} for one in (replaced, results)
    )
    if left := [one for one in sorted(before - now) if (workdir / one).exists()]:
        say(
            f"the report in {workdir} no longer shows {', '.join(left)}, which stay "
            "there: list all ranks and seeds in one command to see all, or repeat, "
            f"with --config.workdir={workdir}, {replaced['command']}"
        )


def _needed(plan: Plan) -> dict[Job, Status]:
    """As `check` returns."""
    jobs, target, statuses = plan.jobs, plan.jobs[-1], {}
    if not plan.reported:
        # What an earlier job holds may be the cause: it is then named.
        with contextlib.suppress(UserError):
            statuses[target] = target.status()
        is_done = statuses.get(target, TO_DO).kind == Kind.DONE
        if is_done and not any(job.differing() for job in jobs):
            jobs = tuple(job for job in jobs if job.is_target)
    return {job: statuses.get(job) or job.status() for job in jobs}


def _corpora_without_text(setups: Iterable[Setup | None]) -> set[tuple[str, int]]:
    """(name, vocabulary) of the corpora whose tokens stand for no known text."""
    corpora = [setup.corpus for setup in setups if setup is not None]
    bare = [c for c in corpora if c.tokenizer is None and c.characters is None]
    return {(corpus.name, corpus.vocab_size) for corpus in bare}


def check_workdir(workdir: str, writes: bool = True) -> None:
    """Raises UserError if nothing can be written there, OSError if the system fails.

    Without `writes`, a read-only folder is accepted.
    """
    if nearest := unwritable(Path(workdir), writes):
        raise UserError(
            f"workdir is {workdir}: {nearest} is not a writable folder; name another "
            "one as --config.workdir=FOLDER"
        )


def unwritable(path: Path, writes: bool = True) -> Path | None:
    """The path, or the nearest one above it that exists, if it is not writable.

    None if it is; without `writes`, if it is any folder. OSError if the system fails.
    """
    path = path.absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    if nearest.is_dir() and not writes:
        return None
    try:  # In /proc, the permissions alone would allow it.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        if error.errno in FAILING:
            raise OSError(error.errno, error.strerror, str(nearest)) from None
        return nearest
    return None


def say(*lines: str) -> None:
    """Prints lines, if any, on the first process only."""
    if lines and jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)
