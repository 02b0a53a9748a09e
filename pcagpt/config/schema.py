"""Every knob with its default and meaning."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from pcagpt.arms import ARMS
from pcagpt.config.rules import (
    BELOW_1,
    PART,
    POSITIVE,
    SEED,
    SHARE,
    Knob,
    at_least,
    one_of,
)

TASKS = ("train", "experiment", "factorize", "compress", "evaluate", "sample")
OF_A_RUN = ("factorize", "compress", "evaluate", "sample")  # tasks: see model_path
SPLITS = ("train", "val", "test")
COMPRESS_BOUNDS = ("max_added_loss", "max_params", "max_bytes")
SCHEDULES = ("constant", "linear", "cosine")

KNOBS = {
    "task": Knob("train", "what to do", one_of(*TASKS)),
    "arm": Knob("baseline", "task train: which model", one_of(*ARMS)),
    "workdir": Knob("checkpoints", "where runs are looked for and written"),
    "seed": Knob(1, "of initialisation, dropout and data order", SEED),
    "overwrite": Knob(False, "discard a run of the same name and another config"),
    "build_prerequisites": Knob(True, "make D and the factorization where lacking"),
    "model_path": Knob(
        "",
        f"{', '.join(OF_A_RUN)}: a run, a checkpoint of one; factorize: a .npy table",
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
    "model.kernels": Knob(
        "auto",
        "of norms, GELU and the cross entropy that is trained on; auto: pallas for "
        "bfloat16 on NVIDIA GPUs from Ampere on",
        one_of("auto", "xla", "pallas"),
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
        "", "file of what other methods need; empty: measured on the run"
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
        "what a sweep tries; the last one also at fewer bits, and for a bound",
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
        0.0,
        "nats a token may lose; above 0: find the table of the fewest numbers",
        at_least(0),
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
    # Samples of text.
    "sample.prompt": Knob("", "text to continue; empty: a document's beginning"),
    "sample.tokens": Knob(200, "tokens to draw", at_least(1)),
    "sample.count": Knob(1, "samples, drawn side by side", at_least(1)),
    "sample.temperature": Knob(
        0.8, "that logits are divided by; 0: the likeliest token", at_least(0)
    ),
    "sample.top_k": Knob(
        200, "draw from this many of the likeliest tokens; 0: from all", at_least(0)
    ),
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
