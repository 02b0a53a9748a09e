"""The trained model to compress: its table, statistics and measurements.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pcagpt.compress.candidates import Candidate, Compressor
from pcagpt.compress.score import SwapScores, TableSwap, frequency_deciles
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import Corpus
from pcagpt.factorize import Statistics
from pcagpt.model import GPT
from pcagpt.run import calibrate
from pcagpt.run.trained import Run
from pcagpt.sharding import placement


@dataclasses.dataclass(frozen=True)
class Original:
    """A run with a full table, on the devices of a mesh.

    table_VD: [V, D] float32 without padding rows; variables: placed on the mesh.
    """

    run: Run
    settings: Settings
    corpus: Corpus
    model: GPT
    mesh: Mesh
    variables: dict
    table_VD: np.ndarray

    @classmethod
    def of(cls, run: Run, settings: Settings) -> "Original":
        """The run with its own corpus, or with the one in `settings.data`.

        Raises UserError if the table is already factorized, or if the corpus or the
        devices do not fit the run.
        """
        table_VD = run.table()
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        for section in ("train", "evaluate"):
            size = getattr(settings, section).batch_size
            placement.check_divisible(f"{section}.batch_size", size, mesh)
        corpus = run.corpus(settings.data, settings.cache_dir)
        model, variables = run.load(settings.model, mesh)
        return cls(run, settings, corpus, model, mesh, variables, table_VD)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics on calibration text; see `calibrate.statistics`."""
        return calibrate.statistics(
            self.run,
            self.model,
            self.variables,
            self.corpus,
            self.mesh,
            tokens=self.settings.compress.calibration_tokens,
            batch_size=self.settings.train.batch_size,
            chunks=self.settings.train.loss_chunks,
        )

    @functools.cached_property
    def compressor(self) -> Compressor:
        """Makes candidates of this table."""
        split = self.settings.factorize.singular_value_split
        return Compressor(self.table_VD, self.statistics, split)

    @functools.cached_property
    def batches(self) -> EvaluationBatches:
        """The validation split, or its first `evaluate.max_tokens` targets."""
        return EvaluationBatches(
            self.corpus.tokens("val"),
            self.model.config.block_size,
            self.settings.evaluate.batch_size,
            self.settings.evaluate.max_tokens,
        )

    def measure(self, candidate: Candidate) -> SwapScores:
        """Scores a candidate in place of the model's table."""
        return self._swap(candidate.dense, self.batches)

    @functools.cached_property
    def _swap(self) -> TableSwap:
        deciles = frequency_deciles(self.statistics.frequency)
        chunks = self.settings.train.loss_chunks
        return TableSwap(self.model, self.variables, deciles, self.mesh, chunks)

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that determines the numbers of a row, except its recipe."""
        model, settings = self.model.config, self.settings
        protocol = {
            "checkpoint": self.run.fingerprint,
            "table": self.table_VD.shape,
            "corpus_sha256": self.corpus.fingerprint(),
            "split": "val",
            "window": model.block_size,
            "stride": model.block_size,
            "corpus": self.corpus.name,
            "tokenizer": self.corpus.tokenizer,
            "calibration_tokens": settings.compress.calibration_tokens,
            "compute_dtype": model.compute_dtype,
            "singular_value_split": settings.factorize.singular_value_split,
        }
        if self.batches.is_cut:  # Files without this field used all tokens.
            protocol["evaluated_tokens"] = self.batches.target_count
        return protocol
