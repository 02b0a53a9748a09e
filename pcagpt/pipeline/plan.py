"""Turns settings into jobs, prerequisites first.

D comes first, then the factorization of its table, then the arms. `pcagpt.arms` says
what each arm takes from D. A run from `init.weights_from` needs no D.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pcagpt.arms import ARMS, FROM_RUN, arm_from_run
from pcagpt.compression.table_files import undamaged
from pcagpt.config import Settings, arms_of, check_rules
from pcagpt.config.schema import (
    DataSettings,
    DistillSettings,
    FactorizeSettings,
    FinetuneSettings,
    InitSettings,
    ModelSettings,
    ScratchSettings,
)
from pcagpt.errors import Unreadable, UserError
from pcagpt.factorization import factor_files
from pcagpt.model import DEVICE_KNOBS, TABLE_KNOBS
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.job import Job
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run import foreign
from pcagpt.run.trained import Run


class Plan(NamedTuple):
    """Jobs in the order in which they run, and what to report on.

    settings: those that the plan was made from; reported: the runs' folders in the
    workdir; factors: the factorization's; baseline: a finished D elsewhere, with which
    the runs will be compared; start: the folder of the D that a single arm starts from.
    """

    settings: Settings
    jobs: tuple[Job, ...]
    reported: tuple[str, ...] = ()
    factors: str = ""
    baseline: Path | None = None
    start: Path | None = None


def make_plan(settings: Settings) -> Plan:
    """The plan of a 'train', 'factorize' or 'experiment' task.

    Besides the settings, it reads only the records of the run in `init.weights_from` or
    `model_path`, and of its teacher.

    Raises:
      UserError: that run does not exist or contradicts the `model` knobs, or nothing
        says that the teacher knows its tokens.
    """
    if settings.model_path:  # It may name the file of a model, such as a ckpt.pt.
        place = foreign.place_of(Path(settings.model_path))
        settings = settings.replace({"model_path": str(place)})
    if settings.task == "factorize":
        return Plan(settings, (_factorize_job(settings, Path(settings.model_path)),))
    if settings.task == "train":
        if settings.init.weights_from:
            return Plan(settings, (_job_from_run(settings),))
        return _plan_of_run(settings)
    if settings.task != "experiment":
        raise ValueError(f"no plan for the task {settings.task}")
    jobs = []
    for seed in settings.experiment.seeds or (settings.seed,):
        suffix = "" if seed == settings.seed else f"_seed{seed}"
        jobs += _jobs_of_experiment(settings.replace({"seed": seed}), suffix)
    runs = tuple(job.folder.name for job in jobs if isinstance(job, TrainJob))
    made = [job.folder.name for job in jobs if isinstance(job, FactorizeJob)]
    # The report shows one seed's spectrum.
    return Plan(settings, tuple(jobs), runs, made[0])


def recovery_plan(settings: Settings, folder: Path, models: Iterable[Path]) -> Plan:
    """The runs in a folder that train D and compressed models of it further.

    They use D's settings, including dropout, and the share of D's budget that
    `finetune` gives. `train.loss_chunks` only concerns memory and stays as it was
    given. Each model is trained twice: on the text and on D's predictions.

    Raises:
      UserError: `settings` has another value for a knob that D itself determines.
    """
    baseline = Run.open(settings.model_path)
    stored, known = baseline.settings, baseline.record.keys()
    _check_own_budget(settings, baseline)
    base = settings.replace(
        {
            "task": "train",
            "arm": "baseline",
            "model_path": "",
            "workdir": str(folder),
            "data": baseline.data(settings.data),
            "data.cache_dir": str(settings.cache_dir),
            "train": stored.train if "train" in known else settings.train,
            "train.loss_chunks": settings.train.loss_chunks,
            "model.dropout": stored.model.dropout,
            "seed": stored.seed if "seed" in known else settings.seed,
            "factorize": FactorizeSettings(),
        }
    )
    run = str(baseline.folder)
    starts = [(run, "")]
    for model in models:
        starts += [(str(model), teacher) for teacher in ("", run)]
    jobs = []
    for start, teacher in starts:
        chosen = {"init": InitSettings(weights_from=start), "distill.teacher": teacher}
        jobs.append(_job_from_run(base.replace(chosen)))
    return Plan(base, tuple(jobs), baseline=baseline.folder)


def _check_own_budget(settings: Settings, baseline: Run) -> None:
    """Raises UserError for `train` knobs and a seed that differ from D's own."""
    given, own = settings.given, baseline.settings.flat()
    for path, value in settings.flat().items():
        section, _, name = path.partition(".")
        is_own = section in ("train", "seed") and section in baseline.record
        # The statistics and the memory of this command depend on these two.
        if not is_own or name in ("batch_size", "loss_chunks"):
            continue
        if path in given and value != own[path]:
            raise UserError(
                f"{path} is {value}, but {baseline.folder} is trained further with its "
                f"own value {own[path]}: leave it out; finetune.steps_share and "
                "finetune.learning_rate_share change the budget"
            )


def _jobs_of_experiment(settings: Settings, suffix: str) -> list[Job]:
    """D, its factorization and all arms at all ranks; the suffix names the seed."""
    settings, arms = settings.replace({"task": "train"}), arms_of(settings)
    baseline = _train_job(_full(settings), "baseline", suffix=suffix)
    jobs = [baseline, _factorize_job(settings, baseline.folder, suffix=suffix)]
    # An arm that takes all weights of D has a full table and no rank.
    whole = [arm for arm in arms if "weights" in ARMS[arm].takes]
    jobs += [_train_job(_full(settings), arm, suffix=suffix) for arm in whole]
    for rank in settings.ranks:
        for arm in arms:
            if arm in whole:
                continue
            ranked = settings.replace({"model.n_embd_wte": rank})
            if "factors" not in ARMS[arm].takes:
                ranked = ranked.replace({"init": InitSettings()})
            jobs.append(_train_job(ranked, arm, suffix=suffix))
    return jobs


def _plan_of_run(settings: Settings) -> Plan:
    """One run, with its prerequisites before it; D may be given as `model_path`."""
    if settings.model_path:
        settings = _like_baseline(settings)
    run, source = _train_job(settings, settings.arm), Path(_baseline(settings))
    taken = _taken_from_baseline(settings, settings.arm)
    if not taken:
        return Plan(settings, (run,))
    before: list[Job] = []
    if not settings.model_path:
        before.append(_train_job(_full(settings), "baseline", for_arm=settings.arm))
    if any(knob.startswith("init.import_") for knob in taken):
        one_rank = settings.replace({"ranks": (settings.model.n_embd_wte,)})
        before.append(_factorize_job(one_rank, source, is_target=False))
    return Plan(settings, (*before, run), start=source)


def _like_baseline(settings: Settings) -> Settings:
    """The settings with the sizes of the D in `model_path`, and its tokenizer."""
    source = Run.open(settings.model_path)
    free = (*DEVICE_KNOBS, *TABLE_KNOBS, "dropout")
    source.check_model(settings, free)
    model = source.model_settings(settings.model, free)
    sizes = {"model": model, "model.vocab_size": source.record["vocab_size"]}
    data = _data_for(source, settings)
    settings = settings.replace({**sizes, "data": data})
    check_rules(settings)
    return settings


def _data_for(source: Run, settings: Settings) -> DataSettings:
    """The `data` settings: a text gets the tokenizer of the run if none is asked for.

    That tokenizer tells nothing of a teacher, so UserError if the teacher has none.
    """
    data, asked = source.tokens.with_tokenizer(settings.data), settings.data.tokenizer
    is_given, path = data.tokenizer != asked, settings.distill.teacher
    # If it is gone or damaged, its job says so.
    if is_given and path and (teacher := undamaged(lambda: Run.open(path))):
        teacher.tokens.check_is_told_beside(source.tokens, asked)
    return data


def _baseline(settings: Settings, suffix: str = "") -> str:
    """Where D is."""
    in_workdir = Path(settings.workdir) / (ARMS["baseline"].run_name + suffix)
    return settings.model_path or str(in_workdir)


def _job_from_run(settings: Settings) -> TrainJob:
    """A run that copies the model and all weights of another run."""
    try:
        source = Run.open(settings.init.weights_from)
    except Unreadable:
        raise
    except UserError as error:
        raise UserError(f"init.weights_from: {error}") from None
    free = (*DEVICE_KNOBS, "dropout")
    source.check_model(settings, free)
    model = source.model_settings(settings.model, free)
    data = _data_for(source, settings)
    settings = settings.replace({"model": model, "data": data})
    check_rules(settings)
    # The table of a coded model has full width.
    is_compressed = settings.model.is_factorized or "compressed" in source.record
    arm = arm_from_run(is_compressed, bool(settings.distill.teacher))
    settings = settings.replace({"arm": arm, **_budget(settings, arm)})
    name = FROM_RUN.format(arm=arm, source=source.folder.resolve().name)
    return TrainJob(Path(settings.workdir) / name, settings, is_target=True)


def _train_job(
    settings: Settings, arm: str, *, suffix: str = "", for_arm: str = ""
) -> TrainJob:
    """The run of an arm, with what it takes from D and its share of D's budget.

    for_arm: the arm that needs this run first.
    """
    if settings.model.band_sizes:  # These were made for no rank.
        settings = settings.replace({"model.n_embd_wte": None})
    if not settings.model.is_factorized:  # A full table has no scale matrices to tie.
        ties = ModelSettings().n_embd_wte_scale_tying
        settings = settings.replace({"model.n_embd_wte_scale_tying": ties})
    taken, keep = _taken_from_baseline(settings, arm, suffix), ARMS[arm].keep
    if ARMS[arm].has_bands_of_a:
        bands = taken.get("init.import_bands", settings.init.import_bands)
        keep = "shape" if bands else keep
    taken["init.keep"] = keep
    settings = settings.replace({"arm": arm, **taken, **_budget(settings, arm)})
    if arm == "baseline":  # No share applies to D, so its record shows none of them.
        own = {"finetune": FinetuneSettings(), "scratch": ScratchSettings()}
        settings = settings.replace(own)
    model = settings.model
    rank = "-".join(map(str, model.band_ranks)) or model.n_embd_wte
    name = ARMS[arm].run_name.format(rank=rank) + suffix
    return TrainJob(Path(settings.workdir) / name, settings, not for_arm, for_arm)


def _factorize_job(
    settings: Settings, source: Path, *, suffix: str = "", is_target: bool = True
) -> FactorizeJob:
    folder = Path(settings.workdir) / f"{factor_files.FOLDER}{suffix}"
    return FactorizeJob(folder, settings, is_target, source)


def _full(settings: Settings) -> Settings:
    """The settings with a full table, and without imports and teacher."""
    return settings.replace(
        {
            "distill": DistillSettings(),
            "init": InitSettings(),
            "model.n_embd_wte": None,
            "model.band_sizes": (),
            "model.band_ranks": (),
        }
    )


def _taken_from_baseline(
    settings: Settings, arm: str, suffix: str = ""
) -> dict[str, str]:
    """{knob: path} of what an arm takes from D and the settings do not name."""
    takes, init = ARMS[arm].takes, settings.init
    workdir, bands = Path(settings.workdir), settings.factorize.bands
    baseline = _baseline(settings, suffix)
    has_factors = (
        init.import_wte_npy or init.import_scale_matrices_npz or init.import_bands
    )
    taken = {}
    if ARMS[arm].needs_factors(bands > 1) and not has_factors:
        folder = workdir / f"{factor_files.FOLDER}{suffix}"
        rank = settings.model.n_embd_wte
        if bands > 1:
            taken["init.import_bands"] = str(factor_files.bands_path(folder, rank))
        else:
            scales = str(factor_files.scale_path(folder, rank))
            taken["init.import_wte_npy"] = str(factor_files.table_path(folder, rank))
            taken["init.import_scale_matrices_npz"] = scales
    if "blocks" in takes and not init.blocks_from:
        taken["init.blocks_from"] = baseline
    if "weights" in takes:
        taken["init.weights_from"] = baseline
    if ARMS[arm].is_taught and not settings.distill.teacher:
        taken["distill.teacher"] = baseline
    return taken


def _budget(settings: Settings, arm: str) -> dict[str, float]:
    """{knob: value} of an arm's share of D's budget (`train`)."""
    train, share, knob = settings.train, settings.finetune, ARMS[arm].rate_share
    rate = settings.flat()[knob] if knob else 1.0
    changes = {"train.learning_rate": train.learning_rate * rate}
    if ARMS[arm].is_fine_tuned:
        changes |= {
            "train.steps": max(1, round(train.steps * share.steps_share)),
            "train.warmup_steps": round(train.warmup_steps * share.steps_share),
        }
    return changes
