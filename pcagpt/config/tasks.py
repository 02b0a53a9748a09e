"""The tasks, and which knobs they read. `pcagpt.pipeline.tasks` starts them."""

from typing import NamedTuple


class Task(NamedTuple):
    """What a task needs and does.

    makes_jobs: it has a plan of jobs; model: it reads the model of `model_path`; ranks:
    it makes a table for each of `ranks`; resumes: after an interruption, the same
    command goes on from what is saved.
    """

    makes_jobs: bool = False
    model: bool = False
    ranks: bool = False
    resumes: bool = True


TASKS = {
    "train": Task(makes_jobs=True),
    "experiment": Task(makes_jobs=True, ranks=True),
    "factorize": Task(makes_jobs=True, model=True, ranks=True),
    "compress": Task(model=True, ranks=True),
    "evaluate": Task(model=True, resumes=False),
    "sample": Task(model=True, resumes=False),
}

_TRAINING = ("train", "experiment")
# Tasks that read a knob or section, and the remedy in other tasks. A knob that is not
# listed may be set for every task.
_READERS = {
    "arm": (("train",), "an experiment has experiment.arms"),
    "model_path": (
        tuple(name for name, task in TASKS.items() if task.model),
        "train a run further with configs/recover.py",
    ),
    "split": (("compress", "evaluate"), "measure a run with configs/evaluate.py"),
    # A config of an experiment may also train its D alone.
    "ranks": (
        ("train", *(name for name, task in TASKS.items() if task.ranks)), "leave it out"
    ),
    "model.n_embd_wte": (
        ("train", "evaluate", "sample"), "set its ranks with --config.ranks"
    ),
    "init.import_bands": (("train",), "an experiment makes its own tables"),
    "init.weights_from": (("train",), "train a run further with configs/recover.py"),
    "init.blocks_from": (("train",), "an experiment takes the blocks of its own D"),
    "init.keep": (("train",), "an experiment has controls with experiment.arms"),
    "init": (_TRAINING, "leave it out"),
    "distill.teacher": (("train",), "an experiment has pca_distill in experiment.arms"),
    "distill": ((*_TRAINING, "compress"), "leave it out"),
    "factorize.singular_value_split": (
        (*_TRAINING, "factorize", "compress"), "leave it out"
    ),
    "factorize": (
        (*_TRAINING, "factorize"), "compress has compress.methods and compress.bands"
    ),
    "compress.calibration_tokens": (
        (*_TRAINING, "factorize", "compress"), "leave it out"
    ),
    "compress": (("compress",), "compress a run with configs/compress.py"),
    "evaluate.max_tokens": (("compress", "evaluate"), "a run evaluates on all tokens"),
    "experiment": (("experiment",), "use configs/experiment.py"),
    "sample": (("sample",), "sample from a run with configs/sample.py"),
}  # fmt: skip


def readers_of(knob: str) -> tuple[tuple[str, ...], str]:
    """(the tasks that a knob can be set for, what to do in another task)."""
    section = knob.partition(".")[0]
    return _READERS.get(knob) or _READERS.get(section) or (tuple(TASKS), "")
