"""Rounds a synthesis to integers.

One more bit in the basis removes as much error as one more bit in the symbols.

Shape letters: D model width, K rows.
"""

from typing import NamedTuple

import numpy as np

from pcagpt.coding.distribution import LARGEST_VALUE
from pcagpt.factorization.solve import metric_roots

LARGEST = 2**14  # magnitude of an integer before compensation moves it


class Basis(NamedTuple):
    """Rows of a synthesis as integers: entry [k, j] is n 2^(row k + column j)."""

    integers: np.ndarray  # [K, D] int32, at most LARGEST_VALUE in magnitude
    rows: np.ndarray  # [K] int16, exponents
    columns: np.ndarray  # [D] int16, exponents

    def dense(self) -> np.ndarray:
        """The rows, float64 [K, D], exact."""
        return np.ldexp(self.integers, self.rows[:, None] + self.columns)


def quantize_basis(
    rows_KD: np.ndarray, metric_DD: np.ndarray | None, steps_K: np.ndarray
) -> Basis:
    """Rounds rows so that the error E of row k costs E M E' ~ D steps_k^2 / 12.

    Rounds one column at a time. The columns that follow compensate its error, as in
    GPTQ. The steps of the columns are powers of two, chosen so that the error of each
    column costs the same in the metric.
    """
    width = rows_KD.shape[1]
    columns_D, moves_DD = np.zeros(width, np.int16), np.eye(width)
    if metric_DD is not None:
        unroot_DD = metric_roots(metric_DD)[1]
        moves_DD = np.linalg.cholesky(unroot_DD @ unroot_DD, upper=True)
        columns_D = np.round(np.log2(moves_DD.diagonal())).astype(np.int16)
    # An integer that is too large needs a coarser step.
    size_K = np.abs(np.ldexp(rows_KD, -columns_D)).max(axis=1, initial=0) / LARGEST
    exponents_K = np.round(np.log2(np.maximum(np.maximum(steps_K, size_K), 2.0**-500)))
    exponents_K = exponents_K.astype(np.int16)
    while True:
        integers_KD = _rounded(rows_KD, exponents_K, columns_D, moves_DD)
        too_large_K = np.abs(integers_KD).max(axis=1, initial=0) > LARGEST_VALUE
        if not too_large_K.any():
            return Basis(integers_KD, exponents_K, columns_D)
        exponents_K[too_large_K] += 1  # Compensation moved them beyond the limit.


def _rounded(
    rows_KD: np.ndarray,
    exponents_K: np.ndarray,
    columns_D: np.ndarray,
    moves_DD: np.ndarray,
) -> np.ndarray:
    """The integers [K, D] of `Basis`. A row does not depend on the others."""
    left_KD = np.ldexp(rows_KD, -exponents_K[:, None])
    integers_KD = np.empty(rows_KD.shape, np.int32)
    for j, exponent in enumerate(columns_D):
        integers_KD[:, j] = np.rint(np.ldexp(left_KD[:, j], -exponent))
        error_K = left_KD[:, j] - np.ldexp(integers_KD[:, j], exponent)
        move_D = moves_DD[j, j + 1 :] / moves_DD[j, j]
        if move_D.any():  # Without a metric, nothing moves.
            left_KD[:, j + 1 :] -= error_K[:, None] * move_D
    return integers_KD
