"""Predicts the added loss of a replaced token table.

Shape letters: V vocabulary, D model width.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pcagpt.methods import Statistics, token_contexts

SMALLEST_ADDED = 1e-3  # nats: smaller measured losses are mostly rounding


class SecondOrder(NamedTuple):
    """Added loss of head and input to second order, in nats per token."""

    head: float
    input: float


class Predictor:
    """Predicts `SecondOrder` for replacements of one table."""

    def __init__(self, table_VD: np.ndarray, statistics: Statistics):
        self._table_VD, self._statistics = table_VD, statistics
        self._contexts_VD = token_contexts(table_VD, statistics)

    def __call__(self, dense_VD: np.ndarray) -> SecondOrder:
        """Added loss of a table [V, D] with error E, in the notation of `methods`.

        head: 1/2 sum_v p_v (E_v C E_v' + (E_v c_v)^2), with the token's context c_v;
        input: 1/2 sum_v f_v E_v G E_v'.
        """
        statistics, dtype = self._statistics, self._table_VD.dtype
        error_VD = dense_VD - self._table_VD
        input_ = statistics.frequency @ _squares(error_VD, statistics.gradient_moment)
        probability_V = statistics.probability
        # The softmax cancels an error that all rows share.
        shared_D = probability_V @ error_VD / probability_V.sum()
        error_VD = error_VD - shared_D.astype(dtype)
        squares_V = _squares(error_VD, statistics.hidden_moment)
        shift_V = np.einsum("vd,vd->v", error_VD, self._contexts_VD)
        head = probability_V @ (squares_V + shift_V**2)
        return SecondOrder(float(head) / 2, float(input_) / 2)


def _squares(rows_VD: np.ndarray, metric_DD: np.ndarray) -> np.ndarray:
    """Squared length of each row under a metric: [V]."""
    product_VD = rows_VD @ metric_DD.astype(rows_VD.dtype)
    return np.einsum("vd,vd->v", product_VD, rows_VD)


class LossRegression:
    """Predicts added loss from second-order loss, fitted to a few measured tables.

    The second-order loss is too high for large errors, and too low for a method that
    minimises it. So each method has its own least-squares line log(added loss) = offset
    + slope * log(second order). A method without measurements gets slope 1 through the
    smallest point.
    """

    def __init__(self, measured: Iterable[tuple[str, SecondOrder, float]]):
        """Takes (method, second order, added loss) for each measured table."""
        points: dict[str, list[tuple[float, float]]] = {}
        for method, second_order, added_loss in measured:
            if added_loss > 0 and sum(second_order) > 0:
                point = math.log(sum(second_order)), math.log(added_loss)
                points.setdefault(method, []).append(point)
        self._lines = {method: _line(found) for method, found in points.items()}
        x, y = min(sum(points.values(), []), default=(0.0, 0.0))
        self._default = 1.0, y - x

    def __call__(self, method: str, second_order: SecondOrder) -> float:
        """The predicted added loss in nats per token."""
        if sum(second_order) <= 0:
            return 0.0
        slope, offset = self._lines.get(method, self._default)
        return math.exp(offset + slope * math.log(sum(second_order)))


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, offset) of the line through points; slope 1 if all have the same x."""
    x, y = np.array(points).T
    if np.ptp(x) < 1e-3:
        return 1.0, float(np.mean(y - x))
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)
