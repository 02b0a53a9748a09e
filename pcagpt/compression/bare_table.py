"""A table without a model.

Shape letters: V vocabulary, D model width.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from pcagpt.coding import Description
from pcagpt.compression.candidates import Candidate, Compressor
from pcagpt.compression.codes import KINDS
from pcagpt.errors import UserError
from pcagpt.factorization import Statistics
from pcagpt.factorization.factor_files import write_bands
from pcagpt.methods import CODES, METHODS
from pcagpt.rows import SwapScores

# The methods that a bare table is enough for.
FREE = tuple(name for name, method in METHODS.items() if not method.needs_statistics)


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


def check_needs_no_text(methods: Collection[str]) -> None:
    """Raises UserError for a method that a bare table is not enough for."""
    for method in methods:
        if method in METHODS and METHODS[method].needs_statistics:
            raise UserError(
                f"'{method}' needs statistics of the model that the table is from: "
                f"compress the model instead, or use the method {' or '.join(FREE)}"
            )
        if method not in METHODS and method not in CODES:
            raise UserError(
                f"'{method}' only serves for comparison in the sweep of a model: "
                f"choose some of {', '.join((*FREE, *CODES))}"
            )


def write_table(folder: Path, candidate: Candidate) -> None:
    """Writes a table into a folder: codes as their file, others as factors/."""
    folder.mkdir(parents=True, exist_ok=True)
    if candidate.codes is None:
        write_bands(folder / "factors", candidate.table)
        return
    method = candidate.recipe.method
    kind = KINDS[method]
    kind.write(folder / kind.file, candidate.codes, Description(method))
