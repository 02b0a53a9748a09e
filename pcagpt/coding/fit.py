"""Finds the distributions that code rows of integers in the fewest bits.

Shape letters: R rows, A values of a distribution, N candidates.
"""

import functools
from collections.abc import Sequence

import numpy as np

from pcagpt.coding.distribution import (
    LARGEST_LOCATION,
    OCTAVE,
    PRECISION,
    SCALES,
    TAILS,
    Distribution,
    frequencies,
    frequency_rows,
)

_SHORT = 6  # reach up to which all candidates are tried
_LOCATIONS = np.arange(-16, 17)  # of the candidates
_MANY = 128  # values that are worth a descent


def fit(rows: Sequence[np.ndarray]) -> list[Distribution]:
    """The best distribution for each row, or nearly so; reach 0 for a row of zeros."""
    reaches = np.array(
        [int(np.abs(row).max(initial=0)).bit_length() for row in rows], np.int64
    )
    found = [Distribution(0)] * len(rows)
    for reach in np.unique(reaches[reaches > 0]).tolist():
        places = np.flatnonzero(reaches == reach)
        largest = 2**reach - 1

        def counts_of(place: int, largest: int = largest) -> np.ndarray:
            places = rows[place].astype(np.int64) + largest
            return np.bincount(places, minlength=2 * largest + 1)

        if reach <= _SHORT:
            indices_N3, bits_NA = _candidates(reach)
            counts_RA = np.array([counts_of(place) for place in places], np.float32)
            best_R = np.argmin(counts_RA @ bits_NA.T, axis=1)
            starts = [tuple(indices_N3[best].tolist()) for best in best_R]
        else:
            starts = [_moments(rows[place]) for place in places]
        for place, start in zip(places, starts, strict=True):
            at_border = abs(start[1]) == _LOCATIONS[-1]
            if reach > _SHORT or (at_border and len(rows[place]) >= _MANY):
                start = _descent(reach, start, counts_of(place))
            found[place] = Distribution(reach, *start)
    return found


@functools.cache
def _candidates(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, location, tail) [N, 3], and the bits of each value: float32 [N, A]."""
    # A larger scale than the reach makes no difference.
    scales = np.arange(8 * (reach + 4))
    scales_N, locations_N = map(np.ravel, np.meshgrid(scales, _LOCATIONS))
    indices, bits = [], []
    for tail in range(TAILS):
        indices.append(
            np.stack([scales_N, locations_N, np.full_like(scales_N, tail)], axis=1)
        )
        found = frequency_rows(reach, tail, scales_N, locations_N)
        bits.append(PRECISION - np.log2(found, dtype=np.float32))
    return np.concatenate(indices), np.concatenate(bits)


def _moments(values: np.ndarray) -> tuple[int, int, int]:
    """Indices near the mean and standard deviation."""
    mean, deviation = float(values.mean()), max(float(values.std()), 0.1)
    scale = np.clip(8 * np.log2(deviation * 256 / OCTAVE[0]), 0, SCALES - 1)
    location = np.clip(8 * mean / deviation, -LARGEST_LOCATION, LARGEST_LOCATION)
    return int(scale), int(location), TAILS // 2


def _descent(
    reach: int, start: tuple[int, int, int], counts_A: np.ndarray
) -> tuple[int, int, int]:
    """Moves to the best neighbour until all are worse."""
    (present,) = np.nonzero(counts_A)
    counts = counts_A[present]

    @functools.cache
    def bits(indices: tuple[int, int, int]) -> float:
        return -float(
            counts @ np.log2(frequencies(Distribution(reach, *indices))[present])
        )

    best = start
    while True:
        scale, location, tail = best
        around = [
            (scale + a, location + b, tail + c)
            for a, b, c in _MOVES
            if 0 <= scale + a < SCALES
            and abs(location + b) <= LARGEST_LOCATION
            and 0 <= tail + c < TAILS
        ]
        found = min(around, key=bits)
        if bits(found) >= bits(best):
            return best
        best = found


# A lighter tail goes with a larger scale.
_MOVES = (
    (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (1, 0, 1),
    (-1, 0, -1),
)  # fmt: skip
