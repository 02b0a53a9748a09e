"""A table without a model.

Shape letters: V vocabulary, D model width.
"""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import numpy as np

from pcagpt.coding import CODES_VERSION
from pcagpt.compression.candidates import Candidate, Compressor
from pcagpt.errors import UserError
from pcagpt.factorization import Statistics, factor_files
from pcagpt.factorization.table import sha256_of_arrays
from pcagpt.methods import CODES, FREE, METHODS, OWN_TABLE
from pcagpt.rows import ErrorRow, SwapScores
from pcagpt.run import calibrate
from pcagpt.run.origin import origin_of


class BareTable:
    """What `advise.find` and `table_sweep` compress in place of an `Original`.

    table_VD: [V, D] float32; statistics: of its model, None if they are not known:
    every error of every row then counts alike; label: of its progress; is_checked:
    whether the statistics are known to be of this table; origin: `Origin.stored`; side:
    of an untied model's table, as for `sides.seen_by`.
    """

    def __init__(
        self,
        table_VD: np.ndarray,
        statistics: Statistics | None = None,
        singular_value_split: float = 0.0,
        label: str = "a table",
        is_checked: bool = False,
        origin: dict[str, Any] | None = None,
        side: str = "",
    ):
        self.table_VD, self.statistics, self.label = table_VD, statistics, label
        self._split, self.is_checked = singular_value_split, is_checked
        self.origin, self._side = origin or {}, side

    @classmethod
    def read(cls, path: Path, singular_value_split: float = 0.0) -> Self:
        """The table of a .npy file, with the statistics beside it if they are there.

        Raises UserError if one of the files is damaged, or the two do not fit.
        """
        table_VD = factor_files.read_table(path)
        factor_files.check_rows_differ(table_VD, path)
        factor_files.ask_if_transposed(table_VD, path)
        beside, known = calibrate.beside(path), {}
        if beside.exists():
            known = calibrate.read_for(beside, table_VD, path)._asdict()
        return cls(
            table_VD,
            singular_value_split=singular_value_split,
            label=path.name,
            origin=origin_of(path).stored,
            **known,
        )

    @functools.cached_property
    def compressor(self) -> Compressor:
        """Makes candidates of this table."""
        size, width = self.table_VD.shape
        same_V, same_DD = np.full(size, 1 / size), np.eye(width)
        alike = Statistics(
            frequency=same_V,
            probability=same_V,
            hidden_mean=np.zeros(width),
            hidden_moment=same_DD,
            gradient_moment=same_DD,
            context_moment=np.zeros_like(same_DD),
        )
        known = self.statistics or alike
        return Compressor(self.table_VD, known, self._split, self._side)

    def row(self, candidate: Candidate) -> ErrorRow:
        """The row of a candidate in errors.json or advice.json."""
        error = relative_error(candidate.dense, self.table_VD)
        return ErrorRow(
            **candidate.stored,
            relative_error=error,
            energy_kept=1 - error**2,
            estimated_loss=sum(candidate.second_order) if self.statistics else None,
        )

    def measure(self, candidate: Candidate) -> SwapScores:
        """The estimated loss, or else the squared relative error, as the added loss."""
        row = self.row(candidate)
        known = row.estimated_loss
        error = row.relative_error**2 if known is None else known
        nothing = dict.fromkeys(
            ("loss", "added_loss_input", "added_loss_head", "kl", "top1_agreement"), 0.0
        )
        return SwapScores(added_loss=error, added_loss_by_decile=[], **nothing)

    @functools.cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything besides a recipe that decides the numbers of a row."""
        known = self.statistics
        return {
            "table_sha256": sha256_of_arrays(self.table_VD),
            "table": self.table_VD.shape,
            "statistics_sha256": known and sha256_of_arrays(*known),
            "singular_value_split": self._split,
            "codes": CODES_VERSION,
        } | ({"side": self._side} if self._side else {})

    def renewed(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """A stored protocol in today's terms, as `Original.renewed`."""
        return protocol | {"codes": CODES_VERSION}


def relative_error(new_VD: np.ndarray, own_VD: np.ndarray) -> float:
    """|new - own| / |own| in Frobenius norm, of tables [V, D]."""
    # In float32, the squares of small numbers would be 0.
    error_VD = np.subtract(new_VD, own_VD, dtype=np.float64)
    return float(np.linalg.norm(error_VD) / np.linalg.norm(own_VD.astype(np.float64)))


def check_needs_no_text(
    methods: Collection[str], remedy: str = "compress the model instead"
) -> None:
    """Raises UserError for a method that a bare table is not enough for.

    `remedy` says how to give it more.
    """
    for method in methods:
        if method in METHODS and method not in FREE:
            raise UserError(
                f"'{method}' needs statistics of the model that the table is from: "
                f"{remedy}, or use the method {' or '.join(FREE)}"
            )
        if method not in (*FREE, *CODES, OWN_TABLE):
            raise UserError(
                f"'{method}' only serves for comparison in the sweep of a model: "
                f"choose some of {', '.join((*FREE, *CODES))}"
            )
