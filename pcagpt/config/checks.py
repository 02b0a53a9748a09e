"""Checks that need nothing but the settings, and the lists inside text knobs."""

from collections.abc import Sequence
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.config.schema import (
    COMPRESS_BOUNDS,
    KNOBS,
    OF_A_RUN,
    OTHER_ARMS,
    Settings,
    override,
)
from pcagpt.errors import UserError


def ranks_of(text: str) -> tuple[int, ...]:
    """'64,128' -> (64, 128), for `configs/experiment.py:64,128`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"'{text}' is not a list of ranks: write positive whole numbers with "
            "commas between, as in configs/experiment.py:64,128"
        ) from None


def words_of(text: str) -> list[str]:
    """'kl, context' -> ['kl', 'context']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def arms_of(settings: Settings) -> list[str]:
    """The arms of an experiment besides D."""
    arms = words_of(settings.experiment.arms)
    for arm in arms:
        if arm not in OTHER_ARMS:
            raise UserError(
                f"experiment.arms holds '{arm}': it must be of {', '.join(OTHER_ARMS)} "
                "(D is always there)"
            )
    _check_distinct("experiment.arms", arms)
    return arms


def validate(settings: Settings) -> None:
    """Raises UserError for a value that cannot work on any machine or corpus."""
    for path, value in settings.flat().items():
        _check_value(path, value)
    model, train = settings.model, settings.train
    if model.n_embd % model.n_head:
        raise UserError(
            f"model.n_head = {model.n_head} does not divide model.n_embd = "
            f"{model.n_embd}: every head needs the same width"
        )
    if train.batch_size % train.accumulation:
        raise UserError(
            f"train.accumulation = {train.accumulation} does not divide "
            f"train.batch_size = {train.batch_size}"
        )
    _check_distinct("experiment.seeds", settings.experiment.seeds)
    _check_distinct("compress.recover_ranks", settings.compress.recover_ranks)
    arms_of(settings)
    _check_ranks(settings)
    _check_bands(settings)
    _check_table(settings)
    _check_weights_from(settings)
    _check_experiment(settings)
    _check_bounds(settings)
    if settings.task in OF_A_RUN and not settings.model_path:
        raise UserError(
            f"model_path is empty: name the run to {settings.task}, as in "
            "--config.model_path=checkpoints/gpt_baseline"
        )


def _check_value(path: str, value: Any) -> None:
    """Raises UserError if the rule of a knob does not hold for its value."""
    knob = KNOBS[path]
    if value is None:
        return
    entries = value if knob.type is tuple else (value,)
    if knob.type is tuple and any(type(entry) is not int for entry in entries):
        raise wrong_type(path, ",".join(map(str, value)))
    for entry in entries:
        if not knob.rule.holds(entry):
            verb = "holds" if knob.type is tuple else "is"
            shown = repr(entry) if isinstance(entry, str) else entry
            raise UserError(f"{path} {verb} {shown}: it must be {knob.rule.words}")


def wrong_type(path: str, seen: str) -> UserError:
    """The error for a knob that was given text of another type."""
    knob = KNOBS[path]
    wanted = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        tuple: "whole numbers with commas between",
        str: "text",
    }[knob.type]
    example = (64, 128) if knob.type is tuple else knob.default
    shown = "" if example is None else f", as in {override(path, example)}"
    return UserError(f"{path} is '{seen}': it must be {wanted}{shown}")


def _check_distinct(path: str, entries: Sequence[int | str]) -> None:
    if len(set(entries)) != len(entries):
        raise UserError(f"{path} is {tuple(entries)}: each may appear once")


def _check_ranks(settings: Settings) -> None:
    """Ranks must be given where a task needs them, and fit the width of the model."""
    model = settings.model
    if settings.task in ("factorize", "compress", "experiment"):
        if not settings.ranks:
            raise UserError("ranks is empty: give at least one, as in 64,128")
        _check_distinct("ranks", settings.ranks)
    for path, ranks in (
        ("model.n_embd_wte", (model.n_embd_wte,)),
        ("model.band_ranks", model.band_ranks),
        ("ranks", settings.ranks if settings.task == "experiment" else ()),
    ):
        for rank in ranks:
            if rank is not None and rank > model.n_embd:
                raise UserError(
                    f"{path} holds {rank}: a rank is a whole number from 1 to the "
                    f"model's width model.n_embd = {model.n_embd}"
                )


def _check_bands(settings: Settings) -> None:
    """Only the random model chooses its bands, and only in one way."""
    model, init = settings.model, settings.init
    if len(model.band_sizes) != len(model.band_ranks):
        raise UserError(
            f"model.band_sizes has {len(model.band_sizes)} entries and "
            f"model.band_ranks {len(model.band_ranks)}: give every band both"
        )
    is_random = (settings.task, settings.arm) == ("train", "random")
    if model.band_sizes and not is_random and not init.weights_from:
        raise UserError(
            "model.band_sizes is set: only the random model (configs/random_k128.py) "
            "can have several bands"
        )
    if model.band_sizes and (settings.factorize.bands > 1 or init.import_bands):
        factorized = settings.factorize.bands > 1
        other = "factorize.bands" if factorized else "init.import_bands"
        raise UserError(
            f"model.band_sizes is set beside {other}, which decides the bands: leave "
            "one of them out"
        )


def _check_table(settings: Settings) -> None:
    """D has a full table, every other arm a factorized one."""
    model, arm = settings.model, settings.arm
    if settings.task != "train" or settings.init.weights_from:
        return
    is_factorized = model.n_embd_wte is not None or bool(model.band_sizes)
    is_full = arm in ("baseline", "continued")
    if not is_full and not is_factorized:
        raise UserError(
            f"the {arm} model needs a rank, --config.model.n_embd_wte=128"
            + (
                ", or a compressed model, --config.init.weights_from=FOLDER"
                if "blocks" in ARMS[arm].takes
                else ""
            )
        )
    if is_full and is_factorized:
        raise UserError(
            f"model.n_embd_wte is {model.n_embd_wte}: the baseline's table is full; a "
            "factorized one is --config=configs/random_k128.py"
        )


def _check_weights_from(settings: Settings) -> None:
    """`init.weights_from` belongs to a fine-tuned arm and to no other import."""
    init, arm = settings.init, settings.arm
    if not init.weights_from or settings.task in OF_A_RUN:
        return
    is_fine_tuned = arm == "baseline" or ARMS[arm].is_fine_tuned
    if settings.task == "experiment" or not is_fine_tuned:
        what = "an experiment" if settings.task == "experiment" else f"arm {arm}"
        raise UserError(
            f"init.weights_from is set for {what}: a trained model is trained further "
            "by --config=configs/recover.py"
        )
    for path, value in settings.flat().items():
        is_other = path.startswith("init.") and path != "init.weights_from"
        if is_other and value != KNOBS[path].default:
            raise UserError(
                f"{path} is set beside init.weights_from, which copies every weight: "
                "leave one of them out"
            )


def _check_experiment(settings: Settings) -> None:
    """Some knobs belong to a single run and not to an experiment."""
    if settings.task != "experiment":
        return
    if settings.model.n_embd_wte is not None:
        rank = settings.model.n_embd_wte
        raise UserError(
            f"model.n_embd_wte is {rank}: an experiment's ranks are set by "
            f"--config.ranks={rank}"
        )
    if settings.init.import_bands:
        raise UserError(
            "init.import_bands is set: an experiment makes a table for each rank; give "
            "it to a single run, as in configs/pca_k128.py"
        )
    if settings.distill.teacher:
        raise UserError(
            "distill.teacher is set: an experiment chooses teachers by its arms; give "
            "it to a single run, as in configs/recover.py"
        )


def _check_bounds(settings: Settings) -> None:
    """`compress` finds a table for one bound, or sweeps and then trains."""
    compress = settings.compress
    bounds = [name for name in COMPRESS_BOUNDS if getattr(compress, name)]
    if len(bounds) > 1:
        raise UserError(
            f"compress.{bounds[0]} and compress.{bounds[1]} are both set: a table is "
            "found for one bound at a time"
        )
    if bounds and compress.recover_ranks:
        raise UserError(
            f"compress.recover_ranks is set beside compress.{bounds[0]}: train the "
            "found table with configs/recover.py"
        )
