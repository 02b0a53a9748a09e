"""A job: one folder that a plan makes, unless it is already made."""

import abc
import dataclasses
import enum
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from pcagpt.config import KNOBS, Settings, override
from pcagpt.errors import UserError
from pcagpt.run.build import device_choices, hardware


class Kind(enum.Enum):
    """How far a job is."""

    TO_DO = enum.auto()
    BEGUN = enum.auto()
    DONE = enum.auto()


class Status(NamedTuple):
    """How far a job is, and the words that show it."""

    kind: Kind
    words: str


TO_DO, DONE = Status(Kind.TO_DO, "to do"), Status(Kind.DONE, "done")


@dataclasses.dataclass(frozen=True)
class Job(abc.ABC):
    """What is made in a folder, with its complete settings.

    is_target: the person asked for this job; it is not a prerequisite. is_preview: it
    is only looked at, maybe on another machine than the one that does it.
    """

    folder: Path
    settings: Settings
    is_target: bool
    is_preview: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def compute_dtype(self) -> str | None:
        """That of this device; None if another one may choose it.

        A preview on a CPU may be that of work on a GPU, as on a cluster's login node.
        """
        model = self.settings.model
        is_open = self.is_preview and model.compute_dtype == "auto"
        if is_open and hardware().platform == "cpu":
            return None
        return device_choices(model)["compute_dtype"]

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The folder's name, after the arm's letter or an indent of the same width."""

    @property
    @abc.abstractmethod
    def amount(self) -> str:
        """What is made, in a few words: '5,000 steps' or 'rank 64, 128'."""

    @property
    def made(self) -> str:
        """The `amount` that the folder of a finished job holds."""
        return self.amount

    @property
    @abc.abstractmethod
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""

    @abc.abstractmethod
    def status(self) -> Status:
        """How far it is. UserError if something else is there that must be kept."""

    @abc.abstractmethod
    def check_early(self, missing: set[Path]) -> None:
        """Checks all that needs no tokens of the corpus; raises UserError.

        Reads only their description, such as the size of the vocabulary. `missing` are
        the folders of jobs that are still to do.
        """

    @abc.abstractmethod
    def check(self, missing: set[Path]) -> Any:
        """Raises UserError if settings, sources, corpus and devices do not fit.

        What earlier jobs make in the folders `missing` is not checked. The result is
        for `run`. All processes must call this.
        """

    @abc.abstractmethod
    def run(self, checked: Any = None, command: str = "") -> None:
        """Makes what the folder lacks; `checked` is the result of `check`.

        TensorBoard and W&B show `command`, what the person has called. Waits while
        another command holds the folder. All processes must call this.
        """

    @abc.abstractmethod
    def found(self) -> list[str]:
        """Lines about what is made: what it is, where, and the next command."""

    def flops(self) -> float:
        """Floating-point operations of the training that is to do; 0 without any."""
        return 0.0

    def differing(self) -> list[str]:
        """The settings and hashes in which the folder's files differ, as words."""
        return []

    def remark(self) -> str:
        """What the plan adds to the status of a job that is begun or done; or ''."""
        return ""

    def compare_corpus(self, is_needed: bool) -> str | None:
        """Raises UserError if what is in the folder was trained on other tokens.

        If the corpus cannot be opened and no job needs it, returns a line that says so.
        All processes must call this.
        """
        return None

    def missing_error(self) -> UserError:
        """The error for a prerequisite that may not be made, with its command."""
        lacks, config_file, settings = self._how_to_make()
        set_by_file = ("task", "arm", "build_prerequisites", "overwrite")
        # configs/factorize.py takes the run's own corpus, if none is named.
        values = {path: knob.default for path, knob in KNOBS.items()}
        if settings.model_path:
            values["data.source"] = ""
        words = [
            override(path, value)
            for path, value in settings.flat().items()
            if path not in set_by_file and value != values[path]
        ]
        command = ["python", "-m", "pcagpt.main", f"--config={config_file}", *words]
        return UserError(
            f"{self.folder} {lacks} and build_prerequisites is off; make it with: "
            f"{shlex.join(command)}"
        )

    @abc.abstractmethod
    def _how_to_make(self) -> tuple[str, str, Settings]:
        """For `missing_error`: what is lacking, and what makes it.

        That is a config file and settings.
        """
