"""Rules between knobs, and the lists inside text knobs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.config.knobs import LARGEST_NUMBER, LARGEST_WHOLE
from pcagpt.config.schema import (
    KNOBS,
    OTHER_ARMS,
    InitSettings,
    ModelSettings,
    Settings,
    override,
)
from pcagpt.config.tasks import TASKS, readers_of
from pcagpt.errors import UserError
from pcagpt.methods import CODES, METHODS, RIVALS

# Each of these groups of knobs determines the token table or its bands.
_TABLE_SOURCES = (
    ("model.band_sizes",),
    tuple(path for path in KNOBS if path.startswith("factorize.")),
    ("init.import_bands",),
    ("init.import_wte_npy", "init.import_scale_matrices_npz"),
    ("init.weights_from",),
)


def ranks_of(text: str) -> tuple[int, ...]:
    """'64,128' -> (64, 128), for `configs/experiment.py:64,128`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"'{text}' is not a list of ranks: separate whole numbers by commas, "
            "as in configs/experiment.py:64,128"
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
                f"experiment.arms holds '{arm}': the arms besides D are "
                f"{', '.join(OTHER_ARMS)}"
            )
    _check_distinct("experiment.arms", arms)
    return arms


def methods_of(text: str) -> list[str]:
    """The names in `compress.methods`; 'all' stands for every method."""
    known = [*METHODS, *CODES, *RIVALS]
    methods = known if text == "all" else words_of(text)
    if not methods or set(methods) - set(known):
        raise UserError(
            f"compress.methods is '{text}': it must be all, or some of "
            f"{', '.join(known)}"
        )
    _check_distinct("compress.methods", methods)
    return methods


def check_rules(settings: Settings, knows_sizes: bool = True) -> None:
    """Raises UserError for a value that cannot work on any machine or corpus.

    Without `knows_sizes`, a model that is not opened yet decides the sizes that are not
    given: those that are given are not compared with defaults.
    """
    for path, value in settings.flat().items():
        _check_value(path, value)
    if not settings.workdir:
        raise UserError(
            "workdir is empty: give --config.workdir=FOLDER; . is the current folder"
        )
    train = settings.train
    if knows_sizes:
        _check_sizes(settings.model)
        _check_widths(settings)
    if train.batch_size % train.accumulation:
        raise UserError(
            f"train.accumulation = {train.accumulation} does not divide "
            f"train.batch_size = {train.batch_size}"
        )
    _check_distinct("experiment.seeds", settings.experiment.seeds)
    for name in ("bands", "bits", "recover_ranks"):
        _check_distinct(f"compress.{name}", getattr(settings.compress, name))
    arms_of(settings)
    if settings.compress.methods:
        methods_of(settings.compress.methods)
    _check_ranks(settings)
    _check_weights_from(settings)
    _check_model_path(settings)
    _check_bands(settings)
    _check_table(settings)
    _check_imports(settings)
    _check_bounds(settings)
    if TASKS[settings.task].model and not settings.model_path:
        raise UserError(
            f"model_path is empty: name the run to {settings.task}, as in "
            "--config.model_path=checkpoints/gpt_baseline"
        )


def check_stored(record: Mapping[str, Any], problem: str, remedy: str) -> None:
    """Raises UserError if a knob in a run's record has a wrong type.

    Sizes of the model must also follow their rules. Other knobs may have values of an
    older version. `problem` begins the message, `remedy` ends it.
    """
    for path, knob in KNOBS.items():
        holder, _, name = path.rpartition(".")
        section = record.get(holder, {}) if holder else record
        if not isinstance(section, Mapping):
            raise UserError(f"{problem} ('{holder}' is not a section): {remedy}")
        value = section.get(name, knob.default)
        fits = {
            tuple: isinstance(value, (list, tuple)),
            float: type(value) in (int, float),
        }.get(knob.type, type(value) is knob.type)
        if not (fits or (value is None and knob.default is None)):
            raise UserError(f"{problem} ('{path}' is {value!r:.40}): {remedy}")
    stored = Settings.of(record)
    try:
        for path, value in stored.flat().items():
            if path.startswith("model.") and KNOBS[path].type is not str:
                _check_value(path, value)
        _check_sizes(stored.model)
    except UserError as error:
        raise UserError(f"{problem} ({error}): {remedy}") from None


def _check_sizes(model: ModelSettings) -> None:
    """Heads share the width, and every band has a size and a rank."""
    if model.n_embd % model.n_head:
        raise UserError(
            f"model.n_head = {model.n_head} does not divide model.n_embd = "
            f"{model.n_embd}: every head needs the same width"
        )
    if len(model.band_sizes) != len(model.band_ranks):
        raise UserError(
            f"model.band_sizes has {len(model.band_sizes)} entries and "
            f"model.band_ranks {len(model.band_ranks)}: give every band both"
        )


def _check_value(path: str, value: Any) -> None:
    """Raises UserError if the rule of a knob does not hold for its value."""
    knob = KNOBS[path]
    if value is None:
        return
    entries = value if knob.type is tuple else (value,)
    if knob.type is tuple and any(type(entry) is not int for entry in entries):
        raise wrong_type(path, ",".join(map(str, value)))
    verb = "holds" if knob.type is tuple else "is"
    for entry in entries:
        shown = repr(entry) if isinstance(entry, str) else entry
        if not knob.rule.holds(entry):
            words = knob.rule.words
            if isinstance(entry, float) and not math.isfinite(entry):
                words = f"finite and {words}"
            raise UserError(f"{path} {verb} {shown}: it must be {words}")
        largest = LARGEST_NUMBER if knob.type is float else LARGEST_WHOLE
        if knob.type in (int, float, tuple) and entry > largest:
            raise UserError(f"{path} {verb} {shown}: the largest is {largest}")


# Of knobs whose default says nothing.
_EXAMPLES = {
    "compress.bands": (1, 7),
    "compress.recover_ranks": (64, 128),
    "compress.max_bytes": 1_000_000,
    "compress.max_params": 1_000_000,
    "compress.max_added_loss": 0.01,
    "model.band_ranks": (256, 64),
    "model.band_sizes": (8192, 42065),
    "ranks": (64, 128),
    "sample.prompt": "TEXT",
}


def wrong_type(path: str, seen: object) -> UserError:
    """The error for a knob that got a value (`seen`) of the wrong type."""
    knob = KNOBS[path]
    wanted = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        tuple: "whole numbers separated by commas",
        str: "text",
    }[knob.type]
    other = {tuple: (64, 128), str: "NAME"}.get(knob.type, knob.default)
    example = knob.default or _EXAMPLES.get(path, other)
    shown = "" if example is None else f", as in {override(path, example)}"
    return UserError(f"{path} is {seen!r}: it must be {wanted}{shown}")


def _check_distinct(path: str, entries: Sequence[int | str]) -> None:
    if len(set(entries)) != len(entries):
        raise UserError(f"{path} is {tuple(entries)}: each may appear once")


def _check_ranks(settings: Settings) -> None:
    """Some tasks need ranks."""
    if TASKS[settings.task].ranks:
        if not settings.ranks and settings.task != "compress":  # See `effort`.
            raise UserError("ranks is empty: give at least one, as in 64,128")
        _check_distinct("ranks", settings.ranks)


def _check_widths(settings: Settings) -> None:
    """No rank exceeds the width of the model."""
    model = settings.model
    rank = 0 if model.band_sizes else model.n_embd_wte or 0  # Bands have their own.
    for path, ranks in (
        ("model.n_embd_wte", (rank,)),
        ("model.band_ranks", model.band_ranks),
        ("ranks", settings.ranks if settings.task == "experiment" else ()),
    ):
        highest = max(ranks, default=0)
        if highest > model.n_embd:
            raise UserError(
                f"{path} holds {highest}: a rank is at most the model's width, "
                f"model.n_embd = {model.n_embd}"
            )


def _check_bands(settings: Settings) -> None:
    """Only the random model has own bands; at most one of `_TABLE_SOURCES` is set."""
    is_random = (settings.task, settings.arm) == ("train", "random")
    has_source = bool(settings.init.weights_from)
    if settings.model.band_sizes and not is_random and not has_source:
        raise UserError(
            "model.band_sizes is set: only the random model (configs/random_k128.py) "
            "can have several bands"
        )
    given = settings.given
    if has_source:  # The bands are those of this run.
        given.discard("model.band_sizes")
    found = [[path for path in knobs if path in given] for knobs in _TABLE_SOURCES]
    if len(both := [paths[0] for paths in found if paths]) > 1:
        raise UserError(
            f"{both[0]} and {both[1]} are both set, but both determine the token "
            "table: leave one out"
        )


def _check_table(settings: Settings) -> None:
    """D has a full table, every other arm a factorized one."""
    model, arm, takes = settings.model, settings.arm, ARMS[settings.arm].takes
    if settings.task != "train" or settings.init.weights_from:
        return
    is_full = arm == "baseline" or "weights" in takes
    if not is_full and not model.is_factorized:
        run = "a run to start from, --config.init.weights_from=RUN, or "
        raise UserError(
            f"the {arm} model needs {run if 'blocks' in takes else ''}a rank, "
            "--config.model.n_embd_wte=128"
        )
    if is_full and model.is_factorized:
        raise UserError(
            f"model.n_embd_wte is {model.n_embd_wte}, but D has a full table: train a "
            "factorized one with --config=configs/random_k128.py"
        )


def _check_weights_from(settings: Settings) -> None:
    """Only fine-tuned arms take `init.weights_from`, which excludes other imports."""
    arm = settings.arm
    if settings.task != "train" or not settings.init.weights_from:
        return
    if arm != "baseline" and not ARMS[arm].is_fine_tuned:
        raise UserError(
            f"init.weights_from is set for arm {arm}: train a run further with "
            "--config=configs/recover.py"
        )
    others = InitSettings(weights_from=settings.init.weights_from)
    for name, default in dataclasses.asdict(others).items():
        if getattr(settings.init, name) != default:
            raise UserError(
                f"init.{name} is set beside init.weights_from, which copies every "
                "weight: leave one of them out"
            )


def _check_model_path(settings: Settings) -> None:
    """D itself starts at random, and a run that copies another one needs no D."""
    if settings.task != "train" or not settings.model_path:
        return
    if settings.init.weights_from or settings.arm == "baseline":
        reason = (
            "init.weights_from already names the run to start from: leave it out"
            if settings.init.weights_from
            else "the baseline model starts at random: train a model further with "
            "--config=configs/recover.py --config.init.weights_from="
            f"{settings.model_path}"
        )
        raise UserError(f"model_path is {settings.model_path}, but {reason}")


def _check_imports(settings: Settings) -> None:
    """An arm takes from other runs only what `ARMS` says."""
    init, flat, names = settings.init, settings.flat(), trained_arms(settings)
    if init.weights_from:
        return
    arms = [ARMS[name] for name in names]
    has_bands = bool(init.import_bands) or settings.factorize.bands > 1
    needs_bands = any(arm.needs_factors(has_bands) for arm in arms)
    takes_factors = any("factors" in arm.takes for arm in arms)
    a, b = "--config=configs/pca_k128.py", "--config=configs/pca_finetune_k128.py"
    taught = "--config.arm=pca_distill, or configs/recover.py"
    for path, is_taken, remedy in (
        ("init.import_wte_npy", takes_factors, a),
        ("init.import_scale_matrices_npz", takes_factors, a),
        ("init.import_wte_freeze", takes_factors, a),
        ("init.import_scale_matrices_freeze", takes_factors, a),
        ("init.import_bands", needs_bands, a),
        ("init.blocks_from", any("blocks" in arm.takes for arm in arms), b),
        ("distill.teacher", any(arm.is_taught for arm in arms), taught),
    ):
        if flat[path] and not is_taken and settings.task in readers_of(path)[0]:
            raise UserError(
                f"{path} is set, but the {', '.join(names)} model does not read it: "
                f"use {remedy}"
            )
    if settings.task != "train":
        return
    arm = ARMS[settings.arm]
    kept = "shape" if has_bands and arm.has_bands_of_a else arm.keep
    if init.keep not in ("all", kept):
        controls = (name for name, other in ARMS.items() if other.keep == init.keep)
        remedy = f"use --config.arm={next(controls, 'random with init.import_bands')}"
        raise UserError(
            f"init.keep is '{init.keep}', but the {settings.arm} model has another "
            f"definition: {remedy}"
        )


def trained_arms(settings: Settings) -> list[str]:
    """The arms that a command trains, without the D of an experiment."""
    return arms_of(settings) if settings.task == "experiment" else [settings.arm]


def _check_bounds(settings: Settings) -> None:
    """`compress` finds a table for one bound, or sweeps and then trains.

    It chooses what to find or to train on the validation split only.
    """
    compress = settings.compress
    bounds = list(compress.bounds)
    if len(bounds) > 1:
        raise UserError(
            f"compress.{bounds[0]} and compress.{bounds[1]} are both set: give one"
        )
    methods = set(methods_of(compress.methods or "all"))
    if bounds and methods <= RIVALS.keys():
        raise UserError(
            f"compress.{bounds[0]} is set, but tables of {compress.methods} alone are "
            f"only for comparison: add {', '.join(CODES)} or a method that makes "
            "factors to compress.methods"
        )
    if compress.max_params and not methods & METHODS.keys():
        raise UserError(
            f"compress.max_params is set, but {' and '.join(CODES)} tables have as "
            "many numbers as D's table: add a method that makes factors to "
            "compress.methods"
        )
    if bounds and compress.recover_ranks:
        raise UserError(
            f"compress.recover_ranks is set beside compress.{bounds[0]}: train the "
            "table that it finds with configs/recover.py"
        )
    chosen = [*bounds, *(["recover_ranks"] if compress.recover_ranks else [])]
    if settings.task == "compress" and settings.split != "val" and chosen:
        raise UserError(
            f"compress.{chosen[0]} chooses a table, but split is {settings.split}: "
            "leave split out, then measure the model with --config=configs/evaluate.py "
            f"{override('split', settings.split)}"
        )
