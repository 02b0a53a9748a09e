"""A table without a model.

Shape letters: V vocabulary, D model width.
"""

import numpy as np

from pcagpt.compression.candidates import Candidate, Compressor
from pcagpt.factorization import Statistics
from pcagpt.rows import SwapScores


class BareTable:
    """What `advise.find` compresses in place of an `Original`.

    Every error of every row counts alike.
    """

    label = "a table"

    def __init__(self, table_VD: np.ndarray):
        self.table_VD = table_VD
        size, width = table_VD.shape
        same_V, same_DD = np.full(size, 1 / size), np.eye(width)
        statistics = Statistics(
            frequency=same_V,
            probability=same_V,
            hidden_mean=np.zeros(width),
            hidden_moment=same_DD,
            gradient_moment=same_DD,
            context_moment=np.zeros_like(same_DD),
        )
        self.compressor = Compressor(table_VD, statistics)

    def measure(self, candidate: Candidate) -> SwapScores:
        """The squared relative error in place of an added loss."""
        error = relative_error(candidate.dense, self.table_VD) ** 2
        nothing = dict.fromkeys(
            ("loss", "added_loss_input", "added_loss_head", "kl", "top1_agreement"), 0.0
        )
        return SwapScores(added_loss=error, added_loss_by_decile=[], **nothing)


def relative_error(new_VD: np.ndarray, own_VD: np.ndarray) -> float:
    """|new - own| / |own| in Frobenius norm, of tables [V, D]."""
    return float(np.linalg.norm(new_VD - own_VD) / np.linalg.norm(own_VD))
