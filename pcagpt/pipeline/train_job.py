"""A training run as a job: its status, its checks and its training."""

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pcagpt.arms import ARMS
from pcagpt.config import Settings
from pcagpt.config.command_line import next_command
from pcagpt.config.schema import (
    CompressSettings,
    FactorizeSettings,
    FinetuneSettings,
    ScratchSettings,
)
from pcagpt.data.corpus import (
    Corpus,
    check_package,
    describe_corpus,
    made_corpus,
    open_corpus,
)
from pcagpt.data.sources import absolute_source
from pcagpt.errors import UserError, warn_once
from pcagpt.files import remove_leftovers
from pcagpt.model import BLOCK_KNOBS, training_flops_per_token
from pcagpt.pipeline.differences import differences
from pcagpt.pipeline.job import DONE, TO_DO, Job, Kind, Status
from pcagpt.report.text import fixed
from pcagpt.run import checkpoint, fingerprint, generation_files, initialise, lock
from pcagpt.run.build import build_config
from pcagpt.run.folder import (
    FolderState,
    look,
    make_room,
    move_aside,
    read_record,
    read_result,
    watching,
    write_record,
)
from pcagpt.run.identity import changed_fields
from pcagpt.run.trained import Run
from pcagpt.sharding import processes
from pcagpt.training.loop import train
from pcagpt.training.meter import NotFinite
from pcagpt.training.setup import Setup

NEEDED_SPLITS = ("train", "val")
# {what an arm takes from D: the `model` knobs that must then be the same as D's}
SHARED_WITH_BASELINE = {
    "factors": ("n_embd",),
    "blocks": BLOCK_KNOBS,
    "weights": BLOCK_KNOBS,
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
    def made(self) -> str:
        """The steps of the run in the folder, which may differ from `amount`."""
        steps = (read_result(self.folder) or {}).get("steps")
        return f"{steps:,} steps" if steps else "made elsewhere"

    @property
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""
        paths = initialise.imported_paths(self.settings).values()
        return {*paths, *(path.parent for path in paths)}

    def flops(self) -> float:
        """As in `Job`; those of a teacher are not counted."""
        data, budget = self.settings.data, self.settings.train
        described = describe_corpus(data.source, data.tokenizer, NEEDED_SPLITS)
        config = build_config(self.settings.model, described.vocab_size)
        _, is_replaced = self._judge(look(self.folder))
        done = 0 if is_replaced else max(checkpoint.steps(self.folder), default=0)
        tokens = (budget.steps - done) * budget.batch_size * config.block_size
        return tokens * training_flops_per_token(config)

    def found(self) -> list[str]:
        """The loss, and a command that compresses D or samples from another model."""
        result = read_result(self.folder) or {}
        # Infinite values are null. Older versions lack some fields.
        loss = fixed(result.get("val_loss"), 4)
        perplexity = fixed(result.get("perplexity"), 1)
        has_full_table = self.settings.arm == "baseline"
        return [
            f"val loss {loss}, perplexity {perplexity}: {self.folder}",
            next_command("compress", self.folder, workdir=self.folder.parent)
            if has_full_table
            else next_command("sample", self.folder),
        ]

    def status(self) -> Status:
        """'done', 'resumes at step N', 'lacks its config.json' or 'to do'.

        Raises UserError if the folder holds something else that may not be replaced, or
        a D that `for_arm` cannot start from.
        """
        return self._judge(look(self.folder))[0]

    def _judge(self, there: FolderState) -> tuple[Status, bool]:
        """The status of what is there, and whether it is moved aside for a new run."""
        if not there.is_begun:
            return TO_DO, False
        if self._serves_as_prerequisite(there):
            self._check_start_of_arm(there)
            return DONE, False
        if conflict := self._conflict(there):
            if self._may_replace:
                return TO_DO, True
            raise there.damage or UserError(
                f"{conflict}: use another --config.workdir, or {self._remedy}"
            )
        if there.record is None:
            return Status(Kind.BEGUN, "lacks its config.json"), False
        if there.result:
            return DONE, False
        step = max((saved.step for saved in there.saved), default=0)
        resumes = Status(Kind.BEGUN, f"resumes at step {step}")
        return resumes if step else TO_DO, False

    def _serves_as_prerequisite(self, there: FolderState) -> bool:
        """Whether a finished run is there, or a model that was made elsewhere."""
        if self.is_target or there.record is None:
            return False
        return bool(there.result or not there.is_made_here) and not there.lack

    def _check_start_of_arm(self, there: FolderState) -> None:
        """Raises UserError if `for_arm` cannot start from the run in the folder.

        A warning says in what the run differs from the one that was asked for.
        """
        if found := there.stranger:
            raise UserError(f"{found}: use another --config.workdir, or {self._remedy}")
        if there.result and (changed := self._changed(there)):
            warn_once(f"{self.folder} is used as it is: {'; '.join(changed)}")
        shared = [
            f"model.{name}"
            for taken in ARMS[self.for_arm].takes
            for name in SHARED_WITH_BASELINE[taken]
        ]
        trained, asked = Settings.of(there.record).flat(), self.settings.flat()
        if differing := differences(trained, asked, dict.fromkeys(shared)):
            raise UserError(
                f"{self.folder} has another {', another '.join(differing)}: use "
                "another --config.workdir, or the same model"
            )

    @property
    def _remedy(self) -> str:
        if self.is_target:
            return (
                "give --config.overwrite=True, which moves this run aside and trains "
                "it again"
            )
        return f"move {self.folder} away to train it again"

    @property
    def _may_replace(self) -> bool:
        return self.is_target and self.settings.overwrite

    def _conflict(self, there: FolderState) -> str | None:
        """How what is there differs from this run; None if it does not."""
        if there.damage:
            return str(there.damage)
        if there.stored is None:
            return (
                f"{self.folder} holds a run without its config.json, and no checkpoint "
                "has a copy"
            )
        if there.result and there.lack:
            return f"{self.folder} is finished, but {there.lack}"
        if there.saved and (lack := there.lack or self._lack_to_go_on(there)):
            return f"{self.folder} {lack}"
        if found := there.stranger:
            return found
        if there.result is None and not there.is_made_here:
            return f"{self.folder} holds a model that was made elsewhere"
        if changed := self._changed(there):
            how = f"{self.folder} was trained with another config"
            if all("imported_sha256.weights_from" in field for field in changed):
                how = (
                    f"{self.settings.init.weights_from} is another model than the one "
                    f"that {self.folder} started from{self._moved_source(there)}"
                )
            return f"{how}: {'; '.join(changed)}"
        if there.saved and not there.result and (dtype := self._other_dtype(there)):
            return f"{self.folder} was begun with another {dtype}"
        if self._may_replace:  # Otherwise `compare_corpus` and `run` compare them.
            return self._other_tokens(self.corpus(), there.stored)
        return None

    def _lack_to_go_on(self, there: FolderState) -> str | None:
        """What an unfinished run lacks, so that it can only be trained again.

        None if it lacks nothing, or may not be replaced.
        """
        if there.result or not self._may_replace:
            return None
        return checkpoint.lack(self.folder, checkpoint.ITEMS)

    def _other_dtype(self, there: FolderState) -> str:
        """How the compute dtype of an unfinished run differs; '' if it does not.

        Older versions recorded 'auto'.
        """
        name, own = "compute_dtype", self.compute_dtype
        if own is None:
            return ""
        begun = (there.stored.get("model") or {}).get(name, "auto")
        of_run, here = {name: own if begun == "auto" else begun}, {name: own}
        return "".join(differences(of_run, here, [name]))

    def _moved_source(self, there: FolderState) -> str:
        """' (that one is PATH)' if the run's start is where it was, or beside it."""
        source = checkpoint.find(self.settings.init.weights_from)[0].resolve()
        recorded = (there.stored.get("imported_sha256") or {}).get("weights_from")
        named = (there.stored.get("init") or {}).get("weights_from")
        moved = sorted(source.parent.glob(f"{source.name}.replaced-*"))
        for kept in [*([named] if named else []), *moved]:
            with contextlib.suppress(UserError):
                if fingerprint.same(kept, recorded):
                    return f" (that one is {kept})"
        return ""

    def _changed(self, there: FolderState) -> list[str]:
        """`changed_fields` of the run that is there."""
        return changed_fields(
            there.stored, self.record(there.stored.get("imported_sha256"))
        )

    def record(self, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings and the hashes of all imports, as `status` compares them.

        `recorded` are the hashes in the record of the run in the folder. The hash of a
        missing or damaged import is None; `status` does not compare it. A warning says
        what is damaged.
        """
        settings, hashes, damage = initialise.known_imports(self.settings, recorded)
        for reason in damage:
            warn_once(f"{self.folder} is not compared with an import: {reason}")
        return {**settings.to_dict(), "imported_sha256": hashes}

    def planned_row(self) -> dict[str, Any]:
        """Of a report's row, what is known before training and may differ from D's."""
        resolved = {"compute_dtype": self.compute_dtype}
        return {"folder": self.folder.name, "resolved": resolved}

    def corpus(self) -> Corpus:
        """The run's corpus; tokenizes its text if necessary, in the first process.

        All processes must call this.
        """
        data, cache_dir = self.settings.data, self.settings.cache_dir
        return open_corpus(data.source, cache_dir, data.tokenizer, NEEDED_SPLITS)

    def check_early(self, missing: set[Path]) -> None:
        """Raises UserError if the model does not fit the vocabulary or the device.

        Also if the tokens are not those of the model that the run starts from, if no
        checkpoint can be saved in the folder, if an import is missing or damaged, or if
        the folder's name does not give the rank of imported bands.
        """
        checkpoint.check_path(self.folder)
        if self.status().kind == Kind.TO_DO:
            not_made = self._not_made(missing)
            initialise.import_hashes(self.settings, not_made)
            # Older versions have begun runs under another rank. These can go on.
            bands = "init.import_bands"
            if bands in initialise.imported_paths(self.settings).keys() - not_made:
                initialise.check_rank(self.settings)
        data = self.settings.data
        described = describe_corpus(data.source, data.tokenizer, NEEDED_SPLITS)
        # That tokens are not those of its start tells more than their number.
        start = initialise.start_of(self.settings)
        if start and Path(start) not in missing:
            tokens = Run.open(start).tokens
            tokens.check_is_told(described, data.tokenizer)
            tokens.check(described)
        check_package(data.source, self.settings.cache_dir, data.tokenizer)
        build_config(self.settings.model, described.vocab_size)

    def check(self, missing: set[Path]) -> Setup | None:
        """Raises UserError if settings, corpus, imports and devices do not fit.

        Imports from the folders `missing` are not checked. The result is the setup for
        `run`, or None if an import is missing.
        """
        not_made = self._not_made(missing)
        setup = Setup.of(self.settings, self.corpus(), not_made)
        return None if not_made else setup

    def _not_made(self, missing: set[Path]) -> set[str]:
        """The knobs of the imports that jobs in the folders `missing` make."""
        return {
            knob
            for knob, path in initialise.imported_paths(self.settings).items()
            if {path, path.parent} & missing
        }

    def remark(self) -> str:
        """As in `Job`: whether the run was trained on what its corpus holds now."""
        data, cache_dir = self.settings.data, self.settings.cache_dir
        try:
            stored = look(self.folder).stored or {}
            corpus = made_corpus(data.source, cache_dir, data.tokenizer, NEEDED_SPLITS)
            differing = corpus and corpus.changed_parts(stored)
        except (UserError, OSError):  # `compare_corpus` tells it.
            return ""
        if corpus is None:
            return f", {data.source} is not tokenized yet"
        return f", on other tokens than {data.source} holds now" if differing else ""

    def compare_corpus(self, is_needed: bool) -> str | None:
        """As in `Job`; `run` compares again."""
        return processes.from_first(lambda: self._compare_corpus(is_needed))

    def _compare_corpus(self, is_needed: bool) -> str | None:
        """As `compare_corpus`, in one process."""
        try:
            corpus = self.corpus()
        except (UserError, OSError) as error:
            if is_needed:
                raise
            # The tokens of a text may be lost, and the folder for them read-only.
            return f"{self.folder.name} is not compared with its corpus: {error}"
        self._check_tokens(corpus, look(self.folder).stored or {})
        return None

    def _check_tokens(self, corpus: Corpus, stored: dict[str, Any]) -> None:
        """Raises UserError if the run with this record was trained on other tokens."""
        if other := self._other_tokens(corpus, stored):
            raise UserError(
                f"{other}: give it the same data, use another --config.workdir, or "
                f"{self._remedy}"
            )

    def _other_tokens(self, corpus: Corpus, stored: dict[str, Any]) -> str | None:
        """How the corpus differs from that of the run with this record, if it does."""
        differing = corpus.changed_parts(stored)
        if not differing:
            return None
        beside = self.folder.parent / "data"
        return (
            f"{self.folder} was trained on other tokens than "
            f"{self.settings.data.source} holds now "
            f"({', '.join(differing)} differ){corpus.older_tokens(stored, beside)}"
        )

    def run(self, checked: Setup | None = None, command: str = "") -> None:
        """Trains the run; continues from its newest checkpoint if it has one.

        Waits while another command holds the folder; nothing is left to do if it made
        this run. `checked` and `command` are as in `Job`.
        """
        with (
            lock.held(self.folder, meanwhile=self.status) as check_lock,
            watching(self.folder / checkpoint.FOLDER) as check_saves,
        ):
            corpus = checked.corpus if checked else self.corpus()
            begun = processes.from_first(lambda: self._take_up(corpus))
            if begun is None:
                return
            stored, is_replaced = begun
            # Imports may have been made since `check`.
            setup = checked or Setup.of(self.settings, corpus)
            record = _full_record(setup, stored)

            def check_folder() -> None:
                if (read_record(self.folder) or {}).get("run_id") != record["run_id"]:
                    raise UserError(
                        f"stopped, because {self.folder} was removed or replaced while "
                        "this run trained there: if it was moved, what was saved moved "
                        "with it; move it back and run the same command again to go on"
                    )

            def check_place() -> None:
                check_lock()
                corpus.check_unchanged()
                check_folder()
                check_saves()

            if jax.process_index() == 0:
                check_lock()
                if is_replaced:
                    make_room(self.folder)
                move_aside(self.folder / "result.json")  # Of another run
                write_record(self.folder, record)
                remove_leftovers(self.folder)
            processes.wait_for_all(self.folder.name)
            checks = check_lock, check_place
            try:
                train(setup, self.folder, record, self.label, *checks, command)
            except NotFinite as error:
                knob = ARMS[self.settings.arm].rate_share or "train.learning_rate"
                cause = f"lower {knob}"
                if error.is_of_start:  # No learning rate did it.
                    cause = "replace the weights or tables that it starts from (init.*)"
                raise UserError(f"{error}: {cause} and {self._remedy}") from None
            # Without its folder, each writer raises errors of its own.
            except Exception as error:
                check_folder()
                with contextlib.suppress(OSError):
                    if not checkpoint.steps(self.folder):
                        error.unsaved = self.folder.name  # `main` tells it.
                raise

    def _how_to_make(self) -> tuple[str, str, Settings]:
        # D does not read the shares of the arms, nor what makes their tables.
        unread = {"finetune": FinetuneSettings(), "scratch": ScratchSettings()}
        unread |= {"factorize": FactorizeSettings(), "compress": CompressSettings()}
        settings = self.settings.replace(unread)
        return "is not trained", "configs/baseline.py", settings

    def _take_up(self, corpus: Corpus) -> tuple[dict[str, Any], bool] | None:
        """(record, is_replaced), or None if the run is done; the caller holds the lock.

        record: the record of the run to continue, or only a new run_id; is_replaced:
        whether what is there is moved aside. Restores a lost config.json.
        """
        there = look(self.folder)
        status, is_replaced = self._judge(there)
        stored = there.stored if there.is_begun and not is_replaced else None
        if stored:
            # Another command may just have made it from another corpus.
            self._check_tokens(corpus, stored)
            if there.record is None:
                write_record(self.folder, stored)
            if status.kind == Kind.DONE or there.result:
                return None
            if line := there.unproved:
                warn_once(line)
        return {"run_id": secrets.token_hex(8)} | (stored or {}), is_replaced


def _full_record(setup: Setup, stored: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: its settings with its compute dtype, what it depends on.

    A run that goes on keeps what its record (`stored`) says of the corpus and of the
    text that its tokens stand for: the meta file beside them may be gone. It also keeps
    the hashes of its imports, which an older formula may have made, and what the model
    that it started from says of writing text.
    """
    corpus, dtype = setup.corpus, setup.model.config.compute_dtype
    settings = setup.settings.replace({"model.compute_dtype": dtype})
    stated = {name: value for name, value in corpus.content.items() if value}
    written = stored.get(generation_files.FIELD) or setup.generation
    return {
        **settings.to_dict(),
        "run_id": stored["run_id"],
        "imported_sha256": setup.imported_sha256
        | (stored.get("imported_sha256") or {}),
        "vocab_size": setup.model.config.vocab_size,
        "tokenizer": corpus.tokenizer or stored.get("tokenizer"),
        "characters": corpus.characters or stored.get("characters"),
        "corpus": corpus.content | (stored.get("corpus") or {}) | stated,
        "corpus_source": absolute_source(settings.data.source),
        **({generation_files.FIELD: written} if written else {}),
    }
