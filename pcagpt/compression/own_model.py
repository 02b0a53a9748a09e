"""Our own model on the devices of a mesh, as a sweep measures it."""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from pcagpt.compression.score import TableSwap
from pcagpt.factorization import Statistics
from pcagpt.model import GPT
from pcagpt.run import calibrate


class OwnModel:
    """A GPT with a full table; implements `original.Model` but for `of_side`."""

    packages, side, sides, part = (), "", (), 0

    def __init__(self, gpt: GPT, variables: dict, mesh: Mesh, chunks: int):
        """Takes variables on the mesh; logits come in `chunks` parts or less."""
        self.gpt, self.variables, self.mesh = gpt, variables, mesh
        self.window = gpt.config.block_size
        self.compute_dtype = gpt.config.compute_dtype
        self.device_count = mesh.size
        self.score = TableSwap(gpt, variables, mesh, chunks)
        self._chunks = chunks

    def statistics(
        self, frequency_V: np.ndarray, batches: Iterable[np.ndarray]
    ) -> Statistics:
        """As `calibrate.collect`."""
        return calibrate.collect(
            self.gpt, self.variables, frequency_V, batches, self.mesh, self._chunks
        )
