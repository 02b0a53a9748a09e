"""A training run as a job: its status, its checks and its training."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from pcagpt.arms import ARMS
from pcagpt.config import Settings
from pcagpt.data.corpus import Corpus
from pcagpt.errors import UserError
from pcagpt.run import checkpoint, initialise
from pcagpt.run.build import build_config
from pcagpt.run.folder import changed_fields, read_record, read_result, write_record
from pcagpt.run.trained import open_shared_corpus
from pcagpt.sharding import placement
from pcagpt.training.loop import train
from pcagpt.training.setup import Setup

DONE, TO_DO = "done", "to do"  # values of a job's status


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A training run with its folder and its complete settings.

    is_target: the person asked for this job; it is no prerequisite.
    """

    folder: Path
    settings: Settings
    is_target: bool

    @property
    def label(self) -> str:
        """The arm's letter and the folder, as in 'A gpt_pca_k128'."""
        return f"{ARMS[self.settings.arm].letter} {self.folder.name}"

    @property
    def amount(self) -> str:
        """The budget, as in '5,000 steps'."""
        return f"{self.settings.train.steps:,} steps"

    @property
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""
        paths = initialise.imported_paths(self.settings).values()
        return {*paths, *(path.parent for path in paths)}

    def status(self) -> str:
        """'done', 'resumes at step N' or 'to do'.

        Raises UserError if the folder holds a run with other settings.
        """
        is_finished = read_result(self.folder) is not None
        if is_finished and not self.is_target:
            return DONE
        step = max(checkpoint.steps(self.folder), default=0)
        if not is_finished and step == 0:
            return TO_DO
        changed = changed_fields(self.folder, self.record())
        if changed and self.is_target and self.settings.overwrite:
            return TO_DO
        if changed:
            raise UserError(
                f"{self.folder} was trained with another config: {'; '.join(changed)}:"
                " use another --config.workdir, or --config.overwrite=True to discard "
                "the run"
            )
        return DONE if is_finished else f"resumes at step {step}"

    def record(self) -> dict[str, Any]:
        """The settings and the hashes of all imports, as `status` compares them.

        The hashes are None as long as an import does not exist.
        """
        paths = initialise.imported_paths(self.settings).values()
        if not all(path.exists() for path in paths):
            return {**self.settings.to_dict(), "imported_sha256": None}
        settings, _ = initialise.with_bands(self.settings)
        hashes = initialise.fingerprints(settings)
        return {**settings.to_dict(), "imported_sha256": hashes}

    def corpus(self) -> Corpus:
        """The run's corpus; tokenizes its text if necessary."""
        return open_shared_corpus(self.settings.data, self.settings.cache_dir)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if the model does not fit the vocabulary or the device."""
        build_config(self.settings.model, vocab_size)

    def check(self, to_be_made: set[Path]) -> Setup | None:
        """Raises UserError if settings, corpus, imports and devices do not fit.

        `to_be_made` are the folders of earlier jobs. If the run imports from one of
        them, this import is not checked and the result is None. Otherwise the result is
        the setup for `run`.
        """
        left_out: dict[str, Any] = {
            knob: ""
            for knob, path in initialise.imported_paths(self.settings).items()
            if {path, path.parent} & to_be_made
        }
        if left_out:  # These knobs are valid only with an import.
            left_out |= {
                "init.keep": "all",
                "init.import_wte_freeze": False,
                "init.import_scale_matrices_freeze": False,
            }
        setup = Setup.of(self.settings.replace(left_out), self.corpus())
        return None if left_out else setup

    def check_corpus(self) -> None:
        """Raises UserError if the run in the folder was trained on other tokens."""
        trained_on = (read_record(self.folder) or {}).get("corpus_sha256")
        if trained_on not in (None, self.corpus().fingerprint()):
            raise UserError(
                f"{self.folder} was trained on other tokens than "
                f"{self.settings.data.source} holds now: give it the same data, use "
                f"another --config.workdir, or delete {self.folder}"
            )

    def run(self, checked: Setup | None = None) -> None:
        """Trains the run; continues from its newest checkpoint if it has one.

        `checked` is the result of `check`.
        """
        is_new = self.status() == TO_DO  # Imports may have been made since `check`.
        setup = checked or Setup.of(self.settings, self.corpus())
        record = {
            **setup.settings.to_dict(),
            "imported_sha256": initialise.fingerprints(setup.settings),
            "vocab_size": setup.model.config.vocab_size,
            "tokenizer": setup.corpus.tokenizer,
            "corpus_sha256": setup.corpus.fingerprint(),
        }
        if jax.process_index() == 0:
            if is_new and (self.folder / "config.json").exists():
                shutil.rmtree(self.folder)
            write_record(self.folder, record)
        placement.wait_for_all(self.folder.name)
        train(setup, self.folder, record, self.label)
