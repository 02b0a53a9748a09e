"""Every knob with its default, and the checks that need nothing but the config."""

from ml_collections import ConfigDict, config_dict

from pcagpt.errors import UserError

TASKS = ("train", "experiment", "factorize", "evaluate")
ARMS = ("baseline", "pca", "pca_finetune", "random")
SPLITS = ("train", "val", "test")
SCHEDULES = ("constant", "linear", "cosine")


def base() -> ConfigDict:
    """The config that every file of configs/ is a small change of."""
    config = ConfigDict(
        {
            "task": "train",  # train | experiment | factorize | evaluate
            "arm": "baseline",  # train: baseline | pca | pca_finetune | random
            "workdir": "checkpoints",  # where runs are looked for and written
            "seed": 1,  # initialisation, dropout and data order, a key for each
            "overwrite": False,  # discard a run of the same name and other config
            "build_prerequisites": True,  # make D and the factorization if lacking
            "model_path": "",  # factorize, evaluate: a run, checkpoint or .npy table
            "split": "val",  # evaluate: train | val | test
            "ranks": (128,),  # factorize, experiment
        }
    )
    config.model = ConfigDict(
        {
            # None: as many as the tokenizer has.
            "vocab_size": config_dict.placeholder(int),
            "vocab_multiple": 64,  # rows stored are rounded up to a multiple of this
            "block_size": 1024,
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
            "n_embd_wte": config_dict.placeholder(int),  # rank k; None: full table
            "n_embd_wte_scale_tying": True,  # scale_down is scale_up
            # Frequency bands: rows of each, most frequent tokens first, and the rank
            # of each (0: full width). Empty: one band of rank n_embd_wte.
            "band_sizes": (),
            "band_ranks": (),
            "bias": True,
            "dropout": 0.0,
            "compute_dtype": "auto",  # float32 | bfloat16; auto: bfloat16 on GPUs
            "attention": "auto",  # xla | cudnn; auto: cudnn for bfloat16 on GPUs
        }
    )
    config.data = ConfigDict(
        {
            "source": "sotu",  # sotu | wikitext103 | a folder of text or .bin files
            "tokenizer": "auto",  # sotu4096 | gpt2; auto: what the source comes with
            "cache_dir": "",  # token files made from text; "": WORKDIR/data
        }
    )
    config.train = ConfigDict(
        {
            "steps": 5000,  # optimizer updates
            "batch_size": 32,  # sequences of block_size tokens an update, all devices
            "accumulation": 1,  # parts an update's batch is computed in, one by one
            "learning_rate": 6e-4,
            "schedule": "cosine",  # constant | linear | cosine, after the warm-up
            "warmup_steps": 100,
            "final_learning_rate_share": 0.1,  # of learning_rate, at the last step
            "weight_decay": 0.1,  # on matrices only
            "beta1": 0.9,
            "beta2": 0.95,
            "gradient_clip": 1.0,  # global norm over what trains; 0: off
            "loss_chunks": 8,  # parts the logits are computed in: more, less memory
        }
    )
    config.finetune = ConfigDict(
        {
            # What pca_finetune gets of the baseline's train.steps and learning_rate.
            "steps_share": 0.1,
            "learning_rate_share": 0.5,
        }
    )
    config.init = ConfigDict(
        {
            "import_wte_npy": "",  # token table [V, k]
            "import_scale_matrices_npz": "",  # scale_up, scale_down, each [k, d]
            "import_wte_freeze": False,
            "import_scale_matrices_freeze": False,
            "blocks_from": "",  # a run whose other weights are taken over
        }
    )
    config.factorize = ConfigDict(
        {
            "method": "svd",  # svd | pca (centred; the mean goes into wpe)
            "singular_value_split": 0.0,  # a: U S^(1-a) | S^a V^T
        }
    )
    config.evaluate = ConfigDict(
        {
            "every": 250,  # steps between evaluations while training
            "interim_windows": 0,  # windows of those evaluations; 0: the full split
            "batch_size": 32,
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every": 1000,  # steps between saves; the last step is always saved
            "keep_last": 1,  # besides the one with the best validation loss
        }
    )
    config.telemetry = ConfigDict(
        {
            "every": 10,  # steps between logged training metrics
            "tensorboard": True,
            "wandb": False,
            "wandb_project": "pcagpt",
        }
    )
    config.experiment = ConfigDict(
        {"seeds": ()}  # every arm once for each; empty: once, with config.seed
    )
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices the batch is split over; -1: all that fsdp leaves
            "fsdp": 1,  # devices the parameters are split over, too
        }
    )
    config.distributed = ConfigDict(
        {
            # Several processes: on Slurm and the like all is found out by itself.
            "enabled": False,
            "coordinator_address": config_dict.placeholder(str),
            "num_processes": config_dict.placeholder(int),
            "process_id": config_dict.placeholder(int),
        }
    )
    return config


def ranks_of(text: str) -> tuple[int, ...]:
    """'64,128' -> (64, 128), the argument of `configs/experiment.py:64,128`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"'{text}' is not a list of ranks: write positive whole numbers with "
            "commas between, as in configs/experiment.py:64,128"
        ) from None


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value that could not work on any machine or corpus."""
    _check_choice("task", config.task, TASKS)
    _check_choice("arm", config.arm, ARMS)
    _check_choice("split", config.split, SPLITS)
    _check_model(config.model)
    _check_train(config)
    for path, lowest in _LOWEST.items():
        section, name = path.split(".")
        value = config[section][name]
        if value < lowest:
            raise UserError(f"{path} is {value}: it must be at least {lowest}")
    for name, value in (*config.finetune.items(),):
        if not 0 < value <= 1:
            raise UserError(f"finetune.{name} is {value}: it must be in (0, 1]")
    if not 0 <= config.factorize.singular_value_split <= 1:
        raise UserError(
            f"factorize.singular_value_split is {config.factorize.singular_value_split}"
            ": it must be between 0 (all in the table) and 1 (all in the scale matrix)"
        )
    if config.task in ("factorize", "experiment"):
        for rank in config.ranks:
            _check_rank("ranks", rank, config.model.n_embd)
        if not config.ranks:
            raise UserError("ranks is empty: give at least one, as in 64,128")
    if config.task in ("factorize", "evaluate") and not config.model_path:
        raise UserError(
            f"model_path is empty: name the run to {config.task}, as in "
            "--config.model_path=checkpoints/gpt_baseline"
        )
    if config.task == "train" and config.arm != "baseline" and not has_rank(config):
        raise UserError(
            f"the {config.arm} model needs a rank: --config.model.n_embd_wte=128"
        )
    seeds = config.experiment.seeds
    if len(set(seeds)) != len(seeds):
        raise UserError(f"experiment.seeds is {seeds}: each seed may appear once")


def has_rank(config: ConfigDict) -> bool:
    """Whether the model's embedding is factorized."""
    return config.model.n_embd_wte is not None or bool(config.model.band_sizes)


_LOWEST = {
    "train.steps": 1,
    "train.batch_size": 1,
    "train.accumulation": 1,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.gradient_clip": 0,
    "train.loss_chunks": 1,
    "evaluate.every": 1,
    "evaluate.interim_windows": 0,
    "evaluate.batch_size": 1,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "telemetry.every": 1,
    "mesh.fsdp": 1,
}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is '{value}': it must be one of {', '.join(choices)}")


def _check_rank(name: str, rank: object, width: int) -> None:
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise UserError(
            f"{name} holds {rank!r}: a rank is a whole number from 1 to the model's "
            f"width model.n_embd = {width}"
        )


def _check_model(model: ConfigDict) -> None:
    for name in ("vocab_multiple", "block_size", "n_layer", "n_head", "n_embd"):
        if model[name] < 1:
            raise UserError(f"model.{name} is {model[name]}: it must be at least 1")
    if model.vocab_size is not None and model.vocab_size < 1:
        raise UserError(f"model.vocab_size is {model.vocab_size}: it must be positive")
    if model.n_embd % model.n_head:
        raise UserError(
            f"model.n_head = {model.n_head} does not divide model.n_embd = "
            f"{model.n_embd}: every head needs the same width"
        )
    if not 0 <= model.dropout < 1:
        raise UserError(f"model.dropout is {model.dropout}: it must be in [0, 1)")
    _check_choice(
        "model.compute_dtype", model.compute_dtype, ("auto", "float32", "bfloat16")
    )
    _check_choice("model.attention", model.attention, ("auto", "xla", "cudnn"))
    if model.n_embd_wte is not None:
        _check_rank("model.n_embd_wte", model.n_embd_wte, model.n_embd)
    if len(model.band_sizes) != len(model.band_ranks):
        raise UserError(
            f"model.band_sizes has {len(model.band_sizes)} entries and "
            f"model.band_ranks {len(model.band_ranks)}: give every band both"
        )
    for size in model.band_sizes:
        if not isinstance(size, int) or size < 1:
            raise UserError(f"model.band_sizes holds {size!r}: a band has rows")
    for rank in model.band_ranks:
        if rank != 0:
            _check_rank("model.band_ranks", rank, model.n_embd)


def _check_train(config: ConfigDict) -> None:
    train = config.train
    _check_choice("train.schedule", train.schedule, SCHEDULES)
    if train.batch_size % train.accumulation:
        raise UserError(
            f"train.accumulation = {train.accumulation} does not divide "
            f"train.batch_size = {train.batch_size}"
        )
    if not train.learning_rate > 0:
        raise UserError(
            f"train.learning_rate is {train.learning_rate}: it must be positive"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= train[name] < 1:
            raise UserError(f"train.{name} is {train[name]}: it must be in [0, 1)")
    if not 0 <= train.final_learning_rate_share <= 1:
        raise UserError(
            f"train.final_learning_rate_share is {train.final_learning_rate_share}: "
            "it must be in [0, 1]"
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
    elif settings["attention"] == "cudnn" and settings["compute_dtype"] == "float32":
        raise UserError(
            "model.attention=cudnn needs model.compute_dtype=bfloat16: cuDNN has no "
            "float32 attention"
        )
    return settings
