"""Distributions for the entropy coder: integer frequencies from a few small indices.

They are discrete Student distributions, which cover peaked and Gaussian shapes:

    f(n) ~ (1 + (n - location)^2 / (2 q scale^2))^-q

They are computed from sums, products and whole quotients of integers, so each machine
gets the same frequencies.
"""

import functools
from typing import NamedTuple

import numpy as np

PRECISION = 24  # the frequencies sum to 2^24, as the coder needs
# Scales in 1/256: eight in each octave, from 0.1.
OCTAVE = np.array([26, 28, 31, 34, 37, 40, 44, 48])
_BITS = 20  # of a fraction in the computation
SCALES, TAILS, REACHES = 128, 7, 16  # number of their values
LARGEST_VALUE = 2 ** (REACHES - 1) - 1  # in magnitude
LARGEST_LOCATION = 1023  # in 1/8 of the scale


class Distribution(NamedTuple):
    """Indices of a distribution; the file holds them."""

    reach: int  # values are below 2^reach in magnitude
    scale: int = 0
    location: int = 0
    tail: int = 0  # q = 2^tail


def frequency_rows(
    reach: int, tail: int, scales_N: np.ndarray, locations_N: np.ndarray
) -> np.ndarray:
    """Frequencies of the values -(2^reach - 1) .. 2^reach - 1, all positive.

    Returns int64 [N, 2^(reach + 1) - 1]; each row sums to 2^24.
    """
    largest = 2**reach - 1
    scales_N = OCTAVE[scales_N % 8] << scales_N // 8
    values_A = np.arange(-largest, largest + 1) * 256
    x_NA = np.abs(values_A - (locations_N * scales_N >> 3)[:, None])
    # Fewer bits, so that no product needs more than 63 bits.
    cut_N = np.maximum(0, np.frexp(scales_N)[1] - 16)
    x_NA = np.minimum(x_NA >> cut_N[:, None], 2**26)
    spread_N1 = ((scales_N >> cut_N) ** 2 << tail + 1)[:, None]
    weights_NA = (spread_N1 << _BITS) // (spread_N1 + x_NA * x_NA)
    for _ in range(tail):
        weights_NA = weights_NA * weights_NA >> _BITS
    free = 2**PRECISION - len(values_A)
    total_N1 = np.maximum(weights_NA.sum(axis=1, keepdims=True), 1)
    shares_NA = weights_NA * free // total_N1
    modes_N = np.argmax(weights_NA, axis=1)
    shares_NA[np.arange(len(modes_N)), modes_N] += free - shares_NA.sum(axis=1)
    return shares_NA + 1


def frequencies(distribution: Distribution) -> np.ndarray:
    """The frequencies of one distribution: int64."""
    return (_large if distribution.reach > _SMALL else _small)(distribution)


def _frequencies(distribution: Distribution) -> np.ndarray:
    reach, scale, location, tail = distribution
    return frequency_rows(reach, tail, np.array([scale]), np.array([location]))[0]


# Rows share distributions. Each cache holds at most 34 MB.
_SMALL = 10  # reach
_small = functools.lru_cache(2048)(_frequencies)
_large = functools.lru_cache(64)(_frequencies)
