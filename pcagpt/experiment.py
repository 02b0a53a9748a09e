"""The graph of runs: which exist, which will be made, and making them in order.

D, the baseline, comes first; its table is factorized. A starts from the factors with
random blocks, B from the factors with D's blocks, C from random factors.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from pcagpt import checkpoint, factor_files, run_folder, warm_start
from pcagpt.corpus import Corpus, open_corpus
from pcagpt.errors import UserError
from pcagpt.factorize_run import FactorizeJob
from pcagpt.report import collect_results, write_report
from pcagpt.train import Training

DONE, TO_DO = "done", "to do"


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
        changed = run_folder.changed_fields(self.run_dir, self.record())
        if changed:
            raise UserError(
                f"{self.run_dir} was trained with another config: {'; '.join(changed)}:"
                " use another --config.workdir, or --config.overwrite=True to discard "
                "the run"
            )
        if finished:
            return DONE
        steps = checkpoint.steps(self.run_dir)
        return f"resumes at step {max(steps)}" if steps else TO_DO

    def record(self) -> dict:
        """What config.json holds: the config and the hashes of what is imported.

        Files that are still to be made have no hash yet.
        """
        init = self.config.init.to_dict()
        names = ("import_wte_npy", "import_scale_matrices_npz", "blocks_from")
        is_made = all(Path(init[name]).exists() for name in names if init[name])
        hashes = warm_start.fingerprints(init) if is_made else None
        return {**self.config.to_dict(), "imported_sha256": hashes}

    def run(self, corpus: Corpus) -> None:
        """Trains, from the last checkpoint if there is one; nothing if it is done."""
        if self.status() == DONE:
            return
        record = {**self.record(), "vocab_size": corpus.vocab_size}
        training = Training(self.config, record, self.run_dir, corpus)
        if _is_first_process():
            if self.is_target and self.config.overwrite and self.run_dir.is_dir():
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
    for name, value in baseline.init.items():
        baseline.init[name] = type(value)()
    return baseline


def _arm(base: ConfigDict, arm: str, rank: int, suffix: str) -> ConfigDict:
    """The config of one arm of an experiment."""
    config = base.copy_and_resolve_references()
    config.arm, config.model.n_embd_wte = arm, rank
    if arm == "pca_finetune":
        share = config.finetune
        _scale_budget(config.train, share.steps_share, share.learning_rate_share)
    if arm != "random":
        _import(config, suffix)
    return config


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
    name = ARMS[config.arm].run_name.format(rank=config.model.n_embd_wte) + suffix
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
    )


def describe(plan_: Plan, overwrite: bool) -> list[str]:
    """One line a job: what it is, and whether it is done, resumes or is to do.

    Raises:
      UserError: a run of another config is in the way.
    """
    lines = []
    for job in plan_.jobs:
        if isinstance(job, TrainJob):
            steps = f"{job.config.train.steps:,} steps"
            lines.append(f"{job.label:<32} {steps:>14}  {job.status()}")
        else:
            ranks = "rank " + ", ".join(map(str, job.ranks))
            state = _factors_status(job, overwrite)
            lines.append(f"  {job.folder.name:<30} {ranks:>14}  {state}")
    return lines


def _factors_status(job: FactorizeJob, overwrite: bool) -> str:
    is_trained = job.source.exists() and (
        job.source.suffix == ".npy" or checkpoint.steps(job.source)
    )
    if overwrite or not is_trained:
        return TO_DO
    return TO_DO if job.missing_ranks() else DONE


def execute(plan_: Plan, config: ConfigDict, command: str) -> None:
    """Makes what is not done, in order, and writes the report if there is one.

    Raises:
      UserError: something is in the way, or a prerequisite is lacking and
        `config.build_prerequisites` is off; nothing has been written then.
    """
    for line in describe(plan_, config.overwrite):
        _say(line)
    to_train = [
        job for job in plan_.jobs if isinstance(job, TrainJob) and job.status() != DONE
    ]
    lacking = [job for job in to_train if not job.is_target]
    if lacking and not config.build_prerequisites:
        arm = ARMS[lacking[0].config.arm]
        raise UserError(
            f"{lacking[0].run_dir} is not trained and build_prerequisites is off; "
            f"train it with: python -m pcagpt.main --config={arm.config_file} "
            f"--config.workdir={config.workdir}"
        )
    corpus = None
    if to_train:
        source, tokenizer = config.data.source, config.data.tokenizer
        folder = Path(config.data.cache_dir or Path(config.workdir) / "data")
        if _is_first_process():
            open_corpus(source, folder, tokenizer)
        _wait_for_all("corpus")
        corpus = open_corpus(source, folder, tokenizer)
    for job in plan_.jobs:
        if isinstance(job, TrainJob):
            if job in to_train:
                job.run(corpus)
        elif _is_first_process() and _factors_status(job, config.overwrite) != DONE:
            _say(f"factorizing {job.source}, rank {', '.join(map(str, job.ranks))}")
            if config.overwrite and factor_files.read_metadata(job.folder):
                shutil.rmtree(job.folder)
            job.run()
        _wait_for_all(str(job.folder if job not in to_train else job.run_dir))
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
