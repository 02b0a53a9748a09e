"""Predicts the added loss of a replaced token table.

Shape letters: V vocabulary, D model width.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pcagpt.factorization.chunks import chunks
from pcagpt.methods import Statistics, Weighting, token_contexts

SMALLEST_ADDED = 1e-3  # nats: smaller measured losses are mostly rounding


class SecondOrder(NamedTuple):
    """Added loss of head and input to second order, in nats per token."""

    head: float
    input: float


class Predictor:
    """Predicts `SecondOrder` for replacements of one table."""

    def __init__(self, table_VD: np.ndarray, statistics: Statistics):
        self._table_VD = table_VD
        self._head = Weighting(
            token_weights=statistics.probability,
            metric=statistics.hidden_moment,
            contexts=token_contexts(table_VD, statistics),
        )
        self._input = Weighting(
            token_weights=statistics.frequency, metric=statistics.gradient_moment
        )

    def __call__(self, dense_VD: np.ndarray) -> SecondOrder:
        """Added loss of a table [V, D] with error E, in the notation of `methods`.

        head: 1/2 sum_v p_v (E_v C E_v' + (E_v c_v)^2), with the token's context c_v;
        input: 1/2 sum_v f_v E_v G E_v'.
        """
        input_ = second_order_loss(self._table_VD, dense_VD, self._input)
        # The softmax cancels an error that all rows share.
        share_V = self._head.token_weights / self._head.token_weights.sum()
        shared_D = share_V @ dense_VD - share_V @ self._table_VD
        centred_VD = dense_VD - shared_D.astype(dense_VD.dtype)
        head = second_order_loss(self._table_VD, centred_VD, self._head)
        return SecondOrder(head, input_)


def second_order_loss(
    table_VD: np.ndarray, dense_VD: np.ndarray, weighting: Weighting
) -> float:
    """1/2 sum_v w_v (E_v M E_v' + (E_v c_v)^2) of the error E = dense - table.

    w, M and c are the weights, the metric and the contexts of the weighting.
    """
    total, weights_V = 0.0, weighting.token_weights
    for rows in chunks(len(table_VD)):
        error_ND = dense_VD[rows].astype(np.float64) - table_VD[rows]
        seen_ND = error_ND if weighting.metric is None else error_ND @ weighting.metric
        loss_N = np.einsum("nd,nd->n", seen_ND, error_ND)
        if weighting.contexts is not None:
            loss_N += np.einsum("nd,nd->n", error_ND, weighting.contexts[rows]) ** 2
        total += loss_N.sum() if weights_V is None else weights_V[rows] @ loss_N
    return float(total) / 2


class LossRegression:
    """Predicts added loss from second-order loss, fitted to a few measured tables.

    The second-order loss is too high for large errors, and too low for a method that
    minimises it. So each method has its own least-squares line log(added loss) = offset
    + slope * log(second order). A method without measurements gets slope 1 through the
    smallest point. Without any measurement, there is no prediction.
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

    def __call__(self, method: str, second_order: SecondOrder) -> float | None:
        """The predicted added loss in nats per token; None without any measurement."""
        if not self._lines:
            return None
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
