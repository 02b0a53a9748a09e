"""Values that `compress` uses for knobs that are 0 or empty."""

import math
from typing import NamedTuple

from pcagpt.methods import CODES, FREE, METHODS, RIVALS


class Effort(NamedTuple):
    """Values of `ranks`, of `compress.*` and of `evaluate.max_tokens`."""

    ranks: tuple[int, ...]
    methods: tuple[str, ...]
    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


_FIRST, *_, _LAST = METHODS
_RANKS = (32, 64, 128, 256)
GPU = Effort(_RANKS, (*METHODS, *CODES, *RIVALS), (1, 7, 12), 2**20, 0)
# A first answer for a small model within three minutes on two cores.
CPU = Effort(_RANKS, (_FIRST, _LAST, *CODES), (1, 7), 2**15, 2**15)
# A first look at a model of 135 million parameters within 20 minutes on two cores:
# codes, and the strongest rival. A later sweep of chosen methods may take its place,
# because it has the same statistics.
LARGE_TABLE = 10_000_000  # numbers
CPU_LARGE = Effort((128, 256), (*CODES, "gptq"), (7,), CPU.calibration_tokens, 2**14)


def effort_on(platform: str, shape: tuple[int, int] | None) -> Effort:
    """The effort on 'cpu' or another platform.

    shape: [V, D] of the table, if it only gets a first look. A table with fewer rows or
    columns than the ranks of `CPU_LARGE` does not count as large.
    """
    if platform != "cpu":
        return GPU
    is_large = shape and math.prod(shape) >= LARGE_TABLE
    return CPU_LARGE if is_large and min(shape) >= max(CPU_LARGE.ranks) else CPU


def of_bare_table(effort: Effort, has_statistics: bool) -> Effort:
    """The effort for a table without its model: all that it is enough for.

    No loss is measured, so each table takes little time. Without statistics, all tokens
    weigh the same, and bands mean nothing.
    """
    methods, bands = (METHODS, effort.bands) if has_statistics else (FREE, (1,))
    return Effort(effort.ranks, (*methods, *CODES), bands, 0, 0)
