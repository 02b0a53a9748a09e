"""A training run as a job: its status, its checks and its training."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import jax

from pcagpt.arms import ARMS
from pcagpt.config import Settings
from pcagpt.data.corpus import Corpus, describe_corpus, open_corpus
from pcagpt.data.sources import absolute
from pcagpt.errors import UserError, warn_once
from pcagpt.files import remove_leftovers
from pcagpt.pipeline.job import DONE, TO_DO, Job
from pcagpt.run import checkpoint, initialise, lock
from pcagpt.run.build import build_config
from pcagpt.run.folder import (
    changed_fields,
    find_record,
    holds_run,
    is_made_here,
    move_aside,
    read_record,
    read_result,
    stranger,
    write_record,
)
from pcagpt.run.trained import open_shared_corpus
from pcagpt.sharding import processes
from pcagpt.training.loop import train
from pcagpt.training.setup import Setup

SPLITS = ("train", "val")  # that a run needs
# {what an arm takes from D: the `model` knobs that must then be the same as D's}
SHARED_WITH_BASELINE = {
    "factors": ("n_embd",),
    "blocks": ("n_embd", "n_layer", "n_head", "block_size", "bias"),
    "weights": (),
}


@dataclasses.dataclass(frozen=True)
class TrainJob(Job):
    """A training run.

    for_arm: the arm that starts from this run, if it is a prerequisite.
    """

    for_arm: str = ""

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
        """'done', 'resumes at step N', 'lacks its config.json' or 'to do'.

        Raises UserError if the folder holds anything but this run, and may not be
        replaced, or a prerequisite that the arm cannot start from.
        """
        if not holds_run(self.folder):
            return TO_DO
        if self._serves_as_prerequisite():
            self._check_start_of_arm()
            return DONE
        conflict = self._conflict()
        if conflict and self._may_replace:
            return TO_DO
        if conflict:
            raise UserError(
                f"{conflict}: use another --config.workdir, or {self._remedy}"
            )
        if read_record(self.folder) is None:
            return "lacks its config.json"
        if read_result(self.folder):
            return DONE
        step = max(checkpoint.steps(self.folder), default=0)
        return f"resumes at step {step}" if step else TO_DO

    def _serves_as_prerequisite(self) -> bool:
        """Whether a finished run is there, or a model that was made elsewhere."""
        if self.is_target or read_record(self.folder) is None:
            return False
        if checkpoint.lack(self.folder):
            return False
        return bool(read_result(self.folder)) or not is_made_here(self.folder)

    def _check_start_of_arm(self) -> None:
        """Raises UserError if `for_arm` cannot start from the run in the folder.

        A warning says in what the run differs from the one that was asked for.
        """
        if found := self._stranger():
            raise UserError(f"{found}: use another --config.workdir, or {self._remedy}")
        if read_result(self.folder):
            own = changed_fields(self.folder, self.record())
            if own:
                warn_once(f"{self.folder} is used as it is: {'; '.join(own)}")
        trained = Settings.of(read_record(self.folder) or {}).model
        asked, takes = self.settings.model, ARMS[self.for_arm].takes
        shared = [name for taken in takes for name in SHARED_WITH_BASELINE[taken]]
        values = {
            name: (getattr(trained, name), getattr(asked, name)) for name in shared
        }
        differing = [
            f"model.{name} (there {there}, here {here})"
            for name, (there, here) in values.items()
            if there != here
        ]
        if differing:
            raise UserError(
                f"{self.folder} has another {', another '.join(differing)}: use "
                "another --config.workdir, or the same model"
            )

    def _stranger(self) -> str | None:
        """Why a checkpoint in the folder is not the run's own, if one is not."""
        found = (stranger(self.folder, step) for step in checkpoint.steps(self.folder))
        return next(filter(None, found), None)

    @property
    def _remedy(self) -> str:
        if self.is_target:
            return "--config.overwrite=True to move it aside and train again"
        return f"move {self.folder} away to train it again"

    @property
    def _may_replace(self) -> bool:
        return self.is_target and self.settings.overwrite

    def _conflict(self) -> str | None:
        """What the folder holds, if it is not this run; None if it is, or is empty.

        Raises UserError for a damaged file, unless the folder may be replaced.
        """
        try:
            return self._difference() if holds_run(self.folder) else None
        except UserError as damage:
            if self._may_replace:
                return str(damage)
            raise

    def _difference(self) -> str | None:
        """How a folder that holds a run differs from this run; None if it does not."""
        if find_record(self.folder) is None:
            return (
                f"{self.folder} holds a run without its config.json, and no checkpoint "
                "has a copy"
            )
        if read_result(self.folder) and (lack := checkpoint.lack(self.folder)):
            return f"{self.folder} is finished, but {lack}"
        changed = changed_fields(self.folder, self.record())
        if not changed and self._may_replace and (other := self._other_tokens()):
            return other
        if changed:
            return (
                f"{self.folder} was trained with another config: {'; '.join(changed)}"
            )
        if found := self._stranger():
            return found
        if read_result(self.folder) is None and not is_made_here(self.folder):
            return f"{self.folder} holds a model that was made elsewhere"
        return None

    def record(self) -> dict[str, Any]:
        """The settings and the hashes of all imports, as `status` compares them.

        The hash of an import that is missing or damaged is None, because `status` needs
        no more of it. A warning says what is damaged.
        """
        recorded = (find_record(self.folder) or {}).get("imported_sha256")
        settings, hashes, damage = initialise.known_imports(self.settings, recorded)
        for reason in damage:
            warn_once(f"{self.folder} is not compared with an import: {reason}")
        return {**settings.to_dict(), "imported_sha256": hashes}

    def corpus(self) -> Corpus:
        """The run's corpus; tokenizes its text if necessary, in the first process."""
        return open_shared_corpus(self.settings.data, self.settings.cache_dir, SPLITS)

    def check_vocabulary(self, to_be_made: set[Path]) -> None:
        """Raises UserError if the model does not fit the corpus or the device."""
        data = self.settings.data
        described = describe_corpus(data.source, data.tokenizer, SPLITS)
        build_config(self.settings.model, described.vocab_size)

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

    def compare_corpus(self, is_needed: bool) -> str | None:
        """As `check_corpus`; a line if a corpus that is not needed is missing."""
        try:
            self.corpus()
        except UserError as error:
            if is_needed:
                raise
            return f"{self.folder.name} is not compared with its corpus: {error}"
        self.check_corpus()
        return None

    def check_corpus(self) -> None:
        """Raises UserError if the run in the folder was trained on other tokens."""
        if other := self._other_tokens():
            raise UserError(
                f"{other}: give it the same data, use another --config.workdir, or "
                f"{self._remedy}"
            )

    def _other_tokens(self) -> str | None:
        """How the corpus differs from that of the run in the folder, if it does."""
        data = self.settings.data
        corpus = open_corpus(
            data.source, self.settings.cache_dir, data.tokenizer, SPLITS
        )
        record = find_record(self.folder) or {}
        differing = corpus.differences(record)
        if not differing:
            return None
        return (
            f"{self.folder} was trained on other tokens than {data.source} holds now "
            f"({', '.join(differing)} differ){corpus.older_tokens(record)}"
        )

    def run(self, checked: Setup | None = None) -> None:
        """Trains the run; continues from its newest checkpoint if it has one.

        Waits while another command holds the folder; nothing is left to do if it made
        this run. `checked` is the result of `check`.
        """
        with lock.held(self.folder, meanwhile=self.status) as check_lock:
            # Imports may have been made since `check`.
            stored = processes.from_first(self._take_up)
            if stored is None:
                return
            run_id = stored["run_id"]
            setup = checked or Setup.of(self.settings, self.corpus())
            record = {
                **setup.settings.to_dict(),
                "run_id": run_id,
                "imported_sha256": initialise.fingerprints(setup.settings),
                "vocab_size": setup.model.config.vocab_size,
                **_text_of(setup.corpus, stored),
                "corpus_source": absolute(self.settings.data.source),
            }

            def check_place() -> None:
                check_lock()
                if (read_record(self.folder) or {}).get("run_id") != run_id:
                    raise UserError(
                        f"stopped, because {self.folder} was removed or replaced while "
                        "this run trained there"
                    )

            if jax.process_index() == 0:
                if self._conflict():  # It may be replaced: `status` did not raise.
                    move_aside(self.folder)
                write_record(self.folder, record)
                remove_leftovers(self.folder)
            processes.wait_for_all(self.folder.name)
            train(setup, self.folder, record, self.label, check_place)

    def _alone(self) -> tuple[str, str, Settings]:
        return "is not trained", "configs/baseline.py", self.settings

    def _take_up(self) -> dict[str, Any] | None:
        """The record of the run that goes on; of a new one, its id. None if it is done.

        Restores a lost config.json. The caller holds the lock.
        """
        status = self.status()
        stored = None if self._conflict() else find_record(self.folder)
        # Another command may just have made it from another corpus.
        if stored or status == DONE:
            self.check_corpus()
        if stored and read_record(self.folder) is None:
            write_record(self.folder, stored)
            status = self.status()
        if status == DONE:
            return None
        return {"run_id": secrets.token_hex(8)} | (stored or {})


def _text_of(corpus: Corpus, known: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the corpus and of the text that its tokens stand for.

    A run that goes on keeps what its record knows, because the meta file beside its
    tokens may be gone.
    """
    content = {name: value for name, value in corpus.content.items() if value}
    return {
        "tokenizer": corpus.tokenizer or known.get("tokenizer"),
        "characters": corpus.characters or known.get("characters"),
        "corpus": corpus.content | (known.get("corpus") or {}) | content,
    }
