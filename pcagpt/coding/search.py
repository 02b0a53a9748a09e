"""Finds the step that meets a target of bytes, and the bytes that a loss needs."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pcagpt.coding.encode import Prepared, encode, estimate
from pcagpt.coding.file import file_bytes
from pcagpt.coding.table import CodedTable
from pcagpt.factorization import BudgetTooSmall

TOLERANCE = 0.005  # relative distance from the target at which the search ends
# After `FEW` encodings, a table that fills the share `FILLED` of the target is good
# enough. The search always ends after `MANY`. Only small tables need many, and encode
# fast.
FEW, MANY, FILLED = 5, 16, 0.97
# Bisection stops at this width (in octaves); then it interpolates.
_OCTAVES = 0.3


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A coded table and its words."""

    table: CodedTable
    words: np.ndarray  # uint32

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.words)


def at_step(prepared: Prepared, step: float) -> Encoded:
    """The table coded at a step."""
    return Encoded(*encode(prepared, step))


def within_bytes(prepared: Prepared, most: int) -> Encoded:
    """The best table in a file of at most that size; BudgetTooSmall if none fits.

    Estimates choose the first steps. For a large table, they are off by a factor that
    hardly changes with the step, so one or two encodings suffice to correct it. For a
    small table they may be far off; the last encodings on both sides of the target then
    choose the next step.
    """
    best = at_step(prepared, prepared.largest_step)
    least = best.bytes
    if least > most:
        raise BudgetTooSmall(
            f"a file of {most:,} bytes cannot hold a coded table: without any symbols, "
            f"this one takes {least:,}"
        )

    @functools.cache
    def estimate_of(octave: float) -> float:
        # Symbols and the basis come on top of what is always there.
        return least + estimate(prepared, 2.0**octave).bits / 8

    tried: dict[float, int] = {}  # bytes by octave
    low, high = np.log2([prepared.smallest_step, prepared.largest_step])
    octave, margin = _octave_of(most, estimate_of, low, high), TOLERANCE / 2
    for count in range(1, MANY + 1):
        made = at_step(prepared, 2.0**octave)
        tried[octave] = made.bytes
        if made.bytes > most:
            low, margin = octave, margin * 1.5
        else:
            high, best = octave, max(best, made, key=lambda one: one.bytes)
        filled = best.bytes / most
        if filled >= 1 - TOLERANCE or low >= high or (count >= FEW and filled > FILLED):
            break
        goal = most * (1 - margin)
        if low in tried and high in tried:
            logs = np.log([tried[high], tried[low]])
            octave = np.interp(np.log(goal), logs, [high, low])
        else:
            goal *= estimate_of(octave) / made.bytes
            octave = _octave_of(goal, estimate_of, low, high)
        edge = (high - low) / 16  # Every encoding must narrow the bracket.
        octave = float(np.clip(octave, low + edge, high - edge))
    return best


def estimated_bytes(prepared: Prepared, loss: float) -> int:
    """About the size of a file that decodes to a table of this `second_order_loss`.

    `loss` is in the units of the weighting: nats per token for 'kl', 'fisher' and
    'context'. The estimate comes from the sample, and only an empty table is encoded.
    """
    loss_of = functools.cache(lambda octave: estimate(prepared, 2.0**octave).loss)
    ends = np.log2([prepared.smallest_step, prepared.largest_step])
    bits = estimate(prepared, 2.0 ** _octave_of(loss, loss_of, *ends)).bits
    return round(at_step(prepared, prepared.largest_step).bytes + bits / 8)


def _octave_of(
    goal: float, estimated: Callable[[float], float], low: float, high: float
) -> float:
    """Finds log2 of the step for a monotonic estimate: bisects, then interpolates."""
    rises = estimated(low) < estimated(high)
    while high - low > _OCTAVES:
        middle = (low + high) / 2
        if (estimated(middle) > goal) == rises:
            high = middle
        else:
            low = middle
    x, y = (low, high), (estimated(low), estimated(high))
    goal, *y = np.log(np.maximum((goal, *y), np.finfo(float).tiny))
    return float(np.interp(goal, *((y, x) if rises else (y[::-1], x[::-1]))))
