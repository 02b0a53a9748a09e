"""The tasks, and which knobs they read. `pcagpt.pipeline.tasks` starts them."""

from typing import NamedTuple


class Task(NamedTuple):
    """What a task needs and does.

    any_architecture: the model may be one that only transformers computes; makes_jobs:
    it has a plan of jobs; model: it reads the model of `model_path`; ranks: it makes a
    table for each of `ranks`; writes: it always needs a writable workdir, not only for
    a job that is to do; resumes: after an interruption, the same command goes on from
    what is saved.
    """

    makes_jobs: bool = False
    model: bool = False
    ranks: bool = False
    writes: bool = False
    resumes: bool = True
    any_architecture: bool = False


TASKS = {
    "train": Task(makes_jobs=True),
    "experiment": Task(makes_jobs=True, ranks=True),
    "factorize": Task(makes_jobs=True, model=True, ranks=True),
    "compress": Task(model=True, ranks=True, writes=True, any_architecture=True),
    "evaluate": Task(model=True, resumes=False),
    "sample": Task(model=True, resumes=False),
    "export": Task(model=True, writes=True, resumes=False),
}

# Among the readers of a knob: `compress`, but only if it trains models further.
RECOVERY = "compress with compress.recover_ranks"
_ALL = tuple(TASKS)
_TRAINING = ("train", "experiment")
_RUNS = (*_TRAINING, RECOVERY)
_RANKS = tuple(name for name, task in TASKS.items() if task.ranks)
_MODEL = tuple(name for name, task in TASKS.items() if task.model)
_WITH_TEXT = tuple(name for name in TASKS if name not in ("sample", "export"))
_OTHER_CONFIG = "leave it out, and start from the task's own file in configs/"
# The tasks that read a knob, and the remedy in other tasks. A knob without an entry has
# that of its section.
_READERS = {
    "task": (_ALL, ""),
    "arm": (("train",), "an experiment has experiment.arms"),
    "workdir": (_ALL, ""),
    "seed": ((*_RUNS, "sample"), "leave it out"),
    "overwrite": ((*_RANKS, "train", "export"), "leave it out"),
    "build_prerequisites": (("train",), "leave it out"),
    "model_path": ((*_MODEL, "train"), "an experiment trains its own D"),
    "format": (("export",), "write a run with configs/export.py"),
    "split": (("compress", "evaluate"), "measure a run with configs/evaluate.py"),
    # A config of an experiment may also train its D alone.
    "ranks": (("train", *_RANKS), "leave it out"),
    "model": (_ALL, ""),
    "model.n_embd_wte": (
        ("train", "evaluate", "sample", "export"), "set its ranks with --config.ranks"
    ),
    "data": (_WITH_TEXT, "leave it out"),
    "data.tokenizer": (_ALL, ""),
    "train": (_RUNS, _OTHER_CONFIG),
    "train.batch_size": ((*_TRAINING, "factorize", "compress"), _OTHER_CONFIG),
    "train.loss_chunks": (
        (*_TRAINING, "factorize", "compress", "evaluate"), _OTHER_CONFIG
    ),
    "scratch": (_TRAINING, _OTHER_CONFIG),
    "finetune": (_RUNS, _OTHER_CONFIG),
    "distill": (_RUNS, "leave it out"),
    "distill.teacher": (("train",), "an experiment has pca_distill in experiment.arms"),
    "init": (_TRAINING, "leave it out"),
    "init.import_bands": (("train",), "an experiment makes its own tables"),
    "init.weights_from": (("train",), "train a run further with configs/recover.py"),
    "init.blocks_from": (("train",), "an experiment takes the blocks of its own D"),
    "init.keep": (("train",), "an experiment has controls with experiment.arms"),
    "factorize": (
        (*_TRAINING, "factorize"), "compress has compress.methods and compress.bands"
    ),
    "factorize.singular_value_split": (
        (*_TRAINING, "factorize", "compress"), "leave it out"
    ),
    "compress": (("compress",), "compress a run with configs/compress.py"),
    "compress.calibration_tokens": (
        (*_TRAINING, "factorize", "compress"), "leave it out"
    ),
    "evaluate": ((*_TRAINING, "compress", "evaluate"), _OTHER_CONFIG),
    "evaluate.every": (_RUNS, _OTHER_CONFIG),
    "evaluate.max_tokens": (("compress", "evaluate"), "a run evaluates on all tokens"),
    "sample": (("sample",), "sample from a run with configs/sample.py"),
    "checkpoint": (_RUNS, _OTHER_CONFIG),
    "telemetry": ((*_TRAINING, "factorize", "compress"), _OTHER_CONFIG),
    "telemetry.every": (_RUNS, _OTHER_CONFIG),
    "telemetry.sample_tokens": (_RUNS, _OTHER_CONFIG),
    "experiment": (("experiment",), "use configs/experiment.py"),
    "mesh": (_WITH_TEXT, "leave it out"),
    "distributed": (_ALL, ""),
}  # fmt: skip

# The knobs that `compress` reads for a table without its model, besides `distributed`.
OF_BARE_TABLE = {
    *("task", "workdir", "overwrite", "model_path", "ranks"),
    *("factorize.singular_value_split", "compress.methods", "compress.bands"),
    *("compress.bits", "compress.max_params", "compress.max_bytes"),
    *("telemetry.tensorboard", "telemetry.wandb", "telemetry.wandb_project"),
}


def readers_of(knob: str) -> tuple[tuple[str, ...], str]:
    """(the tasks that read a knob, what to do in another task).

    One of the tasks may be `RECOVERY`.
    """
    return _READERS.get(knob) or _READERS[knob.partition(".")[0]]
