"""Carrying out a plan: what is there or in the way, making the rest, reporting."""

import os
import shlex
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt import factorize
from pcagpt.arms import ARMS
from pcagpt.compress.sweep import add_recovered, folder_of
from pcagpt.data.corpus import describe_corpus
from pcagpt.errors import UserError
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.plan import Job, Plan, recovery_plan
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.report import collect_results, recovered_rows, write_report
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.run.folder import DONE
from pcagpt.sharding import placement
from pcagpt.telemetry.record import import_wandb

# What a finished baseline must share with a model that takes this over from it.
SHARED_WITH_BASELINE = {
    "factors": ("n_embd",),
    "blocks": ("n_embd", "n_layer", "n_head", "block_size", "bias"),
    "weights": (),
}


def describe(plan: Plan) -> list[str]:
    """One line a job: what it is, and whether it is done, resumes or is to do.

    Raises:
      UserError: a run of another config is in the way.
    """
    return [
        f"{job.label:<32} {job.amount:>14}  {job.status()}" for job in _needed(plan)
    ]


def check(plan: Plan, config: ConfigDict) -> None:
    """Finds what is in the way, as far as that takes no time and leaves no trace.

    Raises:
      UserError: the workdir cannot be written to, W&B is asked for and not installed,
        a run of another config is there, a prerequisite is lacking and
        `config.build_prerequisites` is off, or the corpus is none.
    """
    _check_workdir(config.workdir)
    if config.telemetry.wandb:
        import_wandb()
    if config.factorize.method not in factorize.METHODS:
        raise UserError(
            f"factorize.method is '{config.factorize.method}': it must be one of "
            f"{', '.join(factorize.METHODS)}"
        )
    jobs = _needed(plan)
    to_do = [job for job in jobs if job.status() != DONE]
    lacking = [job for job in to_do if not job.is_target]
    if lacking and not config.build_prerequisites:
        raise _lacks(lacking[0], config)
    if any(isinstance(job, TrainJob) for job in to_do):
        corpus = describe_corpus(config.data.source, config.data.tokenizer)
        hardware = placement.hardware()
        for job in to_do:
            if isinstance(job, TrainJob):
                knobs.model_settings(job.config.model, corpus.vocab_size, hardware)
        for job in jobs:
            if isinstance(job, FactorizeJob) and max(job.ranks) > corpus.vocab_size:
                raise UserError(
                    f"ranks holds {max(job.ranks)}: the corpus has "
                    f"{corpus.vocab_size} tokens, the table's rank is at most that"
                )
    for job in jobs:
        if isinstance(job, TrainJob) and not job.is_target and job not in to_do:
            _check_baseline(job.folder, config)


def execute(plan: Plan, config: ConfigDict, command: str) -> None:
    """Makes what is not done, in order, and writes the report if there is one.

    Raises:
      UserError: as for `check`, or something does not fit the corpus or the devices;
        nothing but the corpus's token files has been written then.
    """
    check(plan, config)
    _say(*describe(plan))
    jobs, done, to_be_made = _needed(plan), [], set()
    for job in jobs:
        if job.status() != DONE or job.sources & to_be_made:
            job.check(to_be_made)
            to_be_made.add(job.folder)
        elif isinstance(job, TrainJob):
            done.append(job)
    if to_be_made:  # What is new must have seen the same tokens as what is there.
        for job in done:
            job.check_corpus()
    for job in jobs:
        if job.folder in to_be_made:
            job.run()
    if plan.reported and jax.process_index() == 0:
        workdir = Path(config.workdir)
        results = collect_results(workdir, plan.reported, command)
        write_report(workdir, results)
        _say(f"report: {workdir / 'report.html'}")


def recover(config: ConfigDict) -> None:
    """Trains the best models of a sweep on, and D, and enters them into its report.

    Raises:
      UserError: as for `execute`.
    """
    folder = folder_of(config)
    plan = recovery_plan(config, folder)
    execute(plan, plan.jobs[0].config, command="")
    if jax.process_index() == 0:
        runs = [job.folder.name for job in plan.jobs]
        baseline = checkpoint.find(config.model_path)[0]
        rows = recovered_rows(folder, runs, baseline)
        _say(f"report: {add_recovered(folder, rows)}")


def _needed(plan: Plan) -> tuple[Job, ...]:
    """The jobs, but not the prerequisites of a run that is finished.

    Unless they are there and made otherwise than is asked for now.
    """
    target = plan.jobs[-1]
    is_done = not plan.reported and target.status() == DONE
    if not is_done or any(
        isinstance(job, FactorizeJob) and job.has_source() and job.differing()
        for job in plan.jobs
    ):
        return plan.jobs
    return tuple(job for job in plan.jobs if job.is_target)


def _check_workdir(workdir: str) -> None:
    """Raises UserError if nothing can be written there."""
    path = Path(workdir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"workdir is {workdir}: {there} is no folder that can be written to; name "
            "another one as --config.workdir=FOLDER"
        )


def _check_baseline(folder: Path, config: ConfigDict) -> None:
    """Raises UserError if a finished baseline is too different to start from."""
    trained = (run_folder.read_config(folder) or {}).get("model", {})
    shared = dict.fromkeys(
        name for taken in ARMS[config.arm].takes for name in SHARED_WITH_BASELINE[taken]
    )
    differing = [
        f"model.{name} (there {trained.get(name)}, here {config.model[name]})"
        for name in shared
        if trained.get(name) != config.model[name]
    ]
    if differing:
        raise UserError(
            f"{folder} has another {', another '.join(differing)}: use another "
            "--config.workdir, or the same model"
        )


def _lacks(job: Job, config: ConfigDict) -> UserError:
    """Says which prerequisite is lacking, with the command that makes it."""
    if isinstance(job, TrainJob):
        return UserError(
            f"{job.folder} is not trained and build_prerequisites is off; train it "
            f"with: {_command('configs/baseline.py', job.config)}"
        )
    alone = knobs.base()
    alone.workdir = config.workdir
    alone.model_path = str(job.source)
    alone.ranks = job.ranks
    alone.factorize = config.factorize
    alone.telemetry.tensorboard = config.telemetry.tensorboard
    return UserError(
        f"{job.folder} lacks {job.amount} and build_prerequisites is off; make it "
        f"with: {_command('configs/factorize.py', alone)}"
    )


def _command(config_file: str, config: ConfigDict) -> str:
    """The command line that runs a config file with this config's knobs."""
    chosen = ("task", "arm", "build_prerequisites", "overwrite")
    words = [
        knobs.override(path, value)
        for path, value in knobs.flat(config).items()
        if path not in chosen and value != knobs.KNOBS[path].default
    ]
    return shlex.join(
        ["python", "-m", "pcagpt.main", f"--config={config_file}", *words]
    )


def _say(*lines: str) -> None:
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)
