"""From a config to the jobs it asks for, prerequisites first.

D, the baseline, comes first; its table is factorized. What each arm then starts from,
`pcagpt.arms` says. What goes on from all the weights of a run needs nothing else.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt.arms import ARMS, FROM_RUN
from pcagpt.factorize import files as factor_files
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run.opened import DEVICE_CHOICES, TrainedRun

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


def recovery_plan(config: ConfigDict, folder: Path) -> Plan:
    """What trains the best compressed models of `compress.recover_ranks` on, and D.

    Under what D was trained with; the share of its budget and the rest are `config`'s.

    Args:
      config: of task 'compress'.
      folder: where the compressed models are, and the runs go.
    """
    source = TrainedRun.find(config.model_path)
    run, base = str(source.run_dir), knobs.base()
    for section in ("finetune", "distill", "evaluate", "checkpoint", "telemetry"):
        base[section] = config[section]
    base.data = config.data if config.data.source else ConfigDict(source.record["data"])
    base.update({name: config[name] for name in ("mesh", "overwrite")})
    base.train.update(source.record.get("train", config.train))
    base.seed, base.workdir = source.record.get("seed", config.seed), str(folder)
    base.data.cache_dir = config.data.cache_dir or str(Path(config.workdir) / "data")
    for name in DEVICE_CHOICES:
        base.model[name] = config.model[name]
    jobs = [_job_from_run(_from_run(base, run, ""))]
    for rank in config.compress.recover_ranks:
        best = str(folder / f"best_k{rank}")
        for teacher in ("", run):
            jobs.append(_job_from_run(_from_run(base, best, teacher)))
    return Plan(tuple(jobs))


def _from_run(base: ConfigDict, source: str, teacher: str) -> ConfigDict:
    config = base.copy_and_resolve_references()
    config.init.weights_from, config.distill.teacher = source, teacher
    return config


def _jobs_of_experiment(config: ConfigDict, seed: int, suffix: str) -> list[Job]:
    """D, and all arms at all ranks, once; the suffix tells this seed's folders."""
    base = config.copy_and_resolve_references()
    base.seed, base.task = seed, "train"
    baseline = _train_job(_baseline(base), suffix, is_target=True)
    factors = _factorize_job(base, baseline.folder, base.ranks, True, suffix)
    jobs, arms = [baseline, factors], knobs.arms_of(config)
    if "continued" in arms:
        arms.remove("continued")
        jobs.append(_train_job(_arm(base, "continued", None, suffix), suffix, True))
    for rank in base.ranks:
        jobs += [
            _train_job(_arm(base, arm, rank, suffix), suffix, is_target=True)
            for arm in arms
        ]
    return jobs


def _jobs_of_run(config: ConfigDict) -> tuple[Job, ...]:
    """A single run after whatever it needs."""
    config, needed = config.copy_and_resolve_references(), []
    arm, init = ARMS[config.arm], config.init
    wants_factors = _starts_from_factors(config) and not _imports_table(init)
    wants_baseline = (
        wants_factors
        or "weights" in arm.takes
        or ("blocks" in arm.takes and not init.blocks_from)
        or (arm.is_taught and not config.distill.teacher)
    )
    if wants_baseline:
        baseline = _train_job(_baseline(config), "", is_target=False)
        needed.append(baseline)
    if wants_factors:
        ranks = (config.model.n_embd_wte,)
        needed.append(_factorize_job(config, baseline.folder, ranks, False))
    _take(config, "")
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
    config.arm = "continued"
    if config.distill.teacher:
        config.arm = "pca_distill"
    elif model.n_embd_wte is not None or model.band_sizes:
        config.arm = "pca_finetune"
    _share_budget(config)
    name = FROM_RUN.format(arm=config.arm, source=source.run_dir.resolve().name)
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


def _arm(base: ConfigDict, arm: str, rank: int | None, suffix: str) -> ConfigDict:
    """The config of one arm of an experiment."""
    if arm == "continued":
        config = _baseline(base)
    else:
        config = base.copy_and_resolve_references()
        config.model.n_embd_wte = rank
    if "factors" not in ARMS[arm].takes:
        _clear(config.init)
    config.arm = arm
    _take(config, suffix)
    _share_budget(config)
    return config


def _clear(init: ConfigDict) -> None:
    """Imports nothing."""
    init.update(knobs.base().init)


def _share_budget(config: ConfigDict) -> None:
    """`train` is D's budget; what is not D gets its declared share of it."""
    arm, train, share = ARMS[config.arm], config.train, config.finetune
    if arm.is_fine_tuned:
        train.steps = max(1, round(train.steps * share.steps_share))
        train.warmup_steps = round(train.warmup_steps * share.steps_share)
        train.learning_rate *= share.learning_rate_share
    elif "factors" in arm.takes:
        train.learning_rate *= config.scratch.pca_learning_rate_share
    elif config.arm == "random":
        train.learning_rate *= config.scratch.random_learning_rate_share


def _starts_from_factors(config: ConfigDict) -> bool:
    """Whether it takes D's factors, or at least the shape of their bands."""
    in_bands = config.arm == "random" and config.factorize.bands > 1
    return in_bands or "factors" in ARMS[config.arm].takes


def _imports_table(init: ConfigDict) -> bool:
    """Whether the person has said what table to start from."""
    return bool(
        init.import_wte_npy or init.import_scale_matrices_npz or init.import_bands
    )


def _take(config: ConfigDict, suffix: str) -> None:
    """Fills in what is taken from D where the person has not."""
    arm, init = ARMS[config.arm], config.init
    baseline = str(Path(config.workdir) / (ARMS["baseline"].run_name + suffix))
    if _starts_from_factors(config) and not _imports_table(init):
        folder, rank = _factor_folder(config, suffix), config.model.n_embd_wte
        if config.factorize.bands > 1:
            init.import_bands = str(factor_files.bands_path(folder, rank))
        else:
            init.import_wte_npy = str(factor_files.table_path(folder, rank))
            init.import_scale_matrices_npz = str(factor_files.scale_path(folder, rank))
    if arm.keep != "all":
        init.keep = arm.keep
    if config.arm == "random" and init.import_bands:
        init.keep = "shape"
    if "blocks" in arm.takes and not init.blocks_from:
        init.blocks_from = baseline
    if "weights" in arm.takes:
        init.weights_from = baseline
    if arm.is_taught and not config.distill.teacher:
        config.distill.teacher = baseline


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
        config=config,
        is_target=is_target,
    )
