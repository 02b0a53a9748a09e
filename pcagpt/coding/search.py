"""Finds the step that meets a target of bytes or of predicted loss."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pcagpt.coding.encode import Prepared, encode, trial
from pcagpt.coding.file import file_bytes
from pcagpt.coding.table import CodedTable
from pcagpt.coding.transform import second_order_loss
from pcagpt.errors import UserError

TOLERANCE = 0.005  # relative distance from the target at which the search ends
MOST_ENCODINGS = 4
_OCTAVES = 0.002  # precision of a step


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
    """The best table in a file of at most that size; UserError if none is so small."""
    smallest = at_step(prepared, prepared.largest_step)
    if smallest.bytes > most:
        raise UserError(
            f"a file of {most:,} bytes cannot hold a coded table: without any symbols, "
            f"this one takes {smallest.bytes:,}; allow more bytes"
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
    finest = trial(prepared, prepared.smallest_step)
    if not finest.loss <= most:
        raise UserError(
            f"no coded table has a predicted loss of at most {most}: the finest steps "
            f"lead to {finest.loss:.2g}; allow more loss"
        )
    return _search(
        prepared,
        most,
        None,
        estimate=lambda step: trial(prepared, step).loss,
        value=lambda made: made.loss,
    )


def _search(
    prepared: Prepared,
    most: float,
    best: Encoded | None,
    estimate: Callable[[float], float],
    value: Callable[[Encoded], float],
) -> Encoded:
    """The table whose value is just below `most`, or `best` if none is found.

    Estimates choose the step. They are off by a factor that hardly changes with the
    step, so one or two encodings suffice to correct it.
    """
    ends = np.log2([prepared.smallest_step, prepared.largest_step])
    rises = estimate(prepared.smallest_step) < estimate(prepared.largest_step)
    goal = most
    for _ in range(MOST_ENCODINGS):
        low, high = ends
        while high - low > _OCTAVES:
            middle = (low + high) / 2
            if (estimate(2.0**middle) > goal) == rises:
                high = middle
            else:
                low = middle
        made = at_step(prepared, 2.0 ** (low if rises else high))
        found = value(made)
        if found <= most and (best is None or value(best) < found):
            best = made
        if most * (1 - TOLERANCE) <= found <= most:
            break
        goal *= most * (1 - TOLERANCE / 2) / max(found, most / 100)
        ends = np.clip((low - 1, high + 1), *ends)
    return best
