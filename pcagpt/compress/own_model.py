"""Our own model, on the devices of a mesh: how a sweep measures it."""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from pcagpt.compress.score import TableSwap
from pcagpt.factorize import Statistics
from pcagpt.model import GPT
from pcagpt.rows import SwapScores
from pcagpt.run import calibrate

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


class OwnModel:
    """A GPT with a full table; implements `original.Model`."""

    def __init__(self, gpt: GPT, variables: dict, mesh: Mesh, chunks: int):
        """Takes variables on the mesh; logits are computed in `chunks` parts."""
        self.gpt, self.variables, self.mesh = gpt, variables, mesh
        self._chunks, self._swap = chunks, None
        self.window = gpt.config.block_size
        self.compute_dtype = gpt.config.compute_dtype
        self.device_count = mesh.size

    def statistics(
        self, frequency_V: np.ndarray, batches: Iterable[np.ndarray]
    ) -> Statistics:
        """As `calibrate.collect`."""
        return calibrate.collect(
            self.gpt, self.variables, frequency_V, batches, self.mesh, self._chunks
        )

    def score(
        self, table_VD: np.ndarray, decile_V: np.ndarray, batches: Batches
    ) -> SwapScores:
        """As `score.TableSwap`; the deciles of the first call hold for all."""
        self._swap = self._swap or TableSwap(
            self.gpt, self.variables, decile_V, self.mesh, self._chunks
        )
        return self._swap(table_VD, batches)
