"""The confidence interval of a mean loss."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


def mean_interval(
    values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, list[float] | None]:
    """Weighted mean and its Student-t interval at CONFIDENCE, or None for one value.

    The standard error of a weighted mean of independent values is
    sqrt(Σ w² (x − m)² / (1 − Σ w²)) with Σ w = 1, which is s/√n for equal weights.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights)
    weights = weights / weights.sum()
    mean = float(weights @ values)
    if len(values) < 2:
        return mean, None
    spread = weights**2 @ (values - mean) ** 2 / (1 - weights @ weights)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * np.sqrt(spread))
    return mean, [mean - half, mean + half]
