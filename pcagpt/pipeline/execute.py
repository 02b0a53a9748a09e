"""Executes a plan: checks everything, does the missing jobs, writes the report."""

import operator
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import jax

from pcagpt.arms import ARMS
from pcagpt.config import KNOBS, Settings, override
from pcagpt.data.corpus import describe_corpus
from pcagpt.errors import UserError
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.plan import Job, Plan
from pcagpt.pipeline.train_job import DONE, SPLITS, TO_DO, TrainJob
from pcagpt.report import collect_results, write_report
from pcagpt.run.folder import read_record
from pcagpt.sharding import placement
from pcagpt.telemetry.record import import_wandb
from pcagpt.training.setup import Setup

# {what an arm takes from D: the `model` knobs that must then be the same as D's}
SHARED_WITH_BASELINE = {
    "factors": ("n_embd",),
    "blocks": ("n_embd", "n_layer", "n_head", "block_size", "bias"),
    "weights": (),
}


def check(plan: Plan, settings: Settings) -> dict[Job, str]:
    """Makes the fast checks; returns {job: status} of the jobs that are needed.

    A finished run does not need its prerequisites, unless the factorization on disk
    differs from the one in the settings. Writes nothing.

    Raises:
      UserError: the workdir is not writable, W&B is not installed, a folder holds a run
        with other settings, a prerequisite is missing and `build_prerequisites` is off,
        or the corpus does not exist.
    """
    check_workdir(settings.workdir)
    if settings.telemetry.wandb:
        import_wandb()
    # Other commands may be at work: every process must see the same.
    shared = placement.from_first(
        lambda: [(plan.jobs.index(job), status) for job, status in _needed(plan)]
    )
    needed = {plan.jobs[number]: status for number, status in shared}
    to_do = [job for job, status in needed.items() if status != DONE]
    for job in to_do:
        if not job.is_target and not settings.build_prerequisites:
            raise _missing(job)
    if any(isinstance(job, TrainJob) for job in to_do):
        data = settings.data
        corpus = describe_corpus(data.source, data.tokenizer, SPLITS)
        for job in to_do:
            job.check_vocabulary(corpus.vocab_size)
    for job, status in needed.items():
        if isinstance(job, TrainJob) and not job.is_target and status == DONE:
            _check_baseline(job.folder, settings)
    return needed


def describe(needed: dict[Job, str]) -> list[str]:
    """A line for each job that `check` returned: name, amount and status."""
    return [
        f"{job.label:<32} {job.amount:>14}  {status}" for job, status in needed.items()
    ]


def execute(plan: Plan, settings: Settings, command: str) -> None:
    """Does the missing jobs in order, and writes the report of an experiment.

    `settings` are those that the plan was made from. The report shows `command`.

    Raises:
      UserError: as for `check`, or a job does not fit the corpus or the devices. In
        this case, only the token files of the corpus were written.
    """
    needed, checked = check(plan, settings), {}
    _say(*describe(needed))
    for job, status in needed.items():
        if status != DONE or job.sources & checked.keys():
            checked[job.folder] = job.check(set(checked))
    for job, status in needed.items():
        # New runs are compared with finished ones: both must have the same tokens.
        if isinstance(job, TrainJob) and status != TO_DO:
            _check_corpus(job, is_needed=bool(checked))
    for corpus in _corpora_without_text(checked.values()):
        _say(
            f"{corpus} holds bare token ids: its models cannot be sampled, unless "
            "--config.data.tokenizer names the tokenizer"
        )
    for job in needed:
        if job.folder in checked:
            # `pop` frees the memory of a teacher before the next job.
            job.run(checked.pop(job.folder))
    if plan.reported and jax.process_index() == 0:
        workdir = Path(settings.workdir)
        results = collect_results(workdir, plan.reported, plan.factors, command)
        write_report(workdir, results)
        _say(f"report: {workdir / 'report.html'}")


def _needed(plan: Plan) -> list[tuple[Job, str]]:
    """The jobs that `check` returns, with their status."""
    jobs, target = plan.jobs, plan.jobs[-1]
    known = {target: target.status()}
    if known[target] == DONE and not plan.reported:
        made = [job for job in jobs if isinstance(job, FactorizeJob)]
        if not any(job.is_known_to_differ() for job in made):
            jobs = tuple(job for job in jobs if job.is_target)
    return [(job, known.get(job) or job.status()) for job in jobs]


def _check_corpus(job: TrainJob, is_needed: bool) -> None:
    """Raises UserError if a run was trained on other tokens than its source holds.

    A corpus that is not needed any more may be missing; that is said.
    """
    try:
        job.corpus()
    except UserError as error:
        if is_needed:
            raise
        _say(f"{job.folder.name} is not compared with its corpus: {error}")
    else:
        job.check_corpus()


def _corpora_without_text(checked: Iterable[Setup | None]) -> set[str]:
    """Names of the corpora of training runs whose tokens stand for no known text."""
    corpora = [setup.corpus for setup in checked if setup is not None]
    return {c.name for c in corpora if c.tokenizer is None and c.characters is None}


def check_workdir(workdir: str) -> None:
    """Raises UserError if nothing can be written there."""
    path = Path(workdir).absolute()
    there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
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
