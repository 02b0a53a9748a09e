"""The checks that need only the config, and what its words mean."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pcagpt.arms import ARMS
from pcagpt.config.schema import COMPRESS_BOUNDS, KNOBS, OF_A_RUN, flat, override
from pcagpt.errors import UserError


def ranks_of(text: str) -> tuple[int, ...]:
    """'64,128' -> (64, 128), the argument of `configs/experiment.py:64,128`."""
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


def arms_of(config: ConfigDict) -> list[str]:
    """The arms of an experiment besides D."""
    arms = words_of(config.experiment.arms)
    for arm in arms:
        if arm == "baseline" or arm not in ARMS:
            raise UserError(
                f"experiment.arms holds '{arm}': besides D, which is always there, it "
                f"must be of {', '.join(arm for arm in ARMS if arm != 'baseline')}"
            )
    _check_distinct("experiment.arms", arms)
    return arms


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value that could not work on any machine or corpus."""
    for path, value in flat(config).items():
        _check_alone(path, value)
    model, train = config.model, config.train
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
    _check_ranks(config)
    _check_weights_from(config)
    if config.init.import_bands and config.task == "experiment":
        raise UserError(
            "init.import_bands is set: an experiment makes a table of its own for each "
            "rank; give it to a single run, as configs/pca_k128.py does"
        )
    if config.distill.teacher and config.task == "experiment":
        raise UserError(
            "distill.teacher is set: the models of an experiment are compared without "
            "one; give it to a single run, as configs/recover.py does"
        )
    _check_distinct("experiment.seeds", config.experiment.seeds)
    _check_distinct("compress.recover_ranks", config.compress.recover_ranks)
    arms_of(config)
    bounds = [name for name in COMPRESS_BOUNDS if config.compress[name]]
    if len(bounds) > 1:
        raise UserError(
            f"compress.{bounds[0]} and compress.{bounds[1]} are both set: a table is "
            "found for one bound at a time"
        )
    if bounds and config.compress.recover_ranks:
        raise UserError(
            f"compress.recover_ranks is set beside compress.{bounds[0]}: train the "
            "table that is found on by configs/recover.py"
        )
    if config.task in OF_A_RUN and not config.model_path:
        raise UserError(
            f"model_path is empty: name the run to {config.task}, as in "
            "--config.model_path=checkpoints/gpt_baseline"
        )


def _check_alone(path: str, value: Any) -> None:
    """What a knob's value must be whatever the others are."""
    knob = KNOBS[path]
    if value is None:
        return
    if knob.type is tuple and any(type(entry) is not int for entry in value):
        raise wrong_type(path, ",".join(map(str, value)))
    for part in value if knob.type is tuple else (value,):
        if not knob.rule.holds(part):
            verb = "holds" if knob.type is tuple else "is"
            shown = repr(part) if isinstance(part, str) else part
            raise UserError(f"{path} {verb} {shown}: it must be {knob.rule.words}")


def wrong_type(path: str, seen: str) -> UserError:
    """For a knob given text of another type, on the command line or in a config."""
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


def _check_ranks(config: ConfigDict) -> None:
    """Whether ranks and bands fit the model's width, the task and the arm."""
    model = config.model
    if config.task in ("factorize", "compress", "experiment"):
        if not config.ranks:
            raise UserError("ranks is empty: give at least one, as in 64,128")
        _check_distinct("ranks", config.ranks)
    if len(model.band_sizes) != len(model.band_ranks):
        raise UserError(
            f"model.band_sizes has {len(model.band_sizes)} entries and "
            f"model.band_ranks {len(model.band_ranks)}: give every band both"
        )
    banded_ranks = tuple(rank for rank in model.band_ranks if rank != 0)
    for path, ranks in (
        ("model.n_embd_wte", (model.n_embd_wte,)),
        ("model.band_ranks", banded_ranks),
        ("ranks", config.ranks if config.task == "experiment" else ()),
    ):
        for rank in ranks:
            if rank is not None and rank > model.n_embd:
                raise UserError(
                    f"{path} holds {rank}: a rank is a whole number from 1 to the "
                    f"model's width model.n_embd = {model.n_embd}"
                )
    if (
        model.band_sizes
        and (config.task, config.arm) != ("train", "random")
        and not config.init.weights_from
    ):
        raise UserError(
            "model.band_sizes is set: only the random model (configs/random_k128.py) "
            "can have several bands"
        )
    if model.band_sizes and (config.factorize.bands > 1 or config.init.import_bands):
        other = "factorize.bands" if config.factorize.bands > 1 else "init.import_bands"
        raise UserError(
            f"model.band_sizes is set beside {other}, which decides the bands: leave "
            "one of them out"
        )
    if config.task == "train" and not config.init.weights_from:
        is_factorized = model.n_embd_wte is not None or bool(model.band_sizes)
        is_full = config.arm in ("baseline", "continued")
        if not is_full and not is_factorized:
            raise UserError(
                f"the {config.arm} model needs a rank, --config.model.n_embd_wte=128"
                + (
                    ", or a compressed model, --config.init.weights_from=FOLDER"
                    if "blocks" in ARMS[config.arm].takes
                    else ""
                )
            )
        if is_full and is_factorized:
            raise UserError(
                f"model.n_embd_wte is {model.n_embd_wte}: the baseline's table is full;"
                " a factorized one is --config=configs/random_k128.py"
            )
    if config.task == "experiment" and model.n_embd_wte is not None:
        raise UserError(
            f"model.n_embd_wte is {model.n_embd_wte}: an experiment's ranks are set by "
            f"--config.ranks={model.n_embd_wte}"
        )


def _check_weights_from(config: ConfigDict) -> None:
    """Whether a run that takes over all weights can, and takes over no others."""
    init = config.init
    if not init.weights_from or config.task in OF_A_RUN:
        return
    fine_tuned = config.arm == "baseline" or ARMS[config.arm].is_fine_tuned
    if config.task == "experiment" or not fine_tuned:
        what = "an experiment" if config.task == "experiment" else f"arm {config.arm}"
        raise UserError(
            f"init.weights_from is set for {what}: a trained model is trained on by "
            "--config=configs/recover.py"
        )
    others = [
        name
        for name, value in init.items()
        if name != "weights_from" and value != KNOBS[f"init.{name}"].default
    ]
    if others:
        raise UserError(
            f"init.{others[0]} is set beside init.weights_from, which takes over every "
            "weight: leave one of them out"
        )


class Hardware(NamedTuple):
    """What a model will run on.

    platform: 'cpu', 'gpu', ...; has_kernels: whether it runs those of pcagpt.kernels.
    """

    platform: str
    has_kernels: bool = False


def model_settings(model: ConfigDict, vocab_size: int, hardware: Hardware) -> dict:
    """The `model` section with nothing left open, for `GPTConfig(**settings)`.

    Args:
      model: the section of the config.
      vocab_size: of the corpus.
      hardware: what the model will run on.

    Raises:
      UserError: the corpus has ids the model lacks, or the bands do not add up.
    """
    settings = model.to_dict()
    if settings["vocab_size"] is None:
        settings["vocab_size"] = vocab_size
    elif settings["vocab_size"] < vocab_size:
        raise UserError(
            f"model.vocab_size is {settings['vocab_size']}, the corpus has token ids "
            f"up to {vocab_size - 1}: leave model.vocab_size unset"
        )
    rows = sum(settings["band_sizes"])
    if settings["band_sizes"] and rows != settings["vocab_size"]:
        raise UserError(
            f"model.band_sizes add up to {rows}: they must hold the whole vocabulary, "
            f"{settings['vocab_size']}"
        )
    settings["band_ranks"] = tuple(rank or None for rank in settings["band_ranks"])
    on_gpu = hardware.platform == "gpu"
    if settings["compute_dtype"] == "auto":
        settings["compute_dtype"] = "bfloat16" if on_gpu else "float32"
    if settings["attention"] == "auto":
        fused = on_gpu and settings["compute_dtype"] == "bfloat16"
        settings["attention"] = "cudnn" if fused else "xla"
    elif settings["attention"] == "cudnn" and not (
        on_gpu and settings["compute_dtype"] == "bfloat16"
    ):
        raise UserError(
            "model.attention is 'cudnn': cuDNN's attention needs a GPU and "
            "model.compute_dtype=bfloat16; leave model.attention=auto"
        )
    takes_kernels = hardware.has_kernels and settings["compute_dtype"] == "bfloat16"
    if settings["kernels"] == "auto":
        settings["kernels"] = "pallas" if takes_kernels else "xla"
    elif (  # On CPUs they are interpreted, for tests.
        settings["kernels"] == "pallas"
        and hardware.platform != "cpu"
        and not takes_kernels
    ):
        raise UserError(
            "model.kernels is 'pallas': the kernels need an NVIDIA GPU, Ampere or "
            "newer, and model.compute_dtype=bfloat16; leave model.kernels=auto"
        )
    return settings
