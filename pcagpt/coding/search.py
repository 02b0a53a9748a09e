"""Finds the step that meets a target of bytes or of predicted loss."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pcagpt.coding.encode import Prepared, encode, trial
from pcagpt.coding.file import file_bytes
from pcagpt.coding.table import CodedTable
from pcagpt.errors import UserError
from pcagpt.factorize import BudgetTooSmall, second_order_loss

TOLERANCE = 0.005  # relative distance from the target at which the search ends
MOST_ENCODINGS = 4
_OCTAVES = 0.3  # width of the bracket in which estimates are interpolated


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A coded table, its words and what it costs."""

    table: CodedTable
    words: np.ndarray  # uint32
    loss: float  # `second_order_loss` of the decoded table

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.words)


def at_step(prepared: Prepared, step: float) -> Encoded:
    """The table coded at a step."""
    table, words = encode(prepared, step)
    loss = second_order_loss(prepared.table_VD, table.dense(), prepared.weighting)
    return Encoded(table, words, loss)


def within_bytes(prepared: Prepared, most: int) -> Encoded:
    """The best table in a file of at most that size; BudgetTooSmall if none fits."""
    smallest = at_step(prepared, prepared.largest_step)
    if smallest.bytes > most:
        raise BudgetTooSmall(
            f"a file of {most:,} bytes cannot hold a coded table: without any symbols, "
            f"this one takes {smallest.bytes:,}"
        )
    return _search(
        prepared,
        most,
        smallest,
        # Symbols and the basis come on top of what is always there.
        estimate=lambda step: smallest.bytes + trial(prepared, step).bits / 8,
        value=lambda made: made.bytes,
    )


def within_loss(prepared: Prepared, most: float) -> Encoded:
    """The smallest file with at most that second-order loss; UserError if none has.

    `most` is in the units of the weighting: nats per token for 'kl', 'fisher' and
    'context'.
    """
    smallest = at_step(prepared, prepared.largest_step)
    if smallest.loss <= most:
        return smallest
    finest, found = trial(prepared, prepared.smallest_step), None
    if finest.loss <= most:
        found = _search(
            prepared,
            most,
            None,
            estimate=lambda step: trial(prepared, step).loss,
            value=lambda made: made.loss,
        )
    if found is None:
        raise UserError(
            f"no coded table has a predicted loss of at most {most}: the finest steps "
            f"lead to about {finest.loss:.2g}; allow more loss"
        )
    return found


def _search(
    prepared: Prepared,
    most: float,
    best: Encoded | None,
    estimate: Callable[[float], float],
    value: Callable[[Encoded], float],
) -> Encoded | None:
    """The table whose value is just below `most`, or `best` if none is found.

    Estimates choose the step. They are off by a factor that hardly changes with the
    step, so one or two encodings suffice to correct it.
    """
    ends = np.log2([prepared.smallest_step, prepared.largest_step])
    estimate_of = functools.cache(lambda octave: estimate(2.0**octave))
    goal, margin = most, TOLERANCE / 2
    for count in range(2 * MOST_ENCODINGS):
        octave = _octave_of(goal, estimate_of, *ends)
        made = at_step(prepared, 2.0**octave)
        found = value(made)
        if found <= most and (best is None or value(best) < found):
            best = made
        if most * (1 - TOLERANCE) <= found <= most:
            break
        if count >= MOST_ENCODINGS and best is not None:
            break
        if found > most:
            margin *= 1.5
        goal = most * (1 - margin) * estimate_of(octave) / max(found, most / 100)
        ends = np.clip((octave - 1, octave + 1), *ends)
    return best


def _octave_of(
    goal: float, estimate: Callable[[float], float], low: float, high: float
) -> float:
    """The logarithm of the step for a monotonous estimate: bisects, interpolates."""
    rises = estimate(low) < estimate(high)
    while high - low > _OCTAVES:
        middle = (low + high) / 2
        if (estimate(middle) > goal) == rises:
            high = middle
        else:
            low = middle
    x, y = (low, high), (estimate(low), estimate(high))
    goal, *y = np.log(np.maximum((goal, *y), np.finfo(float).tiny))
    return float(np.interp(goal, *((y, x) if rises else (y[::-1], x[::-1]))))
