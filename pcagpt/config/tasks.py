"""The tasks and what each needs. `pcagpt.pipeline.tasks` starts them."""

from typing import NamedTuple


class Task(NamedTuple):
    """Which knobs a task needs.

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
