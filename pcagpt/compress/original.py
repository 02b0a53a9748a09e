"""The trained model to compress: its table, statistics and measurements.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pcagpt.compress.candidates import Candidate, Compressor
from pcagpt.compress.score import TableSwap, frequency_deciles
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import Corpus
from pcagpt.factorize import Statistics
from pcagpt.model import GPT
from pcagpt.rows import SwapScores
from pcagpt.run import calibrate
from pcagpt.run.trained import Run
from pcagpt.sharding import placement


@dataclasses.dataclass(frozen=True)
class Original:
    """A run with a full table, on the devices of a mesh.

    variables: placed on the mesh; table_VD: [V, D] float32 without padding rows;
    split: of the corpus, to measure on; batches: of this split, or of its first
    `evaluate.max_tokens` targets; calibration: tokens and batch_size for
    `calibrate.statistics`; chunks: number of parts that logits are computed in;
    singular_value_split: as for `truncate`; workdir: keeps the statistics of a model of
    another program.
    """

    run: Run
    corpus: Corpus
    model: GPT
    mesh: Mesh
    variables: dict
    table_VD: np.ndarray
    split: str
    batches: EvaluationBatches
    calibration: dict[str, int]
    chunks: int
    singular_value_split: float
    workdir: str

    @classmethod
    def of(cls, run: Run, settings: Settings) -> "Original":
        """The run with its own corpus, or with the one in `settings.data`.

        Raises UserError if the table is already factorized, if the corpus lacks the
        split, or if the corpus or the devices do not fit the run.
        """
        table_VD, split = run.table(), settings.split
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        for section in ("train", "evaluate"):
            size = getattr(settings, section).batch_size
            placement.check_divisible(f"{section}.batch_size", size, mesh)
        corpus = run.corpus(settings.data, settings.cache_dir, ["train", split])
        corpus.tokens("train")  # From here on, `check_unchanged` notices a change.
        model, variables = run.load(settings.model, mesh)
        return cls(
            run,
            corpus,
            model,
            mesh,
            variables,
            table_VD,
            split,
            batches=EvaluationBatches(
                corpus.tokens(split),
                model.config.block_size,
                settings.evaluate.batch_size,
                settings.evaluate.max_tokens,
            ),
            calibration={
                "tokens": settings.compress.calibration_tokens,
                "batch_size": settings.train.batch_size,
            },
            chunks=settings.train.loss_chunks,
            singular_value_split=settings.factorize.singular_value_split,
            workdir=settings.workdir,
        )

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics on calibration text; see `calibrate.statistics`."""
        return calibrate.statistics(
            self.run,
            self.model,
            self.variables,
            self.corpus,
            self.mesh,
            **self.calibration,
            chunks=self.chunks,
            folder=self.run.results_in(self.workdir),
        )

    @functools.cached_property
    def compressor(self) -> Compressor:
        """Makes candidates of this table."""
        return Compressor(self.table_VD, self.statistics, self.singular_value_split)

    def measure(self, candidate: Candidate) -> SwapScores:
        """Scores a candidate in place of the model's table."""
        return self._swap(candidate.dense, self.batches)

    @functools.cached_property
    def _swap(self) -> TableSwap:
        deciles = frequency_deciles(self.statistics.frequency)
        return TableSwap(self.model, self.variables, deciles, self.mesh, self.chunks)

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything besides a recipe that decides the numbers of a row."""
        model = self.model.config
        protocol = {
            "checkpoint": self.run.fingerprint,
            "table": self.table_VD.shape,
            "corpus_sha256": self.corpus.sha256,
            "split": self.split,
            "window": model.block_size,
            "stride": model.block_size,
            "corpus": self.corpus.name,
            "tokenizer": self.corpus.tokenizer,
            "calibration_tokens": self.calibration["tokens"],
            "calibration_batch_size": self.calibration["batch_size"],
            "compute_dtype": model.compute_dtype,
            "singular_value_split": self.singular_value_split,
        }
        if self.split == "test":  # corpus_sha256 leaves it out.
            protocol["tokens_sha256"] = self.corpus.tokens_sha256("test")
        if self.batches.is_cut:  # Files without this field used all tokens.
            protocol["evaluated_tokens"] = self.batches.target_count
        return protocol

    def renewed(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """A stored protocol in today's terms, if it is of this run and this corpus.

        Older versions hashed checkpoint and corpus in another way. The corpus's name is
        not compared.
        """
        batch_size = {"calibration_batch_size": self.calibration["batch_size"]}
        stored, corpus = batch_size | protocol, self.corpus  # Older files do not say.
        if self.run.is_at(stored.get("checkpoint")):
            stored["checkpoint"] = self.run.fingerprint
        stated = stored.get("corpus_sha256")
        is_older = corpus.changed_parts({"corpus_sha256": stated}) == []
        if stated == corpus.sha256 or is_older:
            stored |= {"corpus_sha256": corpus.sha256, "corpus": corpus.name}
        return stored
