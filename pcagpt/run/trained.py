"""Opens a trained run: its record, model, weights and corpus."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pcagpt import trees
from pcagpt.config import Settings
from pcagpt.config.schema import DataSettings, ModelSettings
from pcagpt.config.tasks import TASKS
from pcagpt.data import vocabulary
from pcagpt.data.corpus import TRAINING_PARTS, Corpus, describe_corpus, open_corpus
from pcagpt.errors import UserError, warn_once
from pcagpt.factorization.factor_files import check_rows_differ
from pcagpt.files import keep
from pcagpt.model import DEVICE_KNOBS, GPT, GPTConfig, full_table
from pcagpt.run import checkpoint, digests, fingerprint, foreign, other_decoder
from pcagpt.run.build import build_config
from pcagpt.run.folder import FolderState, choose, look, read_record
from pcagpt.run.identity import claims, contradiction
from pcagpt.run.own_tokens import OwnTokens
from pcagpt.sharding import placement, processes


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run.

    `record` is its config.json. A folder with a config.json and a checkpoint is enough:
    the model need not have been trained here. `stamps`: of the weights' files, when the
    run was opened. `tokenizer_sha256`: see `with_tokenizer`.
    """

    folder: Path
    step: int
    record: dict[str, Any]
    stamps: dict[str, tuple[int, ...]] | None = None
    tokenizer_sha256: str | None = None

    @classmethod
    def open(cls, path: str | Path, *, any_architecture: bool = False) -> "Run":
        """The newest checkpoint of RUN, or the one in RUN/ckpt/STEP.

        All processes must call this.

        Args:
          path: see above.
          any_architecture: also accept a model that only transformers computes.

        Raises:
          UserError: as for `choose`, no model in config.json, or another architecture.
        """

        def find() -> tuple[FolderState, int]:
            try:
                return choose(path)
            except UserError:
                if architecture := _architecture_of_table(Path(path)):
                    raise other_decoder.only_a_table(path, architecture) from None
                raise

        # The run may be training: every process must open the same step.
        there, step = processes.from_first(find)
        folder, record = there.folder, there.stored
        if not {"model", "vocab_size"} <= record.keys():
            raise UserError(
                f"{folder} has no model in its config.json: it is not a run's folder"
            )
        run = cls(folder, step, record, there.stamps)
        if run.architecture and not any_architecture:
            raise other_decoder.refusal(folder, run.architecture)
        return run

    @classmethod
    def asked(cls, settings: Settings) -> "Run":
        """The run in `model_path`; raises as `open` and `check_model` do."""
        takes_any = TASKS[settings.task].any_architecture
        run = cls.open(settings.model_path, any_architecture=takes_any)
        run.check_model(settings)
        return run

    @property
    def architecture(self) -> str | None:
        """The name of a model that only transformers computes; None for our own."""
        return self.record.get("architecture")

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings of the run; a knob newer than the run has its default."""
        stored = Settings.of(self.record)
        return stored.replace({"model.vocab_size": self.record["vocab_size"]})

    def check_model(
        self, settings: Settings, free: Collection[str] = DEVICE_KNOBS
    ) -> None:
        """Raises UserError if a `model` knob is given another value than the run's.

        Knobs in `free` may differ.
        """
        asked, given, stored = settings.model, settings.given, self.settings.model
        if self.architecture:  # Only the length of its windows is open.
            free = ("block_size",)
        for field in dataclasses.fields(asked):
            value, trained = getattr(asked, field.name), getattr(stored, field.name)
            is_fixed = field.name not in free and f"model.{field.name}" in given
            if is_fixed and value != trained:
                own = f"was trained with {trained}"
                if self.architecture:
                    own = f"holds a {self.architecture} with settings of its own"
                raise UserError(
                    f"model.{field.name} is {value}, but {self.folder} {own}: leave it "
                    "out, because a run keeps its model"
                )

    def model_settings(
        self, asked: ModelSettings, free: Collection[str] = DEVICE_KNOBS
    ) -> ModelSettings:
        """The `model` section of the run, with the knobs in `free` from `asked`."""
        chosen = {name: getattr(asked, name) for name in free}
        return dataclasses.replace(self.settings.model, **chosen)

    def config(self, asked: ModelSettings) -> GPTConfig:
        """The config of the run's model; only `DEVICE_KNOBS` come from `asked`."""
        return build_config(self.model_settings(asked), self.record["vocab_size"])

    @functools.cached_property
    def weights(self) -> dict:
        """Stored {'params', 'constants'}: host arrays.

        Raises UserError for a damaged file, and as `check_unchanged`.
        """
        # Also taken before the weights are read: stamps of two models can be equal.
        _ = self.fingerprint
        with digests.present(self._checkpoint):
            weights = checkpoint.load_weights(self._checkpoint)
        self.check_unchanged()
        return weights

    def check_unchanged(self) -> None:
        """Raises UserError if the folder no longer holds the run that was opened.

        Another command may have moved the run aside and trained it anew. The checkpoint
        may be missing, because a run that still trains deletes old ones.
        """
        stored: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):  # It is just being replaced.
            stored = look(self.folder, [self.step]).stored or {}
        names = ("run_id", "model", "vocab_size", "tokenizer")
        is_same = all(stored.get(name) == self.record.get(name) for name in names)
        is_same = is_same and not contradiction(claims(self.record), stored)
        here = self._checkpoint
        if is_same and here.exists():
            with contextlib.suppress(digests.Deleted), digests.present(here):
                is_same = self.stamps in (None, digests.stamps(here))
                is_same = is_same and fingerprint.of(here) == self.fingerprint
        if not is_same:
            raise UserError(
                f"{self.folder} was replaced or changed while this command used it: "
                "run the same command again"
            )

    def variables(self, config: GPTConfig) -> dict:
        """{'params', 'constants'} for a model of this config, as host arrays.

        Raises:
          UserError: the checkpoint is damaged, or holds another model.
        """
        stored = trees.flatten(self.weights)
        tokens_BT = jax.ShapeDtypeStruct((1, 1), "int32")
        wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)
        missing = [name for name in trees.flatten(wanted) if name not in stored]
        if missing:
            raise UserError(
                f"{self._checkpoint} lacks '{missing[0]}', which the model of its "
                "config.json has: put the run's own files there, or name another "
                "checkpoint"
            )
        source = str(self._checkpoint)
        return {"constants": {}} | trees.replace(wanted, stored, source=source)

    def load(self, asked: ModelSettings, mesh: Mesh | None = None) -> tuple[GPT, dict]:
        """The model of `config`, and its variables on the mesh or on one device.

        Raises UserError as for `variables`.
        """
        model = GPT(self.config(asked))
        host = self.variables(model.config)
        return model, jax.device_put(host, mesh and placement.shardings(host, mesh))

    @property
    def table_shape(self) -> tuple[int, int]:
        """[V, D] of the table without padding rows; UserError if it is factorized."""
        model = self.settings.model
        if model.is_factorized:
            raise UserError(
                f"{self.folder} already has a factorized embedding: give a baseline, "
                "such as checkpoints/gpt_baseline"
            )
        return self.record["vocab_size"], model.n_embd

    def table(self) -> np.ndarray:
        """The full token table to factorize, float32 of `table_shape`.

        Raises UserError as `table_shape` and `check_rows_differ` do.
        """
        vocab_size, _ = self.table_shape
        table_VD = np.asarray(full_table(self.weights)[:vocab_size], np.float32)
        check_rows_differ(table_VD, f"the token table of {self._checkpoint}")
        return table_VD

    @property
    def tokens(self) -> OwnTokens:
        """Its tokenizer, and which corpora have tokens of it."""
        return OwnTokens(self.folder, self.record, self.tokenizer_sha256)

    def with_tokenizer(self, asked: str) -> "Run":
        """The run, which from now on refuses its tokenizer if its files change.

        `asked`: as for `OwnTokens.tokenizer_name`, which also says what it raises.
        """
        name = self.tokens.tokenizer_name(asked)
        sha256 = vocabulary.describe(name).sha256 if name else None
        return dataclasses.replace(self, tokenizer_sha256=sha256)

    def data(self, asked: DataSettings) -> DataSettings:
        """The corpus that was asked for, or the run's own if none was.

        The run's own folder is found from any working directory. `asked.tokenizer`
        applies to both corpora.

        Raises UserError if none was asked for and the run's record names none.
        """
        if asked.source:
            return self.tokens.with_tokenizer(asked)
        own, folder = self.settings.data, self.record.get("corpus_source")
        is_there = isinstance(folder, str) and Path(folder).exists()
        tokenizer = asked.tokenizer
        if tokenizer == "auto":
            # The setting may be a path from another working directory.
            name, file = own.tokenizer, self.record.get("tokenizer")
            is_known = isinstance(file, str) and name != "auto" and Path(file).exists()
            tokenizer = file if is_known else name
        if not (is_there or self.record.get("data", {}).get("source")):
            raise UserError(
                f"{self.folder} does not say what it was trained on: name a corpus as "
                "--config.data.source"
            )
        source = folder if is_there else own.source
        return dataclasses.replace(own, source=source, tokenizer=tokenizer)

    def checked_data(
        self, asked: DataSettings, splits: Collection[str]
    ) -> DataSettings:
        """As `data`; UserError if its tokens are not the model's. Tokenizes nothing."""
        data = self.data(asked)
        described = describe_corpus(
            data.source, data.tokenizer, splits, self.tokens.encodes_as
        )
        self.tokens.check_unedited(described.tokenizer)
        if asked.source or asked.tokenizer != "auto":
            self.tokens.check_is_told(described, asked.tokenizer)
            self.tokens.check(described)
        return data

    def corpus(
        self, asked: DataSettings, cache_dir: Path, splits: Collection[str]
    ) -> Corpus:
        """Opens the corpus of `data`, which must have some splits.

        If `asked` names another corpus than the run's own, a line on stderr says so.
        All processes must call this.

        Raises:
          UserError: its tokens do not fit the model, a split is missing, or `asked`
            names no corpus and the run's own is unknown or has changed. If the
            vocabulary or the tokenizer does not fit, nothing has been tokenized.
        """
        data = processes.from_first(lambda: self.checked_data(asked, splits))
        corpus = open_corpus(
            data.source, cache_dir, data.tokenizer, splits, self.tokens.encodes_as
        )
        differing = corpus.changed_parts(self.record, {*TRAINING_PARTS, *splits})
        if differing and not asked.source:
            own_cache = Path(
                self.settings.data.cache_dir or self.folder.parent / "data"
            )
            raise UserError(
                f"{data.source} is no longer the corpus that {self.folder} was trained "
                f"on ({', '.join(differing)} changed)"
                f"{corpus.older_tokens(self.record, own_cache)}: restore it, or name a "
                "corpus as --config.data.source"
            )
        self.check_corpus(corpus, data.source, splits)
        return self.tokens.within_rows(corpus, splits)

    def is_own(self, corpus: Corpus, splits: Collection[str] = ()) -> bool | None:
        """Whether the run was trained on these tokens; None if its record is silent.

        Also compares `splits`.
        """
        differing = corpus.changed_parts(self.record, {*TRAINING_PARTS, *splits})
        return None if differing is None else not differing

    def check_corpus(
        self, corpus: Corpus, source: str, splits: Collection[str] = ()
    ) -> None:
        """Raises UserError if the corpus has unknown ids, or another tokenizer.

        `source` is what the person calls it. Warns if the training parts or `splits`
        differ from those of the run's own corpus.
        """
        self.tokens.check(corpus)
        differing = corpus.changed_parts(self.record, {*TRAINING_PARTS, *splits}) or []
        if "tokenizer_sha256" in differing:
            raise self.tokens.other_numbering(corpus)
        if differing and jax.process_index() == 0:
            warn_once(
                f"{source} is another corpus than the one that {self.folder} "
                "was trained on"
            )

    def results_in(self, workdir: str | Path) -> Path:
        """The folder of what is measured on the run: its own.

        Of a model of another program, a folder in the workdir. Its name holds a part of
        the fingerprint, because two models may have one name.
        """
        if not foreign.is_model(self.folder):
            return self.folder
        name = f"{self.folder.resolve().name}-{self.fingerprint[:8]}"
        return Path(workdir) / "measured" / name

    def keep_result(self, path: Path, write: Callable[[Path], Any]) -> bool:
        """As `files.keep`; `path` is in `results_in`, which may not exist yet."""

        def write_there(path: Path) -> None:
            if path.parent != self.folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write(path)

        return keep(path, write_there)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that identifies this checkpoint: that of the loaded weights."""
        with digests.present(self._checkpoint):
            return fingerprint.of(self._checkpoint)

    def is_at(self, recorded: str | None) -> bool:
        """Whether `recorded` is this checkpoint's fingerprint, by any version."""
        same = recorded == self.fingerprint
        return same or fingerprint.same(self._checkpoint, recorded)

    @property
    def _checkpoint(self) -> Path:
        return checkpoint.folder_of(self.folder, self.step)


def _architecture_of_table(folder: Path) -> str | None:
    """The architecture, if a folder holds only a compressed table."""
    with contextlib.suppress(UserError, OSError):
        record = read_record(folder) or {}
        return record.get("architecture") if record.get("compressed") else None
    return None
