"""A job: one folder that a plan makes, unless it is already made."""

import abc
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from pcagpt.config import KNOBS, Settings, override
from pcagpt.errors import UserError

DONE, TO_DO = "done", "to do"  # two of the values that a status can have


@dataclasses.dataclass(frozen=True)
class Job(abc.ABC):
    """What is made in a folder, with its complete settings.

    is_target: the person asked for this job; it is not a prerequisite.
    """

    folder: Path
    settings: Settings
    is_target: bool

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The folder's name after the arm's letter, or after spaces."""

    @property
    @abc.abstractmethod
    def amount(self) -> str:
        """What is made, in a few words: '5,000 steps' or 'rank 64, 128'."""

    @property
    def made(self) -> str:
        """As `amount`, of what a folder with the status `DONE` holds."""
        return self.amount

    @property
    @abc.abstractmethod
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""

    @abc.abstractmethod
    def status(self) -> str:
        """`DONE`, `TO_DO` or how far it is, in words.

        Raises UserError if the folder holds anything else, and may not be replaced.
        """

    @abc.abstractmethod
    def check_vocabulary(self, to_be_made: set[Path]) -> None:
        """Raises UserError if the job does not fit the vocabulary of its corpus.

        Reads only the description of the corpus. `to_be_made` are the folders of jobs
        that are still to do.
        """

    @abc.abstractmethod
    def check(self, to_be_made: set[Path]) -> Any:
        """Raises UserError if settings, sources, corpus and devices do not fit.

        What earlier jobs make in the folders `to_be_made` is not checked. The result is
        for `run`.
        """

    @abc.abstractmethod
    def run(self, checked: Any = None) -> None:
        """Makes what the folder lacks; `checked` is the result of `check`.

        Waits while another command holds the folder.
        """

    def differing(self) -> list[str]:
        """Names of the settings and hashes in which the folder's files differ."""
        return []

    def compare_corpus(self, is_needed: bool) -> str | None:
        """Raises UserError if what is in the folder was trained on other tokens.

        If the corpus is missing and not needed, the result is a line that says so.
        """
        return None

    def missing(self) -> UserError:
        """The error for a prerequisite that may not be made, with its command."""
        lacks, config_file, settings = self._alone()
        set_by_file = ("task", "arm", "build_prerequisites", "overwrite")
        words = [
            override(path, value)
            for path, value in settings.flat().items()
            if path not in set_by_file and value != KNOBS[path].default
        ]
        command = ["python", "-m", "pcagpt.main", f"--config={config_file}", *words]
        return UserError(
            f"{self.folder} {lacks} and build_prerequisites is off; make it with: "
            f"{shlex.join(command)}"
        )

    @abc.abstractmethod
    def _alone(self) -> tuple[str, str, Settings]:
        """What the folder lacks, and the config file and settings that make it."""
