"""Integer frequency tables for the entropy coder, from a few small indices.

A table is a discrete Student distribution, which covers peaked and Gaussian shapes:

    f(n) ~ (1 + (n - location)^2 / (2 q scale^2))^-q

Only additions, products and whole quotients of integers make it, so each machine gets
the same table.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

PRECISION = 24  # the frequencies of a table sum to 2^24, as the coder needs
# Scales in 1/256: eight in each octave, from 0.1.
_OCTAVE = (26, 28, 31, 34, 37, 40, 44, 48)
_BITS = 20  # of a fraction in the computation
SCALES, TAILS, REACHES = 128, 7, 16  # number of their values
LARGEST_LOCATION = 1023  # in 1/8 of the scale


class Model(NamedTuple):
    """Indices of a table; the file holds them."""

    reach: int  # values are below 2^reach in magnitude
    scale: int = 0
    location: int = 0
    tail: int = 0  # q = 2^tail


@functools.lru_cache(2048)
def frequencies(model: Model) -> np.ndarray:
    """Frequencies of the values -(2^reach - 1) .. 2^reach - 1: int64, all positive."""
    scale = _OCTAVE[model.scale % 8] << model.scale // 8
    largest = 2**model.reach - 1
    x = np.arange(-largest, largest + 1) * 256 - (model.location * scale >> 3)
    # Both are cut to few bits, so that no product exceeds 63.
    cut = max(0, int(scale).bit_length() - 16)
    x, scale = np.minimum(np.abs(x) >> cut, 2**26), scale >> cut
    spread = scale * scale << model.tail + 1
    weights = (spread << _BITS) // (spread + x * x)
    for _ in range(model.tail):
        weights = weights * weights >> _BITS
    free = 2**PRECISION - len(x)
    shares = weights * free // max(int(weights.sum()), 1)
    shares[np.argmax(weights)] += free - shares.sum()
    return shares + 1


@functools.lru_cache(2048)
def _bits(model: Model) -> np.ndarray:
    """Bits that each value costs."""
    return PRECISION - np.log2(frequencies(model))


def reach(values: np.ndarray) -> int:
    """The smallest reach of a table that holds some integers."""
    return int(np.abs(values).max(initial=0)).bit_length()


def fit(values: np.ndarray, near: Model | None = None) -> Model:
    """The table that codes some integers in the fewest bits, as a descent finds it.

    The descent starts at the moments of the values, and at `near` if it is given.
    """
    own_reach = reach(values)
    if not own_reach:
        return Model(0)
    largest = 2**own_reach - 1
    counts = np.bincount(values.astype(np.int64) + largest)
    present = np.flatnonzero(counts)
    counts = counts[present]

    def cost(indices: tuple[int, int, int]) -> float:
        return float(counts @ _bits(Model(own_reach, *indices))[present])

    mean, deviation = float(values.mean()), max(float(values.std()), 0.1)
    # Nearest in the logarithm; only the encoder computes it.
    scale = int(np.clip(np.rint(8 * np.log2(deviation * 256 / 26)), 0, SCALES - 1))
    location = int(np.rint(8 * mean / deviation))
    location = int(np.clip(location, -LARGEST_LOCATION, LARGEST_LOCATION))
    starts = [(scale, location, tail) for tail in (2, TAILS - 1)]
    if near is not None and near.reach:
        starts.append(near[1:])
    best = min(starts, key=cost)
    lowest = cost(best)
    while True:
        around = [
            (scale, location, tail)
            for scale, location, tail in _around(best)
            if 0 <= scale < SCALES
            and 0 <= tail < TAILS
            and abs(location) <= LARGEST_LOCATION
        ]
        found = min(around, key=cost)
        if cost(found) >= lowest:
            return Model(own_reach, *best)
        best, lowest = found, cost(found)


def _around(indices: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Indices one step away, and those where scale and tail both change."""
    scale, location, tail = indices
    moves = [
        (scale + a, location, tail + b)
        for a, b in itertools.product((-1, 0, 1), repeat=2)
    ]
    return [*moves, (scale, location - 1, tail), (scale, location + 1, tail)]
