"""A training run as a job: its status, its checks and its training."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from pcagpt.arms import ARMS
from pcagpt.config import Settings
from pcagpt.data.corpus import Corpus
from pcagpt.data.sources import absolute
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

    is_target: the person asked for it by name; it is not a prerequisite.
    """

    folder: Path
    settings: Settings
    is_target: bool

    @property
    def label(self) -> str:
        """As in 'A gpt_pca_k128'."""
        return f"{ARMS[self.settings.arm].letter} {self.folder.name}"

    @property
    def amount(self) -> str:
        """As in '5,000 steps'."""
        return f"{self.settings.train.steps:,} steps"

    @property
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""
        paths = initialise.imported_paths(self.settings).values()
        return {*paths, *(path.parent for path in paths)}

    def status(self) -> str:
        """'done', 'resumes at step N' or 'to do'; UserError for other settings."""
        is_finished = read_result(self.folder) is not None
        if is_finished and not self.is_target:
            return DONE
        step = max(checkpoint.steps(self.folder), default=0)
        if not is_finished and step == 0:
            return TO_DO
        changed = changed_fields(self.folder, self.record())
        if self.is_target and self.settings.overwrite and not changed:
            changed = self.corpus().differences(read_record(self.folder) or {})
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
        """What `status` compares with config.json: settings and hashes of all imports.

        The hashes are None while an import does not exist.
        """
        paths = initialise.imported_paths(self.settings).values()
        if not all(path.exists() for path in paths):
            return {**self.settings.to_dict(), "imported_sha256": None}
        settings, _ = initialise.with_bands(self.settings)
        hashes = initialise.fingerprints(settings)
        return {**settings.to_dict(), "imported_sha256": hashes}

    def corpus(self) -> Corpus:
        """The run's corpus; tokenizes its text if necessary."""
        return open_shared_corpus(
            self.settings.data, self.settings.cache_dir, ["train", "val"]
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if the model does not fit the vocabulary or the device."""
        build_config(self.settings.model, vocab_size)

    def check(self, to_be_made: set[Path]) -> Setup | None:
        """Raises UserError if settings, corpus, imports and devices do not fit.

        Imports from `to_be_made`, the folders of earlier jobs, cannot be checked yet.
        Without such imports it returns what `run` trains with.
        """
        left_out: dict[str, Any] = {
            knob: ""
            for knob, path in initialise.imported_paths(self.settings).items()
            if {path, path.parent} & to_be_made
        }
        if left_out:  # These knobs need an import.
            left_out |= {
                "init.keep": "all",
                "init.import_wte_freeze": False,
                "init.import_scale_matrices_freeze": False,
            }
        setup = Setup.of(self.settings.replace(left_out), self.corpus())
        return None if left_out else setup

    def check_corpus(self) -> None:
        """Raises UserError if the run in the folder was trained on other tokens."""
        differing = self.corpus().differences(read_record(self.folder) or {})
        if differing:
            remedy = (
                "--config.overwrite=True to discard the run"
                if self.is_target
                else f"delete {self.folder}"
            )
            raise UserError(
                f"{self.folder} was trained on other tokens than "
                f"{self.settings.data.source} holds now ({', '.join(differing)} differ)"
                f": give it the same data, use another --config.workdir, or {remedy}"
            )

    def run(self, checked: Setup | None = None) -> None:
        """Trains, from the newest checkpoint if there is one.

        `checked` is the result of `check`.
        """
        is_new = self.status() == TO_DO  # Imports may have been made since `check`.
        setup = checked or Setup.of(self.settings, self.corpus())
        record = {
            **setup.settings.to_dict(),
            "imported_sha256": initialise.fingerprints(setup.settings),
            "vocab_size": setup.model.config.vocab_size,
            "tokenizer": setup.corpus.tokenizer,
            "characters": setup.corpus.characters,
            "corpus": setup.corpus.content,
            "corpus_source": absolute(self.settings.data.source),
        }
        if jax.process_index() == 0:
            if is_new and (self.folder / "config.json").exists():
                shutil.rmtree(self.folder)
            write_record(self.folder, record)
        placement.wait_for_all(self.folder.name)
        train(setup, self.folder, record, self.label)
