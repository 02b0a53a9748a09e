"""Turns settings into the jobs that they ask for, prerequisites first.

D comes first, then the factorization of its table, then the arms. `pcagpt.arms` says
what each arm takes from D. A run that copies all weights of another run needs no D.
"""

from pathlib import Path
from typing import NamedTuple

from pcagpt.arms import ARMS, FROM_RUN
from pcagpt.config import Settings, arms_of, validate
from pcagpt.config.schema import DistillSettings, InitSettings
from pcagpt.factorize import files
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run.build import DEVICE_KNOBS
from pcagpt.run.opened import Run

Job = TrainJob | FactorizeJob


class Plan(NamedTuple):
    """Jobs in the order they are done in, and names of the runs to report on."""

    jobs: tuple[Job, ...]
    reported: tuple[str, ...] = ()


def make_plan(settings: Settings) -> Plan:
    """The plan of a 'train', 'factorize' or 'experiment' task.

    Reads nothing but the settings and the record of the run in `init.weights_from`.

    Raises:
      UserError: that run does not exist, or is of another model than was asked for.
    """
    if settings.task == "factorize":
        source = Path(settings.model_path)
        return Plan((_factorize_job(settings, source, is_target=True),))
    if settings.task == "train":
        from_run = bool(settings.init.weights_from)
        return Plan((_job_from_run(settings),) if from_run else _run_jobs(settings))
    jobs = []
    for seed in settings.experiment.seeds or (settings.seed,):
        suffix = "" if seed == settings.seed else f"_seed{seed}"
        jobs += _experiment_jobs(settings.replace({"seed": seed}), suffix)
    runs = tuple(job.folder.name for job in jobs if isinstance(job, TrainJob))
    return Plan(tuple(jobs), runs)


def recovery_plan(settings: Settings, folder: Path) -> Plan:
    """The runs that train the best compressed models further, and D beside them.

    They train under D's settings, for the share of its budget in `finetune`.

    Args:
      settings: of task 'compress'; `compress.recover_ranks` says which models.
      folder: of the compressed models; the runs go there, too.
    """
    source = Run.open(settings.model_path)
    stored, own = source.settings, source.record.keys()
    taken = ("finetune", "distill", "evaluate", "checkpoint", "telemetry", "mesh")
    base = Settings().replace(
        {name: getattr(settings, name) for name in taken}
        | {f"model.{name}": getattr(settings.model, name) for name in DEVICE_KNOBS}
        | {
            "data": settings.data if settings.data.source else stored.data,
            "train": stored.train if "train" in own else settings.train,
            "seed": stored.seed if "seed" in own else settings.seed,
            "overwrite": settings.overwrite,
            "workdir": str(folder),
        }
    )
    base = base.replace({"data.cache_dir": str(settings.cache_dir)})
    run = str(source.folder)
    starts = [(run, "")]
    for rank in settings.compress.recover_ranks:
        starts += [(str(folder / f"best_k{rank}"), teacher) for teacher in ("", run)]
    return Plan(
        tuple(
            _job_from_run(
                base.replace({"init.weights_from": start, "distill.teacher": teacher})
            )
            for start, teacher in starts
        )
    )


def _experiment_jobs(settings: Settings, suffix: str) -> list[Job]:
    """D, its factorization and all arms at all ranks; the suffix names the seed."""
    settings = settings.replace({"task": "train"})
    baseline = _train_job(_baseline(settings), suffix, is_target=True)
    jobs = [
        baseline,
        _factorize_job(settings, baseline.folder, is_target=True, suffix=suffix),
    ]
    arms = arms_of(settings)
    if "continued" in arms:  # D, trained further: it has no rank.
        continued = _finished(_baseline(settings), "continued", suffix)
        jobs.append(_train_job(continued, suffix, is_target=True))
    for rank in settings.ranks:
        for arm in arms:
            if arm != "continued":
                ranked = settings.replace({"model.n_embd_wte": rank})
                if "factors" not in ARMS[arm].takes:
                    ranked = ranked.replace({"init": InitSettings()})
                ranked = _finished(ranked, arm, suffix)
                jobs.append(_train_job(ranked, suffix, is_target=True))
    return jobs


def _run_jobs(settings: Settings) -> tuple[Job, ...]:
    """One run, after everything that it needs."""
    arm, init, needed = ARMS[settings.arm], settings.init, []
    needs_factors = _starts_from_factors(settings) and not _imports_table(init)
    if (
        needs_factors
        or "weights" in arm.takes
        or ("blocks" in arm.takes and not init.blocks_from)
        or (arm.is_taught and not settings.distill.teacher)
    ):
        baseline = _train_job(_baseline(settings), "", is_target=False)
        needed.append(baseline)
        if needs_factors:
            one = settings.replace({"ranks": (settings.model.n_embd_wte,)})
            needed.append(_factorize_job(one, baseline.folder, is_target=False))
    run = _finished(settings, settings.arm, "")
    return (*needed, _train_job(run, "", is_target=True))


def _job_from_run(settings: Settings) -> TrainJob:
    """A run that copies the model and all weights of another run."""
    source = Run.open(settings.init.weights_from)
    free = (*DEVICE_KNOBS, "dropout")
    source.check_model(settings.model, free)
    settings = settings.replace({"model": source.model_settings(settings.model, free)})
    validate(settings)
    model = settings.model
    arm = "continued"
    if settings.distill.teacher:
        arm = "pca_distill"
    elif model.n_embd_wte is not None or model.band_sizes:
        arm = "pca_finetune"
    settings = _with_budget(settings.replace({"arm": arm}))
    name = FROM_RUN.format(arm=arm, source=source.folder.resolve().name)
    return TrainJob(Path(settings.workdir) / name, settings, is_target=True)


def _baseline(settings: Settings) -> Settings:
    """The settings of the D that belongs to an arm or an experiment."""
    return settings.replace(
        {
            "arm": "baseline",
            "distill": DistillSettings(),
            "init": InitSettings(),
            "model.n_embd_wte": None,
            "model.band_sizes": (),
            "model.band_ranks": (),
        }
    )


def _finished(settings: Settings, arm: str, suffix: str) -> Settings:
    """The settings of an arm: where it starts, and its share of the budget."""
    settings = settings.replace({"arm": arm})
    return _with_budget(settings.replace(_start(settings, suffix)))


def _with_budget(settings: Settings) -> Settings:
    """`train` is D's budget; the other arms get their declared share of it."""
    arm, train, share = ARMS[settings.arm], settings.train, settings.finetune
    changes, rate = {}, 1.0
    if arm.is_fine_tuned:
        rate = share.learning_rate_share
        changes = {
            "train.steps": max(1, round(train.steps * share.steps_share)),
            "train.warmup_steps": round(train.warmup_steps * share.steps_share),
        }
    elif "factors" in arm.takes:
        rate = settings.scratch.pca_learning_rate_share
    elif settings.arm == "random":
        rate = settings.scratch.random_learning_rate_share
    changes["train.learning_rate"] = train.learning_rate * rate
    return settings.replace(changes)


def _starts_from_factors(settings: Settings) -> bool:
    """The arm needs D's factors, or at least the shape of their bands."""
    has_bands = settings.arm == "random" and settings.factorize.bands > 1
    return has_bands or "factors" in ARMS[settings.arm].takes


def _imports_table(init: InitSettings) -> bool:
    """The person has said which table to start from."""
    return bool(
        init.import_wte_npy or init.import_scale_matrices_npz or init.import_bands
    )


def _start(settings: Settings, suffix: str) -> dict[str, str]:
    """Knobs that say what an arm takes from D, unless the person has set them."""
    arm, init = ARMS[settings.arm], settings.init
    workdir = Path(settings.workdir)
    baseline = str(workdir / (ARMS["baseline"].run_name + suffix))
    found = {}
    if _starts_from_factors(settings) and not _imports_table(init):
        folder = workdir / f"pca_factorized{suffix}"
        rank = settings.model.n_embd_wte
        if settings.factorize.bands > 1:
            found["init.import_bands"] = str(files.bands_path(folder, rank))
        else:
            scales = files.scale_path(folder, rank)
            found["init.import_wte_npy"] = str(files.table_path(folder, rank))
            found["init.import_scale_matrices_npz"] = str(scales)
    if arm.keep != "all":
        found["init.keep"] = arm.keep
    if settings.arm == "random" and (init.import_bands or "init.import_bands" in found):
        found["init.keep"] = "shape"
    if "blocks" in arm.takes and not init.blocks_from:
        found["init.blocks_from"] = baseline
    if "weights" in arm.takes:
        found["init.weights_from"] = baseline
    if arm.is_taught and not settings.distill.teacher:
        found["distill.teacher"] = baseline
    return found


def _train_job(settings: Settings, suffix: str, is_target: bool) -> TrainJob:
    model = settings.model
    rank = "-".join(map(str, model.band_ranks)) or model.n_embd_wte
    name = ARMS[settings.arm].run_name.format(rank=rank) + suffix
    return TrainJob(Path(settings.workdir) / name, settings, is_target)


def _factorize_job(
    settings: Settings, source: Path, is_target: bool, suffix: str = ""
) -> FactorizeJob:
    folder = Path(settings.workdir) / f"pca_factorized{suffix}"
    return FactorizeJob(source, folder, settings, is_target)
