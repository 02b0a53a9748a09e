"""Every knob with its default and meaning, and the checks that need only the config."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from pcagpt.arms import ARMS
from pcagpt.errors import UserError

TASKS = ("train", "experiment", "factorize", "compress", "evaluate")
SPLITS = ("train", "val", "test")
COMPRESS_BOUNDS = ("max_added_loss", "max_params", "max_bytes")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words that follow 'it must be', and as a test."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str | int) -> Rule:
    """These words or numbers only."""
    return Rule(f"one of {', '.join(map(str, choices))}", choices.__contains__)


def at_least(low: int) -> Rule:
    """Finite numbers from `low` on."""
    return Rule(f"at least {low}", lambda value: low <= value < math.inf)


ANYTHING = Rule("anything", lambda value: True)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
PART = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting.

    rule: for its value, or for every entry of a tuple, whatever the other knobs are.
    kind: type of the value, where the default is None.
    """

    default: Any
    meaning: str
    rule: Rule = ANYTHING
    kind: type = type(None)

    @property
    def type(self) -> type:
        """int, float, bool, str, or tuple (of whole numbers)."""
        return self.kind if self.default is None else type(self.default)


KNOBS = {
    "task": Knob("train", "what to do", one_of(*TASKS)),
    "arm": Knob("baseline", "task train: which model", one_of(*ARMS)),
    "workdir": Knob("checkpoints", "where runs are looked for and written"),
    "seed": Knob(1, "of initialisation, dropout and data order", SEED),
    "overwrite": Knob(False, "discard a run of the same name and another config"),
    "build_prerequisites": Knob(True, "make D and the factorization where lacking"),
    "model_path": Knob(
        "",
        "factorize, compress, evaluate: a run, a checkpoint; factorize: a .npy table",
    ),
    "split": Knob("val", "evaluate: which part of the corpus", one_of(*SPLITS)),
    "ranks": Knob((128,), "factorize, compress, experiment: as in 64,128", at_least(1)),
    # The model: GPT-2 small.
    "model.vocab_size": Knob(
        None, "None: as many tokens as the tokenizer has", at_least(1), int
    ),
    "model.vocab_multiple": Knob(
        64, "the table's rows are rounded up to a multiple", at_least(1)
    ),
    "model.block_size": Knob(1024, "tokens of a sequence", at_least(1)),
    "model.n_layer": Knob(12, "transformer blocks", at_least(1)),
    "model.n_head": Knob(12, "attention heads of a block", at_least(1)),
    "model.n_embd": Knob(768, "width d", at_least(1)),
    "model.n_embd_wte": Knob(
        None, "rank k of the embedding; None: a full table", at_least(1), int
    ),
    "model.n_embd_wte_scale_tying": Knob(True, "scale_down is scale_up"),
    "model.band_sizes": Knob(
        (), "tokens of each frequency band, most frequent first", at_least(1)
    ),
    "model.band_ranks": Knob((), "rank of each band; 0: full width", at_least(0)),
    "model.bias": Knob(True, "biases in linear layers and norms"),
    "model.dropout": Knob(0.0, "share of activations dropped", BELOW_1),
    "model.compute_dtype": Knob(
        "auto", "auto: bfloat16 on GPUs", one_of("auto", "float32", "bfloat16")
    ),
    "model.attention": Knob(
        "auto", "auto: cudnn for bfloat16 on GPUs", one_of("auto", "xla", "cudnn")
    ),
    # The corpus.
    "data.source": Knob("sotu", "sotu, wikitext103, or a folder of text or .bin files"),
    "data.tokenizer": Knob("auto", "sotu4096, gpt2; auto: what the source comes with"),
    "data.cache_dir": Knob("", "token files made from text; empty: WORKDIR/data"),
    # Training.
    "train.steps": Knob(5000, "optimizer updates", at_least(1)),
    "train.batch_size": Knob(
        32, "sequences an update, on all devices together", at_least(1)
    ),
    "train.accumulation": Knob(
        1, "parts of an update's batch, computed one by one", at_least(1)
    ),
    "train.learning_rate": Knob(6e-4, "its peak, after the warm-up", POSITIVE),
    "train.schedule": Knob("cosine", "after the warm-up", one_of(*SCHEDULES)),
    "train.warmup_steps": Knob(
        100, "updates in which the learning rate rises", at_least(0)
    ),
    "train.final_learning_rate_share": Knob(
        0.1, "of learning_rate, at the last step", SHARE
    ),
    "train.weight_decay": Knob(0.1, "on matrices only", at_least(0)),
    "train.beta1": Knob(0.9, "decay of AdamW's first moment", BELOW_1),
    "train.beta2": Knob(0.95, "decay of AdamW's second moment", BELOW_1),
    "train.gradient_clip": Knob(
        1.0, "global norm over what trains; 0: off", at_least(0)
    ),
    "train.loss_chunks": Knob(
        8, "parts the logits are computed in: more, less memory", at_least(1)
    ),
    # Learning rates of what is trained from scratch, where not D's.
    "scratch.pca_learning_rate_share": Knob(
        1.0, "of train.learning_rate, for A and its controls", POSITIVE
    ),
    "scratch.random_learning_rate_share": Knob(
        1.0, "of train.learning_rate, for C", POSITIVE
    ),
    # What is fine-tuned, B and whatever goes on from a run, gets of D's budget.
    "finetune.steps_share": Knob(0.1, "of train.steps and train.warmup_steps", PART),
    "finetune.learning_rate_share": Knob(0.5, "of train.learning_rate", PART),
    # A trained model whose predictions are learnt.
    "distill.teacher": Knob("", "a run of the same vocabulary; empty: none"),
    "distill.share": Knob(
        1.0, "of the divergence from it in the loss, the rest is cross entropy", PART
    ),
    # What a run starts from in place of random weights.
    "init.import_wte_npy": Knob("", "file of a token table [V, k]"),
    "init.import_scale_matrices_npz": Knob(
        "", "file of scale_up and scale_down, each [k, d]"
    ),
    "init.import_wte_freeze": Knob(False, "do not train the imported table"),
    "init.import_scale_matrices_freeze": Knob(
        False, "do not train the imported scale matrices"
    ),
    "init.import_bands": Knob(
        "", "folder of a table in bands, as factorize and compress write it"
    ),
    "init.keep": Knob(
        "all",
        "of imported factors, the rest is random: all; their standard deviation; their "
        "spectrum; their rows, shuffled; or nothing but the shape of their bands",
        one_of("all", "std", "spectrum", "rows", "shape"),
    ),
    "init.blocks_from": Knob("", "a run whose other weights are taken over"),
    "init.weights_from": Knob(
        "", "a run to go on from, with its model and all weights"
    ),
    # The factorization of D's table.
    "factorize.method": Knob(
        "svd", "svd; pca: centred, the mean goes into wpe; or one of compress.methods"
    ),
    "factorize.statistics": Knob(
        "", "file of what other methods need; empty: what compress left beside the run"
    ),
    "factorize.singular_value_split": Knob(
        0.0, "a: table U S^(1-a), scale matrix S^a V^T", SHARE
    ),
    "factorize.bands": Knob(
        1, "frequency bands, with ranks of their own, for A, B and C", at_least(1)
    ),
    # Compression of a trained model's table without training.
    "compress.methods": Knob(
        "svd,pca,freq,sqrt_freq,hidden,kl,joint,fisher,context",
        "what a sweep tries; the last one is also tried at fewer bits",
    ),
    "compress.bands": Knob(
        (1, 7, 12),
        "numbers of frequency bands to try; 1: one rank for all",
        at_least(1),
    ),
    "compress.bits": Knob((8, 4), "of a stored number, besides 32", one_of(8, 4)),
    "compress.calibration_tokens": Knob(
        1_048_576, "of the training split, to measure what weighs errors", at_least(1)
    ),
    "compress.max_added_loss": Knob(
        0.0, "nats a token may lose; above 0: find the smallest table", at_least(0)
    ),
    "compress.max_params": Knob(
        0, "numbers the table may store; above 0: find the best table", at_least(0)
    ),
    "compress.max_bytes": Knob(
        0, "bytes the table may take; above 0: find the best table", at_least(0)
    ),
    "compress.recover_ranks": Knob(
        (),
        "whose best tables are then trained on, with D's predictions and without, "
        "beside D itself trained on for as long",
        at_least(1),
    ),
    # Validation.
    "evaluate.every": Knob(250, "steps between evaluations", at_least(1)),
    "evaluate.batch_size": Knob(32, "sequences at a time", at_least(1)),
    # What is kept and shown.
    "checkpoint.every": Knob(
        1000, "steps between saves; the last step is always saved", at_least(1)
    ),
    "checkpoint.keep_last": Knob(
        2, "besides the one with the best validation loss", at_least(1)
    ),
    "telemetry.every": Knob(10, "steps between logged training metrics", at_least(1)),
    "telemetry.tensorboard": Knob(True, "write event files for TensorBoard"),
    "telemetry.wandb": Knob(False, "log to Weights & Biases, too"),
    "telemetry.wandb_project": Knob("pcagpt", "the project there"),
    "experiment.arms": Knob(
        "pca,random,pca_finetune",
        f"besides D, of {', '.join(arm for arm in ARMS if arm != 'baseline')}",
    ),
    "experiment.seeds": Knob(
        (), "every arm once for each; empty: once, with seed", SEED
    ),
    # Devices and processes.
    "mesh.data": Knob(
        -1, "devices the batch is split over; -1: all that fsdp leaves", at_least(-1)
    ),
    "mesh.fsdp": Knob(1, "devices the parameters are split over, too", at_least(1)),
    "distributed.enabled": Knob(
        False, "this is one of several processes; on Slurm the rest is known"
    ),
    "distributed.coordinator_address": Knob(None, "HOST:PORT of process 0", kind=str),
    "distributed.num_processes": Knob(None, "processes in all", at_least(1), int),
    "distributed.process_id": Knob(None, "this one's number, from 0", at_least(0), int),
}


def base() -> ConfigDict:
    """The config that every file of configs/ is a small change of: the defaults.

    Locked: a knob that is not declared cannot be set, by mistake or otherwise.
    """
    config = ConfigDict()
    for path, knob in KNOBS.items():
        section, _, name = path.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        holder = config[section] if section else config
        is_open = knob.default is None
        holder[name] = config_dict.placeholder(knob.type) if is_open else knob.default
    return config.lock()


def flat(config: ConfigDict) -> dict[str, Any]:
    """{'train.steps': 5000, ...} of every knob, in the order of their declaration."""
    values = {}
    for path in KNOBS:
        section, _, name = path.rpartition(".")
        values[path] = (config[section] if section else config)[name]
    return values


def override(path: str, value: Any) -> str:
    """The argument that sets a knob: '--config.ranks=64,128'."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--config.{path}={text}"


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
    if config.task in ("factorize", "compress", "evaluate") and not config.model_path:
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
    if not init.weights_from or config.task in ("factorize", "evaluate"):
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


def model_settings(model: ConfigDict, vocab_size: int, platform: str) -> dict:
    """The `model` section with nothing left open, for `GPTConfig(**settings)`.

    Args:
      model: the section of the config.
      vocab_size: of the corpus.
      platform: 'cpu', 'gpu', ...: what the model will run on.

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
    on_gpu = platform == "gpu"
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
    return settings
