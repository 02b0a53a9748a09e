"""The graph of runs: which exist, which will be made, and making them in order.

D, the baseline, comes first; its table is factorized. A starts from the factors with
random blocks, B from the factors with D's blocks, C from random factors.
"""

import dataclasses
import os
import shlex
import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from pcagpt import checkpoint, factor_files, factorize, run_folder, warm_start
from pcagpt import config as knobs
from pcagpt.corpus import Corpus, describe_corpus, open_corpus
from pcagpt.errors import UserError
from pcagpt.factorize_run import FactorizeJob
from pcagpt.report import collect_results, write_report
from pcagpt.train import Training

DONE, TO_DO = "done", "to do"
IMPORTS = ("import_wte_npy", "import_scale_matrices_npz", "blocks_from")
# What a finished baseline must share with a model that takes over its table or blocks.
SHARED_WITH_BASELINE = {
    "pca": ("n_embd",),
    "pca_finetune": ("n_embd", "n_layer", "n_head", "block_size", "bias"),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the compared models: its letter, run name and config file."""

    letter: str
    run_name: str
    config_file: str


ARMS = {
    "baseline": Arm("D", "gpt_baseline", "configs/baseline.py"),
    "pca": Arm("A", "gpt_pca_k{rank}", "configs/pca_k128.py"),
    "pca_finetune": Arm(
        "B", "gpt_pca_finetune_k{rank}", "configs/pca_finetune_k128.py"
    ),
    "random": Arm("C", "gpt_random_lowrank_k{rank}", "configs/random_k128.py"),
}


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A training run with its folder and complete config.

    is_target: asked for by name, not a prerequisite of what was asked for.
    """

    run_dir: Path
    config: ConfigDict
    is_target: bool

    @property
    def label(self) -> str:
        """As in 'A gpt_pca_k128'."""
        return f"{ARMS[self.config.arm].letter} {self.run_dir.name}"

    def status(self) -> str:
        """'done', 'resumes at step N' or 'to do'.

        Raises:
          UserError: the folder holds a run of another config, by the fields' names.
        """
        if self.is_target and self.config.overwrite:
            return TO_DO
        finished = run_folder.read_result(self.run_dir) is not None
        if finished and not self.is_target:
            return DONE
        step = max(checkpoint.steps(self.run_dir), default=0)
        if not finished and step == 0:
            return TO_DO  # Nothing that took time to make.
        changed = run_folder.changed_fields(self.run_dir, self.record())
        if changed:
            raise UserError(
                f"{self.run_dir} was trained with another config: {'; '.join(changed)}:"
                " use another --config.workdir, or --config.overwrite=True to discard "
                "the run"
            )
        return DONE if finished else f"resumes at step {step}"

    def record(self) -> dict:
        """What config.json holds: the config and the hashes of what is imported.

        Files that are still to be made have no hash yet.
        """
        init = self.config.init.to_dict()
        is_made = all(Path(init[name]).exists() for name in IMPORTS if init[name])
        hashes = warm_start.fingerprints(init) if is_made else None
        return {**self.config.to_dict(), "imported_sha256": hashes}

    def check(self, corpus: Corpus, to_be_made: set[Path]) -> None:
        """Raises UserError where config, corpus, imports and devices do not fit.

        Args:
          corpus: opened.
          to_be_made: folders of earlier jobs: what is in them is not imported here.
        """
        config = self.config.copy_and_resolve_references()
        for name in IMPORTS:
            path = Path(config.init[name])
            if {path, path.parent} & to_be_made:
                config.init[name] = ""
                if freeze := {
                    "import_wte_npy": "import_wte_freeze",
                    "import_scale_matrices_npz": "import_scale_matrices_freeze",
                }.get(name):
                    config.init[freeze] = False
        Training(config, {}, self.run_dir, corpus)

    def run(self, corpus: Corpus) -> None:
        """Trains, from the last checkpoint if there is one."""
        is_new = self.status() == TO_DO
        vocab_size = self.config.model.vocab_size or corpus.vocab_size
        record = {**self.record(), "vocab_size": vocab_size}
        training = Training(self.config, record, self.run_dir, corpus)
        if _is_first_process():
            if is_new and (self.run_dir / "config.json").exists():
                shutil.rmtree(self.run_dir)
            run_folder.write_config(self.run_dir, record)
        _wait_for_all(self.run_dir.name)
        training.run(self.label)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Jobs in the order of their making, and the runs to report on (or none)."""

    jobs: tuple[TrainJob | FactorizeJob, ...]
    reported: tuple[str, ...] = ()


def plan(config: ConfigDict) -> Plan:
    """What a 'train', 'factorize' or 'experiment' config asks for, prerequisites first.

    Looks at nothing but the config.
    """
    if config.task == "factorize":
        return Plan((_factorize_job(config, Path(config.model_path), config.ranks),))
    if config.task == "train":
        return Plan(_jobs_of_run(config))
    jobs, reported = [], []
    for seed in config.experiment.seeds or (config.seed,):
        suffix = "" if seed == config.seed else f"_seed{seed}"
        base = config.copy_and_resolve_references()
        base.seed, base.task = seed, "train"
        baseline = _train_job(_baseline(base), suffix, is_target=True)
        arms = [baseline, _factorize_job(base, baseline.run_dir, base.ranks, suffix)]
        for rank in base.ranks:
            for arm in ("pca", "random", "pca_finetune"):
                arms.append(_train_job(_arm(base, arm, rank, suffix), suffix, True))
        jobs += arms
        reported += [j.run_dir.name for j in arms if isinstance(j, TrainJob)]
    return Plan(tuple(jobs), tuple(reported))


def _jobs_of_run(config: ConfigDict) -> tuple[TrainJob | FactorizeJob, ...]:
    """A single run after whatever it needs."""
    config = config.copy_and_resolve_references()
    init, needed = config.init, []
    wants_factors = config.arm in ("pca", "pca_finetune") and not (
        init.import_wte_npy or init.import_scale_matrices_npz
    )
    wants_blocks = config.arm == "pca_finetune" and not init.blocks_from
    if wants_factors or wants_blocks:
        baseline = _train_job(_baseline(config), "", is_target=False)
        needed.append(baseline)
        if wants_factors:
            ranks = (config.model.n_embd_wte,)
            needed.append(_factorize_job(config, baseline.run_dir, ranks))
        _import(config, "")
    return (*needed, _train_job(config, "", is_target=True))


def _baseline(config: ConfigDict) -> ConfigDict:
    """The config of D that belongs to any arm's, or to an experiment's."""
    baseline = config.copy_and_resolve_references()
    if config.task == "train" and config.arm == "pca_finetune":
        _scale_budget(
            baseline.train,
            1 / config.finetune.steps_share,
            1 / config.finetune.learning_rate_share,
        )
    baseline.arm = "baseline"
    with baseline.ignore_type():
        baseline.model.n_embd_wte = None
    baseline.model.band_sizes = baseline.model.band_ranks = ()
    _clear(baseline.init)
    return baseline


def _arm(base: ConfigDict, arm: str, rank: int, suffix: str) -> ConfigDict:
    """The config of one arm of an experiment."""
    config = base.copy_and_resolve_references()
    config.arm, config.model.n_embd_wte = arm, rank
    if arm == "pca_finetune":
        share = config.finetune
        _scale_budget(config.train, share.steps_share, share.learning_rate_share)
    if arm == "random":
        _clear(config.init)
    else:
        _import(config, suffix)
    return config


def _clear(init: ConfigDict) -> None:
    """Imports nothing."""
    for name, value in init.items():
        init[name] = type(value)()


def _scale_budget(train: ConfigDict, steps_share: float, rate_share: float) -> None:
    train.steps = max(1, round(train.steps * steps_share))
    train.warmup_steps = round(train.warmup_steps * steps_share)
    train.learning_rate *= rate_share


def _import(config: ConfigDict, suffix: str) -> None:
    """Fills in what is imported where the person has not."""
    init, workdir = config.init, Path(config.workdir)
    if not (init.import_wte_npy or init.import_scale_matrices_npz):
        folder, rank = _factor_folder(config, suffix), config.model.n_embd_wte
        init.import_wte_npy = str(factor_files.table_path(folder, rank))
        init.import_scale_matrices_npz = str(factor_files.scale_path(folder, rank))
    if config.arm == "pca_finetune" and not init.blocks_from:
        init.blocks_from = str(workdir / (ARMS["baseline"].run_name + suffix))


def _train_job(config: ConfigDict, suffix: str, is_target: bool) -> TrainJob:
    rank = "-".join(map(str, config.model.band_ranks)) or config.model.n_embd_wte
    name = ARMS[config.arm].run_name.format(rank=rank) + suffix
    return TrainJob(Path(config.workdir) / name, config, is_target)


def _factor_folder(config: ConfigDict, suffix: str) -> Path:
    return Path(config.workdir) / f"pca_factorized{suffix}"


def _factorize_job(
    config: ConfigDict, source: Path, ranks: tuple[int, ...], suffix: str = ""
) -> FactorizeJob:
    return FactorizeJob(
        source=source,
        folder=_factor_folder(config, suffix),
        ranks=tuple(ranks),
        method=config.factorize.method,
        singular_value_split=config.factorize.singular_value_split,
        tensorboard=config.telemetry.tensorboard,
    )


def describe(plan_: Plan, overwrite: bool) -> list[str]:
    """One line a job: what it is, and whether it is done, resumes or is to do.

    Raises:
      UserError: a run of another config is in the way.
    """
    lines = []
    for job in _needed(plan_).jobs:
        if isinstance(job, TrainJob):
            steps = f"{job.config.train.steps:,} steps"
            lines.append(f"{job.label:<32} {steps:>14}  {job.status()}")
        else:
            ranks = "rank " + ", ".join(map(str, job.ranks))
            state = _factors_status(job, overwrite)
            lines.append(f"  {job.folder.name:<30} {ranks:>14}  {state}")
    return lines


def _needed(plan_: Plan) -> Plan:
    """The plan without the prerequisites of a run that is finished."""
    target = plan_.jobs[-1]
    if isinstance(target, TrainJob) and not plan_.reported and target.status() == DONE:
        return Plan((target,))
    return plan_


def _factors_status(job: FactorizeJob, overwrite: bool) -> str:
    if overwrite or not job.has_source():
        return TO_DO
    return TO_DO if job.missing_ranks() else DONE


def check(plan_: Plan, config: ConfigDict) -> None:
    """Finds what is in the way, as far as that takes no time and leaves no trace.

    Raises:
      UserError: the workdir cannot be written to, a run of another config is there, a
        prerequisite is lacking and `config.build_prerequisites` is off, or the corpus
        is none.
    """
    workdir = Path(config.workdir).absolute()
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"workdir is {config.workdir}: {there} is no folder that can be written "
            "to; name another one as --config.workdir=FOLDER"
        )
    if config.factorize.method not in factorize.METHODS:
        raise UserError(
            f"factorize.method is '{config.factorize.method}': it must be one of "
            f"{', '.join(factorize.METHODS)}"
        )
    plan_ = _needed(plan_)
    if config.task == "train" and not config.build_prerequisites:
        _require_prerequisites(plan_, config)
    to_train = _to_train(plan_)
    if to_train:
        corpus = describe_corpus(config.data.source, config.data.tokenizer)
        knobs.model_settings(config.model, corpus.vocab_size, "cpu")
        for job in plan_.jobs:
            if isinstance(job, FactorizeJob) and max(job.ranks) > corpus.vocab_size:
                raise UserError(
                    f"ranks holds {max(job.ranks)}: the corpus has "
                    f"{corpus.vocab_size} tokens, the table's rank is at most that"
                )
    for job in plan_.jobs:
        if isinstance(job, TrainJob) and not job.is_target and job not in to_train:
            _check_baseline(job.run_dir, config)


def _require_prerequisites(plan_: Plan, config: ConfigDict) -> None:
    """Raises UserError with the command that makes the first one that is lacking."""
    for job in plan_.jobs:
        if isinstance(job, TrainJob) and not job.is_target and job.status() != DONE:
            raise UserError(
                f"{job.run_dir} is not trained and build_prerequisites is off; train "
                f"it with: {_command(ARMS[job.config.arm].config_file, job.config)}"
            )
        if isinstance(job, FactorizeJob) and _factors_status(job, False) != DONE:
            factorize_config = knobs.base()
            factorize_config.workdir = config.workdir
            factorize_config.model_path = str(job.source)
            factorize_config.ranks = job.ranks
            factorize_config.factorize = config.factorize
            factorize_config.telemetry.tensorboard = job.tensorboard
            command = _command("configs/factorize.py", factorize_config)
            raise UserError(
                f"{job.folder} lacks rank {', '.join(map(str, job.ranks))} and "
                f"build_prerequisites is off; make it with: {command}"
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


def _check_baseline(run_dir: Path, config: ConfigDict) -> None:
    """Raises UserError if a finished baseline is too different to start from."""
    trained = (run_folder.read_config(run_dir) or {}).get("model", {})
    differing = [
        f"model.{name} (there {trained.get(name)}, here {config.model[name]})"
        for name in SHARED_WITH_BASELINE[config.arm]
        if trained.get(name) != config.model[name]
    ]
    if differing:
        raise UserError(
            f"{run_dir} has another {', another '.join(differing)}: use another "
            "--config.workdir, or the same model"
        )


def _to_train(plan_: Plan) -> list[TrainJob]:
    return [
        job for job in plan_.jobs if isinstance(job, TrainJob) and job.status() != DONE
    ]


def execute(plan_: Plan, config: ConfigDict, command: str) -> None:
    """Makes what is not done, in order, and writes the report if there is one.

    Raises:
      UserError: as for `check`, or something does not fit the corpus or the devices;
        nothing but the corpus's token files has been written then.
    """
    check(plan_, config)
    plan_ = _needed(plan_)
    for line in describe(plan_, config.overwrite):
        _say(line)
    to_train = _to_train(plan_)
    corpus = None
    if to_train:
        source, tokenizer = config.data.source, config.data.tokenizer
        folder = Path(config.data.cache_dir or Path(config.workdir) / "data")
        if _is_first_process():
            open_corpus(source, folder, tokenizer)
        _wait_for_all("corpus")
        corpus = open_corpus(source, folder, tokenizer)
        to_be_made = {job.run_dir for job in to_train}
        for job in plan_.jobs:
            if isinstance(job, TrainJob):
                if job in to_train:
                    job.check(corpus, to_be_made)
            elif _factors_status(job, config.overwrite) != DONE or (
                job.source in to_be_made
            ):
                to_be_made.add(job.folder)
    for job in plan_.jobs:
        if isinstance(job, TrainJob):
            if job in to_train:
                job.run(corpus)
            _wait_for_all(str(job.run_dir))
            continue
        if _is_first_process() and _factors_status(job, config.overwrite) != DONE:
            _say(f"factorizing {job.source}, rank {', '.join(map(str, job.ranks))}")
            if config.overwrite and job.differing():
                shutil.rmtree(job.folder)
            job.run()
        _wait_for_all(str(job.folder))
    if plan_.reported and _is_first_process():
        workdir = Path(config.workdir)
        results = collect_results(workdir, plan_.reported, command)
        write_report(workdir, results)
        _say(f"report: {workdir / 'report.html'}")


def _is_first_process() -> bool:
    return jax.process_index() == 0


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _say(line: str) -> None:
    if _is_first_process():
        print(line, flush=True)
