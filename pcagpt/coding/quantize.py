"""From coefficients to integers: a step for each token, zeros, and compensation.

Shape letters: V vocabulary, K directions, C classes of steps.
"""

from collections.abc import Callable

import numpy as np

from pcagpt.coding.transform import Coefficients

# Added to a magnitude before it is cut to an integer. Below 1/2, more values become
# zero than by rounding to the nearest, which saves more bits than it adds error.
ROUNDING = 0.45
LARGEST_SYMBOL = 2**15 - 1
# Relative token weights are clipped to these limits. Unseen tokens then have a finite
# step, and frequent tokens need no huge symbols.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 2.0**-12, 2.0**8


def step_classes(weights_V: np.ndarray) -> np.ndarray:
    """The class of each token's step: [V] int8. Class c means a step of 2^(c/2).

    An error e of token v costs p_v e^2. For given bits, the total is least if token v's
    step is proportional to p_v^-1/2 (reverse water-filling). The weights are relative
    to their mean. Each class spans a factor 2 of weights.
    """
    weights_V = np.clip(weights_V, SMALLEST_WEIGHT, LARGEST_WEIGHT)
    return np.round(-np.log2(weights_V)).astype(np.int8)


def class_steps(classes: np.ndarray, step: float) -> np.ndarray:
    """Float64 steps of classes. No power is computed, so all machines agree."""
    whole, odd = np.divmod(classes.astype(np.int32), 2)
    return np.ldexp(np.where(odd, 1.4142135623730951, 1.0), whole) * step


def compensated(
    coefficients: Coefficients,
    rounded: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Integers [K, V] int16 of values that are rounded one direction after another.

    The weakest direction comes first. Each value is first shifted to compensate the
    logit error so far. With the logit error s so far and R = sum of C_i^2 over the
    directions to come (this one included), the least |e|^2 + (s + e C)^2 is at
    e = -s C / (1 + R). This is the compensation of GPTQ (Frantar et al. 2022) in closed
    form, since the Hessian of a row is the identity plus a matrix of rank one.

    Args:
      coefficients: of K directions.
      rounded: maps a direction and its shifted values [V] to (their integers, the
        values that these stand for).
    """
    values_KV, contexts_KV, error_V = coefficients
    if contexts_KV is None:
        contexts_KV, error_V = np.broadcast_to(np.float32(0), values_KV.shape), 0.0
    coming_V = np.einsum("kv,kv->v", contexts_KV, contexts_KV, dtype=np.float64)
    integers_KV = np.empty(values_KV.shape, np.int16)
    for k in reversed(range(len(values_KV))):
        target_V = values_KV[k] - error_V * contexts_KV[k] / (1 + coming_V)
        integers_KV[k], value_V = rounded(k, target_V)
        error_V = error_V + (value_V - values_KV[k]) * contexts_KV[k]
        coming_V = np.maximum(coming_V - np.square(contexts_KV[k]), 0)
    return integers_KV


def symbols_of(
    coefficients: Coefficients,
    steps_V: np.ndarray,
    kept_KV: np.ndarray | None = None,
) -> np.ndarray:
    """Integers [K, V] int16: a symbol n stands for the value n * step.

    Args:
      coefficients: of K directions.
      steps_V: the step of each token.
      kept_KV: False where the symbol must be zero; broadcasts.
    """

    def rounded(k: int, target_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size_V = np.floor(np.abs(target_V / steps_V) + ROUNDING)
        size_V = np.minimum(size_V, LARGEST_SYMBOL)
        if kept_KV is not None:
            size_V *= kept_KV[k]
        symbols_V = np.copysign(size_V, target_V)
        return symbols_V, symbols_V * steps_V

    return compensated(coefficients, rounded)
