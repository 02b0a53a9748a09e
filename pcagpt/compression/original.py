"""The trained model to compress: its table, statistics and measurements.

Shape letters: V vocabulary, D model width.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from pcagpt import coding
from pcagpt.compression import stored_tensors
from pcagpt.compression.candidates import Candidate, Compressor
from pcagpt.compression.own_model import OwnModel
from pcagpt.compression.sides import INPUT, OUTPUT
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import Corpus
from pcagpt.errors import UserError, warn_once
from pcagpt.factorization import Statistics
from pcagpt.factorization.factor_files import check_rows_differ
from pcagpt.losses.deciles import frequency_deciles
from pcagpt.rows import SwapScores
from pcagpt.run import calibrate, digests
from pcagpt.run.exported import compressions
from pcagpt.run.trained import Run
from pcagpt.sharding import placement

if TYPE_CHECKING:  # It imports torch, which is optional.
    from pcagpt.compression.decoder import Decoder


class Model(Protocol):
    """What measures a model with a full table.

    window: tokens that it reads at a time; part: windows that `statistics` takes at a
    time, 0 if it only takes whole batches; compute_dtype: of its activations;
    device_count: number of devices that it uses; packages: those that compute it
    besides JAX; sides: those of an untied model, none if one table serves input and
    output; side: the one whose table is replaced.
    """

    window: int
    part: int
    compute_dtype: str
    device_count: int
    packages: tuple[str, ...]
    sides: tuple[str, ...]
    side: str

    def statistics(
        self, frequency_V: np.ndarray, batches: Iterable[np.ndarray]
    ) -> Statistics:
        """Statistics over batches of token ids, int32 [B, T]."""

    def of_side(self, side: str) -> "Model":
        """The same model; `score` replaces the table of this side only."""

    def score(
        self,
        table_VD: np.ndarray,
        decile_V: np.ndarray,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> SwapScores:
        """Scores of a table in place of the model's own, on (inputs, targets)."""


def platform_of(run: Run) -> str:
    """'cpu' if a run is measured on a CPU, otherwise another name.

    JAX measures our own models, and PyTorch those of other architectures. UserError if
    these need a package that is not there.
    """
    if not run.architecture:
        return jax.default_backend()
    with of_extra(run.folder, run.architecture):
        from pcagpt.compression.decoder import device
    return device().type


def check_is_original(run: Run) -> None:
    """Raises UserError if the table of a run was made smaller already."""
    _ = run.table_shape  # Its check.
    made = compressions(run.record)
    # One table of an untied model may follow the other.
    if made and {one.get("side") for one in made} not in ({INPUT}, {OUTPUT}):
        raise UserError(
            f"{run.folder} has a compressed table: give the model that it was made "
            f"from, {made[0].get('run')}"
        )


@dataclasses.dataclass(frozen=True)
class Original:
    """A run with a full table, and the text to measure it on.

    table_VD: [V, D] float32 without padding rows; split: of the corpus, to measure on;
    batches: of this split, or of its first `evaluate.max_tokens` targets; calibration:
    tokens and batch_size for `calibrate.statistics`; singular_value_split: as for
    `truncate`; results: the folder that keeps the statistics; told: as for
    `OwnTokens.told_by`.
    """

    run: Run
    corpus: Corpus
    model: Model
    table_VD: np.ndarray
    split: str
    batches: EvaluationBatches
    calibration: dict[str, int]
    singular_value_split: float
    results: Path
    told: dict[str, Any]

    @classmethod
    def of(
        cls, run: Run, settings: Settings, results: Path | None = None
    ) -> "Original":
        """The run with its own corpus, or with the one in `settings.data`.

        `results` is `Run.results_in` the workdir, if it is not given.

        Raises UserError if the table was made smaller already, if the corpus lacks the
        split, or if the corpus or the devices do not fit the run.
        """
        split = settings.split
        check_is_original(run)
        # Before a text is tokenized, which may take long.
        if run.architecture:
            model = _decoder(run, settings.model.block_size)
            table_VD = model.table_VD
            check_rows_differ(table_VD, f"the token table of {run.folder}")
        else:
            mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
            for section in ("train", "evaluate"):
                size = getattr(settings, section).batch_size
                placement.check_divisible(f"{section}.batch_size", size, mesh)
            table_VD = run.table()
            gpt, variables = run.load(settings.model, mesh)
            model = OwnModel(gpt, variables, mesh, settings.train.loss_chunks)
        corpus = run.corpus(settings.data, settings.cache_dir, ["train", split])
        corpus.tokens("train")  # From here on, `check_unchanged` notices a change.
        return cls(
            run,
            corpus,
            model,
            table_VD,
            split,
            batches=EvaluationBatches(
                corpus.tokens(split),
                model.window,
                settings.evaluate.batch_size,
                settings.evaluate.max_tokens,
            ),
            calibration={
                "tokens": settings.compress.calibration_tokens,
                "batch_size": settings.train.batch_size,
            },
            singular_value_split=settings.factorize.singular_value_split,
            results=results or run.results_in(settings.workdir),
            told=run.tokens.told_by(corpus, settings.data.tokenizer),
        )

    def check_unchanged(self) -> None:
        """UserError if the folder of the run now holds another one.

        A model of another architecture is a copy in memory, so that what was made of it
        is right: a warning is enough.
        """
        try:
            self.run.check_unchanged()
        except UserError:
            if not self.run.architecture:
                raise
            warn_once(
                f"{self.run.folder} was replaced or changed after this command read "
                "it: the results are of the model as it was, and to export a table, "
                "restore that one"
            )

    def of_each_table(self) -> list["Original"]:
        """Itself; or, of an untied model, one for each table that is not compressed."""
        if not self.model.sides:
            return [self]
        done = {made.get("side") for made in compressions(self.run.record)}
        sides = [side for side in self.model.sides if side not in done]
        models = map(self.model.of_side, sides)
        found = [
            dataclasses.replace(self, model=model, table_VD=model.table_VD)
            for model in models
        ]
        for one in found:
            place = f"the {one.side} table of {self.run.folder}"
            check_rows_differ(one.table_VD, place)
        return found

    @property
    def side(self) -> str:
        """The side of an untied model whose table this is; '' of any other."""
        return self.model.side

    @property
    def label(self) -> str:
        """The name of the run, and the side if there is one."""
        return f"{self.run.folder.name}{self.side and f', {self.side} table'}"

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics on calibration text; see `calibrate.statistics`."""
        return calibrate.statistics(
            self.run,
            self.corpus,
            self.model.statistics,
            self.results,
            window=self.model.window,
            part=self.model.part,
            compute_dtype=self.model.compute_dtype,
            tables=self._tables,
            **self.calibration,
        )

    def _tables(self) -> list[np.ndarray]:
        """The table of each side, [V, D]."""
        model = self.model
        found = [model.of_side(side).table_VD for side in model.sides]
        return found or [self.table_VD]

    @functools.cached_property
    def compressor(self) -> Compressor:
        """Makes candidates of this table."""
        return Compressor(
            self.table_VD,
            self.statistics,
            self.singular_value_split,
            self.side,
            stores_mean=bool(self.run.architecture),
        )

    def measure(self, candidate: Candidate) -> SwapScores:
        """Scores a candidate in place of the model's table."""
        return self.model.score(candidate.dense, self._decile_V, self.batches)

    @functools.cached_property
    def _decile_V(self) -> np.ndarray:
        return frequency_deciles(self.statistics.frequency)

    @functools.cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything besides a recipe that decides the numbers of a row."""
        protocol = {
            "checkpoint": self.run.fingerprint,
            "table": self.table_VD.shape,
            "corpus_sha256": self.corpus.sha256,
            "split": self.split,
            "window": self.model.window,
            "stride": self.model.window,
            "corpus": self.corpus.name,
            "tokenizer": self.corpus.tokenizer,
            "calibration_tokens": self.calibration["tokens"],
            "calibration_batch_size": self.calibration["batch_size"],
            "compute_dtype": self.model.compute_dtype,
            "singular_value_split": self.singular_value_split,
            "codes": coding.CODES_VERSION,
        }
        if self.side:
            protocol["side"] = self.side
        if self.split == "test":  # corpus_sha256 leaves it out.
            protocol["tokens_sha256"] = self.corpus.tokens_sha256("test")
        if self.batches.is_cut:  # Files without this field used all tokens.
            protocol["evaluated_tokens"] = self.batches.target_count
        return protocol

    @property
    def measured_on(self) -> dict[str, Any]:
        """The text of the numbers, in terms of an evaluation's protocol."""
        return {
            "tokens_predicted": self.batches.target_count,
            "tokens_sha256": self.corpus.tokens_sha256(self.split),
        }

    def renewed(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """A stored protocol in today's terms, if it is of this run and this corpus.

        Older versions hashed checkpoint and corpus in another way. The names of corpus
        and tokenizer are not compared: they may be paths.
        """
        batch_size = {"calibration_batch_size": self.calibration["batch_size"]}
        stored, corpus = batch_size | protocol, self.corpus  # Older files do not say.
        if self.run.is_at(stored.get("checkpoint")):
            stored["checkpoint"] = self.run.fingerprint
        # Rows of codes of another version are left out one by one; see `sweep`.
        stored["codes"] = coding.CODES_VERSION
        stated = stored.get("corpus_sha256")
        is_older = corpus.changed_parts({"corpus_sha256": stated}) == []
        if stated == corpus.sha256 or is_older:
            names = {"corpus": corpus.name, "tokenizer": corpus.tokenizer}
            stored |= {"corpus_sha256": corpus.sha256} | names
        return stored


def _decoder(run: Run, window: int) -> "Decoder":
    """The model of a run of another architecture; UserError without the extra hf."""
    with of_extra(run.folder, run.architecture):
        from pcagpt.compression.decoder import Decoder
    _ = run.fingerprint  # of the files, before they are read
    with digests.present(run.folder):
        model = Decoder(run.folder, window)
        width, expected = model.table_VD.shape[1], run.record["model"]["n_embd"]
        if width != expected:  # Exports would not find it.
            raise UserError(
                f"{run.folder}: its token table has {width} columns, its "
                f"config.json says {expected}: such a model cannot be compressed"
            )
        if run.folder.is_dir():  # Tables of a GGUF file are not exported.
            for side in model.sides or ("",):
                table_VD = model.of_side(side).table_VD
                stored_tensors.check_table(run.folder, side, table_VD)
    run.check_unchanged()
    return model


@contextlib.contextmanager
def of_extra(folder: Path, architecture: str | None) -> Iterator[None]:
    """Imports of the extra hf for a model; UserError if a package is lacking."""
    try:
        yield
    except ImportError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise UserError(
            f"{folder} holds a {architecture}, which needs the package "
            f"{error.name}: pip install 'pcagpt[hf]'"
        ) from None
