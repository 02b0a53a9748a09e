"""Makes the `RIVALS` of compressed tables.

Shape letters: V vocabulary, D model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pcagpt.factorization import Statistics, gptq, product_quantize, quantize
from pcagpt.methods import METHODS, OWN_TABLE
from pcagpt.rows import Recipe

VECTORS = (6, 4, 3)  # columns of the vectors that product quantization codes


class Stored(Protocol):
    """A table as it is stored."""

    bytes: int

    def dense(self) -> np.ndarray:
        """The table that a model computes with: float32 [V, D]."""


class Maker(NamedTuple):
    """How the tables of a rival are made.

    sizes: (number of codes, bits of a code) of each table to try, from (V, D) and
    `compress.bits`; make: one of them, from the table [V, D] and its recipe, where the
    budget is the number of codes.
    """

    sizes: Callable[[tuple[int, int], Sequence[int]], list[tuple[int, int]]]
    make: Callable[[np.ndarray, Statistics, Recipe], Stored]


def _of_each_number(shape, bits):
    return [(math.prod(shape), bit) for bit in bits]


def _of_vectors(shape, bits):
    counts = dict.fromkeys(-(-shape[1] // columns) for columns in VECTORS)
    return [(shape[0] * count, 8) for count in counts]


def _round(table_VD, statistics, recipe):
    return quantize(table_VD, recipe.bits)


def _gptq(table_VD, statistics, recipe):
    metric_DD = METHODS["fisher"].weigh(table_VD, statistics).metric
    return gptq(table_VD, recipe.bits, metric_DD)


def _pq(table_VD, statistics, recipe):
    weights_V = METHODS["fisher"].weigh(table_VD, statistics).token_weights
    return product_quantize(table_VD, recipe.budget // len(table_VD), weights_V)


MAKERS = {
    OWN_TABLE: Maker(_of_each_number, _round),
    "gptq": Maker(_of_each_number, _gptq),
    "pq": Maker(_of_vectors, _pq),
}
