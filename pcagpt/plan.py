"""From a config to the jobs it asks for, prerequisites first.

D, the baseline, comes first; its table is factorized. A starts from the factors with
random blocks, B from the factors with D's blocks, C from random factors. What goes on
from all the weights of a run needs nothing else.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt import factor_files
from pcagpt.arms import ARMS, FROM_RUN
from pcagpt.errors import UserError
from pcagpt.factorize_run import FactorizeJob
from pcagpt.train_run import TrainJob
from pcagpt.trained_run import DEVICE_CHOICES, TrainedRun

Job = TrainJob | FactorizeJob


class Plan(NamedTuple):
    """Jobs in the order of their making, and the runs to report on (or none)."""

    jobs: tuple[Job, ...]
    reported: tuple[str, ...] = ()


def make_plan(config: ConfigDict) -> Plan:
    """What a 'train', 'factorize' or 'experiment' config asks for.

    Looks at nothing but the config and, where it goes on from a run, that run's.

    Raises:
      UserError: the run to go on from is none, or of another model than was asked for.
    """
    if config.task == "factorize":
        source = Path(config.model_path)
        return Plan((_factorize_job(config, source, config.ranks, is_target=True),))
    if config.task == "train" and config.init.weights_from:
        return Plan((_job_from_run(config),))
    if config.task == "train":
        return Plan(_jobs_of_run(config))
    jobs = []
    for seed in config.experiment.seeds or (config.seed,):
        jobs += _jobs_of_experiment(
            config, seed, "" if seed == config.seed else f"_seed{seed}"
        )
    runs = tuple(job.folder.name for job in jobs if isinstance(job, TrainJob))
    return Plan(tuple(jobs), runs)


def _jobs_of_experiment(config: ConfigDict, seed: int, suffix: str) -> list[Job]:
    """All arms at all ranks, once; the suffix tells this seed's folders."""
    base = config.copy_and_resolve_references()
    base.seed, base.task = seed, "train"
    baseline = _train_job(_baseline(base), suffix, is_target=True)
    factors = _factorize_job(base, baseline.folder, base.ranks, True, suffix)
    arms = [
        _train_job(_arm(base, arm, rank, suffix), suffix, is_target=True)
        for rank in base.ranks
        for arm in ("pca", "random", "pca_finetune")
    ]
    return [baseline, factors, *arms]


def _jobs_of_run(config: ConfigDict) -> tuple[Job, ...]:
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
            needed.append(_factorize_job(config, baseline.folder, ranks, False))
        _import(config, "")
    _share_budget(config)
    return (*needed, _train_job(config, "", is_target=True))


def _job_from_run(config: ConfigDict) -> TrainJob:
    """A run that goes on from all weights of another, and is of its model."""
    config = config.copy_and_resolve_references()
    source = TrainedRun.find(config.init.weights_from)
    free = (*DEVICE_CHOICES, "dropout")
    source.check_model(config.model, free)
    config.model = source.model_section(config.model, free)
    knobs.validate(config)
    model = config.model
    is_factorized = model.n_embd_wte is not None or any(model.band_ranks)
    arm = "pca_finetune" if is_factorized else "baseline"
    if config.arm != arm:
        table = "factorized" if is_factorized else "full"
        raise UserError(
            f"the embedding of {source.run_dir} is {table}: to train it on, set "
            f"--config.arm={arm}"
        )
    _share_budget(config)
    name = FROM_RUN.format(arm=arm, source=source.run_dir.resolve().name)
    return TrainJob(Path(config.workdir) / name, config, is_target=True)


def _baseline(config: ConfigDict) -> ConfigDict:
    """The config of D that belongs to any arm's, or to an experiment's."""
    baseline = config.copy_and_resolve_references()
    baseline.arm, baseline.distill = "baseline", knobs.base().distill
    with baseline.ignore_type():
        baseline.model.n_embd_wte = None
    baseline.model.band_sizes = baseline.model.band_ranks = ()
    _clear(baseline.init)
    return baseline


def _arm(base: ConfigDict, arm: str, rank: int, suffix: str) -> ConfigDict:
    """The config of one arm of an experiment."""
    config = base.copy_and_resolve_references()
    config.arm, config.model.n_embd_wte = arm, rank
    _share_budget(config)
    if arm == "random":
        _clear(config.init)
    else:
        _import(config, suffix)
    return config


def _clear(init: ConfigDict) -> None:
    """Imports nothing."""
    for name, value in init.items():
        init[name] = type(value)()


def _share_budget(config: ConfigDict) -> None:
    """`train` is D's budget; what is fine-tuned gets its declared share of it."""
    if config.arm != "pca_finetune" and not config.init.weights_from:
        return
    train, share = config.train, config.finetune
    train.steps = max(1, round(train.steps * share.steps_share))
    train.warmup_steps = round(train.warmup_steps * share.steps_share)
    train.learning_rate *= share.learning_rate_share


def _import(config: ConfigDict, suffix: str) -> None:
    """Fills in what is imported where the person has not."""
    init = config.init
    if not (init.import_wte_npy or init.import_scale_matrices_npz):
        folder, rank = _factor_folder(config, suffix), config.model.n_embd_wte
        init.import_wte_npy = str(factor_files.table_path(folder, rank))
        init.import_scale_matrices_npz = str(factor_files.scale_path(folder, rank))
    if config.arm == "pca_finetune" and not init.blocks_from:
        name = ARMS["baseline"].run_name + suffix
        init.blocks_from = str(Path(config.workdir) / name)


def _train_job(config: ConfigDict, suffix: str, is_target: bool) -> TrainJob:
    rank = "-".join(map(str, config.model.band_ranks)) or config.model.n_embd_wte
    name = ARMS[config.arm].run_name.format(rank=rank) + suffix
    return TrainJob(Path(config.workdir) / name, config, is_target)


def _factor_folder(config: ConfigDict, suffix: str) -> Path:
    return Path(config.workdir) / f"pca_factorized{suffix}"


def _factorize_job(
    config: ConfigDict,
    source: Path,
    ranks: tuple[int, ...],
    is_target: bool,
    suffix: str = "",
) -> FactorizeJob:
    return FactorizeJob(
        source=source,
        folder=_factor_folder(config, suffix),
        ranks=tuple(ranks),
        method=config.factorize.method,
        singular_value_split=config.factorize.singular_value_split,
        statistics=config.factorize.statistics,
        tensorboard=config.telemetry.tensorboard,
        is_target=is_target,
        overwrite=config.overwrite,
    )
