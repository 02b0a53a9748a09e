"""Every knob of the program: name, type, default, meaning and rule.

The program works with `Settings`: frozen and typed, one dataclass for each section.
Config files and the command line change a `ConfigDict` of the same names, made by
`base`. `Settings.of` turns it into `Settings`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from pcagpt.arms import ARMS
from pcagpt.config.effort import CPU, CPU_LARGE, GPU, LARGE_TABLE
from pcagpt.config.knobs import (
    BANDS,
    BELOW_1,
    PART,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    Knob,
    Rule,
    at_least,
    declared,
    knob,
    one_of,
)
from pcagpt.config.tasks import TASKS
from pcagpt.methods import CODES, FEWEST_FACTOR_BITS, METHODS, RIVALS

COMPRESS_BOUNDS = ("max_added_loss", "max_params", "max_bytes")
OTHER_ARMS = tuple(arm for arm in ARMS if arm != "baseline")


def _joined(entries: Iterable[Any]) -> str:
    return ",".join(map(str, entries))


# What the config files of some tasks set a knob to, so that it says nothing.
UNSET = {"ranks": (), "data.source": ""}
_LARGE = "for a first look at a large table"
_SEE = "(see compress.methods)"


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model; the defaults are GPT-2 small."""

    vocab_size: int | None = knob(None, "number of tokens; None: that of the tokenizer")
    vocab_multiple: int = knob(64, "pad the table to a multiple of this many rows")
    block_size: int = knob(1024, "tokens per sequence")
    n_layer: int = knob(12, "transformer blocks")
    n_head: int = knob(12, "attention heads of a block")
    n_embd: int = knob(768, "model width d")
    n_embd_wte: int | None = knob(
        None, "rank k of the embedding; None: a full table; not read beside band_sizes"
    )
    n_embd_wte_scale_tying: bool = knob(True, "make scale_down the same as scale_up")
    band_sizes: tuple[int, ...] = knob(
        (), "tokens of each frequency band, most frequent first"
    )
    band_ranks: tuple[int, ...] = knob(
        (), "rank of each band; 0: full width", at_least(0)
    )
    band_blocks: tuple[int, ...] = knob(
        (),
        "of a packed table, set by compress: for each band, the number of blocks of 8 "
        "directions with codes of 8, 6, 5, 4, 3, 2 and 1 bits",
        at_least(0),
    )
    bias: bool = knob(True, "use biases in linear layers and norms")
    gelu: str = knob(
        "tanh",
        "activation of the MLP; tanh: GPT-2's approximation; exact: nanoGPT's",
        one_of("tanh", "exact"),
    )
    dropout: float = knob(0.0, "probability that an activation is dropped", BELOW_1)
    compute_dtype: str = knob(
        "auto", "auto: bfloat16 on GPUs", one_of("auto", "float32", "bfloat16")
    )
    attention: str = knob(
        "auto",
        "auto, for bfloat16 on GPUs: mosaic on Hopper if model.kernels is mosaic, "
        "otherwise cudnn. mosaic uses cudnn where it has no kernel: for heads that are "
        "not 64 wide, and lengths that are no multiple of 256",
        one_of("auto", "xla", "cudnn", "mosaic"),
    )
    kernels: str = knob(
        "auto",
        "norms, GELU and training loss, except distillation's; auto, for bfloat16 on "
        "NVIDIA GPUs: mosaic on Hopper or newer, triton on Ampere or newer",
        one_of("auto", "xla", "triton", "mosaic"),
    )

    @property
    def is_factorized(self) -> bool:
        """Whether the token table has a rank, or bands with their own."""
        return self.n_embd_wte is not None or bool(self.band_sizes)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The corpus."""

    source: str = knob(
        "sotu",
        "sotu, wikitext103, a text file, or a folder of text or .bin files",
        PATH,
    )
    tokenizer: str = knob(
        "auto",
        "sotu4096, gpt2, or a file or folder: tokenizer.json, vocab.json with "
        "merges.txt, a GGUF file, or tiktoken's ranks (.tiktoken) for GPT-2's pattern; "
        "auto: the source's own, or that of a model of another program",
        PATH,
    )
    cache_dir: str = knob("", "folder for tokenized text; empty: WORKDIR/data", PATH)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The training budget of D and the optimizer of every run.

    config.json of a run has its own budget: its arm's share is already applied.
    """

    steps: int = knob(5000, "optimizer updates")
    batch_size: int = knob(
        32, "sequences per update, over all devices together; also of the calibration"
    )
    accumulation: int = knob(1, "gradient accumulation: micro-batches per update")
    learning_rate: float = knob(6e-4, "peak, reached after the warm-up", POSITIVE)
    schedule: str = knob(
        "cosine", "after the warm-up", one_of("constant", "linear", "cosine")
    )
    warmup_steps: int = knob(
        100,
        "updates while the learning rate rises; a shorter run ends at the peak",
        at_least(0),
    )
    final_learning_rate_share: float = knob(
        0.1, "share of learning_rate at the last step", SHARE
    )
    weight_decay: float = knob(0.1, "applies to matrices only", at_least(0))
    beta1: float = knob(0.9, "decay of AdamW's first moment", BELOW_1)
    beta2: float = knob(0.95, "decay of AdamW's second moment", BELOW_1)
    gradient_clip: float = knob(
        1.0, "limit of the gradients' global norm; 0: no limit", at_least(0)
    )
    loss_chunks: int = knob(
        4,
        "compute the logits in at most this many equal parts; more parts need less "
        "memory. No effect "
        "on models that transformers computes: their parts have a fixed size",
    )


@dataclasses.dataclass(frozen=True)
class ScratchSettings:
    """Learning rates of A, its controls and C, if they differ from D's."""

    pca_learning_rate_share: float = knob(
        1.0, "share of train.learning_rate for A and its controls", POSITIVE
    )
    random_learning_rate_share: float = knob(
        1.0, "share of train.learning_rate for C", POSITIVE
    )


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The share of D's budget for B, Bd and runs that start from another run."""

    steps_share: float = knob(0.1, "share of train.steps and train.warmup_steps", PART)
    learning_rate_share: float = knob(0.5, "share of train.learning_rate", PART)


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Knowledge distillation from a trained model."""

    teacher: str = knob("", "run with the same vocabulary; empty: no teacher", PATH)
    share: float = knob(
        1.0, "weight of KL(teacher || model); the cross entropy has the rest", PART
    )


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """Weights that a run starts from instead of random ones."""

    import_wte_npy: str = knob("", "file of a token table [V, k]", PATH)
    import_scale_matrices_npz: str = knob(
        "", "file of scale_up, scale_down [k, d]", PATH
    )
    import_wte_freeze: bool = knob(False, "keep the imported table fixed")
    import_scale_matrices_freeze: bool = knob(False, "keep the imported matrices fixed")
    import_bands: str = knob(
        "", "folder of a banded table from factorize or compress", PATH
    )
    keep: str = knob(
        "all",
        "set by the arm: property of the imported factors to keep, the rest is random; "
        "std: root mean square; spectrum: singular values; rows: the rows, in random "
        "order; shape: sizes, ranks and tokens of the bands",
        one_of("all", "std", "spectrum", "rows", "shape"),
    )
    blocks_from: str = knob("", "run to copy all weights but the embedding from", PATH)
    weights_from: str = knob("", "run to copy the model and all weights from", PATH)


@dataclasses.dataclass(frozen=True)
class FactorizeSettings:
    """The factorization of D's table."""

    method: str = knob("svd", "how errors of the table count", one_of(*METHODS))
    statistics: str = knob(
        "", "file of statistics; empty: measure them on the run", PATH
    )
    singular_value_split: float = knob(
        0.0,
        "share a of the singular values in the scale matrix, S^a V^T; the table has "
        "the rest, U S^(1-a)",
        SHARE,
    )
    bands: int = knob(
        1,
        "frequency bands of the table, each with its own rank; in every arm but D and "
        "D+",
        BANDS,
    )


@dataclasses.dataclass(frozen=True)
class CompressSettings:
    """Compression of a trained model's table without training."""

    methods: str = knob(
        "",
        f"methods to try: all, or some of {', '.join(METHODS)}, "
        f"{', '.join(f'{name} ({code.words})' for name, code in CODES.items())}, "
        f"{', '.join(RIVALS)} (D's table in few bits, for comparison). The best method "
        "is the last one that makes factors in one of compress.bands. Only its factors "
        "are rounded to fewer bits or tried for a bound. Empty: all; "
        f"on a CPU {_joined(CPU.methods)}, or {_joined(CPU_LARGE.methods)} {_LARGE}. A "
        "first look is a sweep on a CPU without methods, bands, recover_ranks and "
        f"bounds. A table is large if it has {LARGE_TABLE:,} numbers or more and is at "
        f"least {max(CPU_LARGE.ranks)} wide",
    )
    bands: tuple[int, ...] = knob(
        (),
        "numbers of frequency bands to try; 1: one rank for all tokens; empty: "
        f"{_joined(GPU.bands)}; on a CPU {_joined(CPU.bands)}, or "
        f"{_joined(CPU_LARGE.bands)} {_LARGE} {_SEE}",
        BANDS,
    )
    bits: tuple[int, ...] = knob(
        (8, 4),
        f"bits per stored number to try besides 32; below {FEWEST_FACTOR_BITS} only "
        "for D's own table",
        one_of(8, 6, 5, 4, 3, 2),
    )
    calibration_tokens: int = knob(
        0,
        "training tokens for the statistics, at most all, rounded up to whole batches, "
        "or to whole windows of another architecture; "
        f"0: {GPU.calibration_tokens}; compress on a CPU {CPU.calibration_tokens}",
        at_least(0),
    )
    max_added_loss: float = knob(
        0.0,
        "find the smallest table that adds at most this loss; 0: no bound. If "
        f"compress.methods names {' or '.join(CODES)}, it tries the first of these "
        "that is named. If it names none of them, it tries factors. If it names "
        "baseline or a method that makes factors, it also tries D's own table in "
        "compress.bits",
        at_least(0),
    )
    max_params: int = knob(
        0,
        "find the best table of at most this many numbers; 0: no bound",
        at_least(0),
    )
    max_bytes: int = knob(
        0, "find the best table of at most this many bytes; 0: no bound", at_least(0)
    )
    recover_ranks: tuple[int, ...] = knob(
        (),
        "after the sweep, train the best factors and the coded table of these ranks "
        "further, once on the text and once on D's predictions; and D, for the same "
        "steps. D's train settings and seed apply",
    )

    @property
    def bounds(self) -> dict[str, float]:
        """{knob: value} of the bounds that are set."""
        values = {name: getattr(self, name) for name in COMPRESS_BOUNDS}
        return {name: value for name, value in values.items() if value}


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Validation."""

    every: int = knob(250, "steps between evaluations")
    batch_size: int = knob(32, "sequences at a time")
    max_tokens: int = knob(
        0,
        "evaluate, compress: number of tokens to predict; 0: all. A first look "
        f"{_SEE} predicts {CPU.max_tokens}, or {CPU_LARGE.max_tokens} if the table is "
        "large",
        at_least(0),
    )


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Samples of text."""

    prompt: str = knob("", "text to continue; empty: begin a document")
    tokens: int = knob(200, "tokens to draw")
    count: int = knob(1, "samples to draw at once")
    temperature: float = knob(
        0.8, "divides the logits; 0: take the likeliest token", at_least(0)
    )
    top_k: int = knob(
        200, "draw from this many likeliest tokens; 0: from all", at_least(0)
    )
    top_p: float = knob(
        1.0,
        "draw from the likeliest tokens, as many as have this probability together; "
        "1: from all",
        PART,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints while training."""

    every: int = knob(1000, "steps between saves; the last step is also saved")
    keep_last: int = knob(2, "checkpoints to keep besides the best one")


@dataclasses.dataclass(frozen=True)
class TelemetrySettings:
    """Logs while training, and pictures of what other tasks make."""

    every: int = knob(10, "steps between logged training metrics")
    sample_tokens: int = knob(
        64,
        "tokens of the text that a run writes at each evaluation, for TensorBoard and "
        "W&B; 0: none. No effect if the corpus does not say what text its tokens stand "
        "for, or on several processes",
        at_least(0),
    )
    tensorboard: bool = knob(True, "write event files for TensorBoard")
    wandb: bool = knob(False, "also log to Weights & Biases")
    wandb_project: str = knob("pcagpt", "project in Weights & Biases")


@dataclasses.dataclass(frozen=True)
class ExperimentSettings:
    """The runs of an experiment."""

    arms: str = knob(
        "pca,random,pca_finetune",
        f"arms to train besides D, some of {', '.join(OTHER_ARMS)}",
    )
    seeds: tuple[int, ...] = knob(
        (), "train every arm with each of these seeds; empty: only with seed", SEED
    )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The devices of a run."""

    data: int = knob(
        -1,
        "split the batch over this many devices; -1: all devices / fsdp",
        Rule("-1, or at least 1", lambda count: count == -1 or count >= 1),
    )
    fsdp: int = knob(1, "split parameters and batch over this many devices")


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """Several processes."""

    enabled: bool = knob(False, "run as one of several processes; Slurm sets the rest")
    coordinator_address: str | None = knob(None, "HOST:PORT of process 0")
    num_processes: int | None = knob(None, "number of processes")
    process_id: int | None = knob(None, "number of this process, from 0", at_least(0))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All knobs. `settings.train.steps` is the knob 'train.steps'.

    named: the knobs that the command line sets, except where it takes back a value of
    the config file.
    """

    task: str = knob("train", "what to do", one_of(*TASKS))
    arm: str = knob("baseline", "task train: which model", one_of(*ARMS))
    workdir: str = knob(
        "checkpoints", "folder that runs are read from and written to", PATH
    )
    seed: int = knob(1, "seed of initialisation, dropout and data order", SEED)
    overwrite: bool = knob(
        False, "move a run, model, sweep or export aside that is there and differs"
    )
    build_prerequisites: bool = knob(True, "make D and its factorization if missing")
    model_path: str = knob(
        "",
        f"{_joined(name for name, task in TASKS.items() if task.model)}: a run or one "
        "checkpoint, a Hugging Face folder of a GPT-2, or nanoGPT's ckpt.pt; "
        f"{_joined(name for name, task in TASKS.items() if task.any_architecture)}: or "
        "a Hugging Face folder of another architecture, or a GGUF file; export: or a "
        "compressed table of another architecture; factorize, compress: or a .npy "
        "table; "
        "train: the model that takes D's place, to start the arm from",
        PATH,
    )
    format: str = knob(
        "hf",
        "hf: a Hugging Face folder, the table multiplied out; hf-factored: one that "
        "transformers loads at its small size with a modelling file; coded: one with "
        "the table as its coded file; npz: the table or its factors as .npy and .npz",
        one_of("hf", "hf-factored", "coded", "npz"),
    )
    split: str = knob(
        "val",
        "evaluate, compress: part of the corpus to measure on; compress chooses models "
        "on val only",
        one_of("train", "val", "test"),
    )
    ranks: tuple[int, ...] = knob(
        (128,),
        f"{_joined(name for name, task in TASKS.items() if task.ranks)}: ranks to "
        f"make, as in 64,128; compress, empty: {_joined(GPU.ranks)}, or "
        f"{_joined(CPU_LARGE.ranks)} {_LARGE} {_SEE}",
    )
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    scratch: ScratchSettings = ScratchSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    distill: DistillSettings = DistillSettings()
    init: InitSettings = InitSettings()
    factorize: FactorizeSettings = FactorizeSettings()
    compress: CompressSettings = CompressSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    sample: SampleSettings = SampleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    experiment: ExperimentSettings = ExperimentSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    named: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """Settings of a ConfigDict or of a run's record.

        A missing knob gets its default. Other names are ignored.
        """
        return cls().replace(
            {
                path: tuple(value) if isinstance(value, list) else value
                for path, value in _flat(config).items()
                if path in KNOBS
            }
        )

    def replace(self, values: Mapping[str, Any]) -> "Settings":
        """A copy with other values, as in {'train.steps': 10, 'seed': 2}.

        A section can be replaced as a whole: {'init': InitSettings()}. Knobs of this
        section then change the new one.
        """
        own: dict[str, Any] = {}
        for path in sorted(values, key=lambda path: "." in path):
            value, (holder, _, name) = values[path], path.rpartition(".")
            if holder:
                part = own.get(holder, getattr(self, holder))
                own[holder] = dataclasses.replace(part, **{name: value})
            else:
                own[name] = value
        return dataclasses.replace(self, **own)

    def flat(self) -> dict[str, Any]:
        """{'train.steps': 5000, ...} of every knob, in the order of declaration."""
        return _flat(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "named"}

    @property
    def given(self) -> set[str]:
        """The knobs that must have an effect: not at their default, or `named`.

        A knob that is named with a default such as 0, False or '' asks for nothing.
        """
        return {
            path
            for path, value in self.flat().items()
            if (value and path in self.named)
            or value not in (default := KNOBS[path].default, UNSET.get(path, default))
        }

    @property
    def is_of_bare_table(self) -> bool:
        """Whether `model_path` is a token table without its model."""
        return self.model_path.endswith(".npy")

    @property
    def cache_dir(self) -> Path:
        """Folder of the token files that are made from text."""
        return Path(self.data.cache_dir or Path(self.workdir) / "data")


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{'train.steps': 5000, ...} from two levels of mappings."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= {f"{name}.{inner}": entry for inner, entry in value.items()}
        else:
            flat[name] = value
    return flat


KNOBS: dict[str, Knob] = declared(Settings)


def base() -> ConfigDict:
    """The defaults as a ConfigDict, for the files of configs/ to change.

    It is locked: only declared knobs can be set.
    """
    config = ConfigDict(Settings().to_dict())
    for path, entry in KNOBS.items():
        if entry.default is None:  # A plain None would accept any type.
            section, _, name = path.rpartition(".")
            holder = config[section] if section else config
            holder[name] = config_dict.placeholder(entry.type)
    return config.lock()


def override(path: str, value: Any) -> str:
    """The argument that sets a knob: '--config.ranks=64,128'."""
    text = _joined(value) if isinstance(value, tuple) else str(value)
    return f"--config.{path}={text}"
