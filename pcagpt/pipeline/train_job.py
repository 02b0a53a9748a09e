"""A training run as a job: whether it is done, resumes or is to do, and doing it."""

import dataclasses
import shutil
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pcagpt.arms import ARMS
from pcagpt.data.corpus import Corpus, fingerprint, open_corpus
from pcagpt.errors import UserError
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.run import initialise as warm_start
from pcagpt.run.folder import DONE, TO_DO
from pcagpt.sharding import placement
from pcagpt.training.loop import Training


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A training run with its folder and complete config.

    is_target: asked for by name, not a prerequisite of what was asked for.
    """

    folder: Path
    config: ConfigDict
    is_target: bool

    @property
    def label(self) -> str:
        """As in 'A gpt_pca_k128'."""
        return f"{ARMS[self.config.arm].letter} {self.folder.name}"

    @property
    def amount(self) -> str:
        """As in '5,000 steps'."""
        return f"{self.config.train.steps:,} steps"

    def status(self) -> str:
        """'done', 'resumes at step N' or 'to do'.

        Raises:
          UserError: the folder holds a run of another config, by the fields' names.
        """
        finished = run_folder.read_result(self.folder) is not None
        if finished and not self.is_target:
            return DONE
        step = max(checkpoint.steps(self.folder), default=0)
        if not finished and step == 0:
            return TO_DO  # Nothing that took time to make.
        changed = run_folder.changed_fields(self.folder, self.record())
        if changed and self.is_target and self.config.overwrite:
            return TO_DO
        if changed:
            raise UserError(
                f"{self.folder} was trained with another config: {'; '.join(changed)}:"
                " use another --config.workdir, or --config.overwrite=True to discard "
                "the run"
            )
        return DONE if finished else f"resumes at step {step}"

    def settled(self) -> ConfigDict:
        """The config, with the bands that it imports once these are there."""
        folder = self.config.init.import_bands
        if not folder or not Path(folder).exists():
            return self.config
        config = self.config.copy_and_resolve_references()
        config.model.update(warm_start.band_settings(config.init))
        return config

    def record(self) -> dict:
        """What config.json holds: the config and the hashes of what is imported.

        Files that are still to be made have no hash yet, and bands no sizes.
        """
        hashes, teacher = None, self.config.distill.teacher
        if all(path.exists() for path in self._taken_from.values()):
            hashes = warm_start.fingerprints(self.config.init)
            if teacher:
                hashes["teacher"] = checkpoint.fingerprint(teacher)
        return {**self.settled().to_dict(), "imported_sha256": hashes}

    @property
    def sources(self) -> set[Path]:
        """Folders of other jobs that this one reads."""
        paths = self._taken_from.values()
        return {*paths, *(path.parent for path in paths)}

    @property
    def _taken_from(self) -> dict[str, Path]:
        """{knob: the file or run that it names} of all that this run imports."""
        named = {f"init.{name}": self.config.init[name] for name in warm_start.IMPORTS}
        named["distill.teacher"] = self.config.distill.teacher
        return {knob: Path(path) for knob, path in named.items() if path}

    def corpus(self) -> Corpus:
        """The run's corpus, made from its source by the first process if need be."""
        data = self.config.data
        folder = Path(data.cache_dir or Path(self.config.workdir) / "data")
        if jax.process_index() == 0:
            open_corpus(data.source, folder, data.tokenizer)
        placement.wait_for_all(f"corpus {data.source}")
        return open_corpus(data.source, folder, data.tokenizer)

    def check(self, to_be_made: set[Path]) -> None:
        """Raises UserError where config, corpus, imports and devices do not fit.

        Args:
          to_be_made: folders of earlier jobs: what is in them is not imported here.
        """
        config = self.settled().copy_and_resolve_references()
        for knob, path in self._taken_from.items():
            if {path, path.parent} & to_be_made:
                config.update_from_flattened_dict({knob: "", "init.keep": "all"})
                freeze = warm_start.IMPORTS.get(knob.removeprefix("init."))
                if freeze:
                    config.init[freeze] = False
        if not config.init.import_bands and self.config.init.import_bands:
            config.model.band_sizes = config.model.band_ranks = ()
            config.init.import_wte_freeze = False
            config.init.import_scale_matrices_freeze = False
        Training(config, {}, self.folder, self.corpus())
        self.check_corpus()

    def check_corpus(self) -> None:
        """Raises UserError if what was trained here was trained on other tokens."""
        stored = run_folder.read_config(self.folder)
        trained_on = (stored or {}).get("corpus_sha256")
        if self.status() == TO_DO or trained_on is None:
            return
        if trained_on != fingerprint(self.corpus()):
            raise UserError(
                f"{self.folder} was trained on other tokens than "
                f"{self.config.data.source} holds now: give it the same data, use "
                f"another --config.workdir, or delete {self.folder}"
            )

    def run(self) -> None:
        """Trains, from the last checkpoint if there is one."""
        corpus = self.corpus()
        is_new = self.status() == TO_DO
        vocab_size = self.config.model.vocab_size or corpus.vocab_size
        record = {
            **self.record(),
            "vocab_size": vocab_size,
            "tokenizer": corpus.tokenizer,
            "corpus_sha256": fingerprint(corpus),
        }
        training = Training(self.settled(), record, self.folder, corpus)
        if jax.process_index() == 0:
            if is_new and (self.folder / "config.json").exists():
                shutil.rmtree(self.folder)
            run_folder.write_config(self.folder, record)
        placement.wait_for_all(self.folder.name)
        training.run(self.label)
