"""Factors of a bare table.

Shape letters: V vocabulary, D model width, K rank.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from pcagpt.api.calls import array_of, call, plain, settings_of
from pcagpt.compression.bare_table import check_needs_no_text
from pcagpt.errors import UserError
from pcagpt.factorization import Factorizer
from pcagpt.factorization.factor_files import (
    ask_if_transposed,
    check_rows_differ,
    checked_table,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Factorization:
    """A table of one rank: table ≈ wte @ scale + mean.

    wte: float32 [V, K]; scale: float32 [K, D]; mean: float32 [D], or None if the method
    subtracts none; energy_kept: share of the squared singular values that are kept.
    """

    wte: np.ndarray
    scale: np.ndarray
    mean: np.ndarray | None
    energy_kept: float

    def dense(self) -> np.ndarray:
        """The table multiplied out: float32 [V, D]."""
        table_VD = self.wte @ self.scale
        return table_VD if self.mean is None else table_VD + self.mean


def factorize(
    table: ArrayLike,
    rank: int,
    *,
    method: str = "svd",
    singular_value_split: float = 0.0,
) -> Factorization:
    """The best factors of a token table.

    Args:
      table: floating point (also bfloat16) [V, D], such as `model.table`.
      rank: K, from 1 to min(V, D).
      method: one of `FREE`, which need no text.
      singular_value_split: share a of the singular values in `scale`, S^a V^T; `wte`
        has the rest, U S^(1-a).

    Raises:
      UserError: for a table that is not finite, not a matrix, or has only equal rows; a
        rank out of range; a method that needs the statistics of a model.
    """
    with call():
        given = {
            "factorize.method": method,
            "factorize.singular_value_split": singular_value_split,
        }
        settings_of("factorize", {"model_path": "table.npy", **given})
        check_needs_no_text([method])
        table_VD = table_of(table)
        highest = min(table_VD.shape)
        if type(rank := plain(rank)) is not int or not 1 <= rank <= highest:
            raise UserError(
                f"rank is {rank!r}: for a table {table_VD.shape} it must be a whole "
                f"number from 1 to {highest}"
            )
        factorizer = Factorizer(table_VD, method, None, singular_value_split)
        made, about = factorizer.of_rank(rank, 1)
        (band,) = made.bands
        assert band.scale is not None
        return Factorization(
            band.wte, band.scale, made.mean, float(about["energy_kept"])
        )


def table_of(array: ArrayLike) -> np.ndarray:
    """An array as a table to compress, float32 [V, D]."""
    remedy = "give a float32 array, such as `.detach().float().cpu().numpy()`"
    table_VD = checked_table(array_of(array, "the table", remedy), "the table")
    check_rows_differ(table_VD, "the table")
    ask_if_transposed(table_VD, "the table")
    return table_VD
