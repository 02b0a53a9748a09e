"""Entropy-codes rows of integers into 32-bit words, and reads them back.

Each row has its own `Distribution`. Four indices describe it. The four indices of a
single row come before its values. They are coded uniformly. Four single rows precede a
group. The first has the reaches of all rows, as differences. The other three leave out
rows of reach 0: scales (as differences), locations, tails. Rows of reach 0 are zeros;
no values follow.
"""

from collections.abc import Sequence

import numpy as np
from constriction import stream

from pcagpt.coding.distribution import (
    LARGEST_LOCATION,
    LARGEST_VALUE,
    REACHES,
    SCALES,
    TAILS,
    Distribution,
    frequencies,
)
from pcagpt.coding.fit import fit

# For each index of a distribution: its number of values, and the offset that makes
# them start at 0.
_FIELDS = (REACHES, SCALES, 2 * LARGEST_LOCATION + 1, TAILS)
_STARTS = (0, 0, LARGEST_LOCATION, 0)
_SENTINEL = 0xC0DE  # The last number; a decoder of damaged words does not read it.


def _categorical(distribution: Distribution) -> stream.model.Categorical:
    """The coder's form of a distribution.

    constriction adds 1 to each share. The shares then have the sum that it expects, so
    it does not round them.
    """
    shares = (frequencies(distribution) - 1).astype(np.float64)
    return stream.model.Categorical(shares, perfect=False)


def _fitted(rows: Sequence[np.ndarray]) -> list[Distribution]:
    """The distributions of rows; ValueError for values that no reader accepts."""
    for row in rows:
        if np.abs(np.asarray(row, np.int64)).max(initial=0) > LARGEST_VALUE:
            raise ValueError(f"an integer to code is above {LARGEST_VALUE:,}")
    return fit(rows)


class Writer:
    """Codes rows of integers; ValueError if one is above LARGEST_VALUE in magnitude."""

    def __init__(self):
        self._encoder = stream.queue.RangeEncoder()

    def row(self, values: np.ndarray) -> None:
        """Codes one row; the reader knows its length."""
        (distribution,) = _fitted([values])
        for size, start, index in zip(_FIELDS, _STARTS, distribution, strict=True):
            self._encoder.encode(index + start, stream.model.Uniform(size))
        self._values(values, distribution)

    def rows(self, rows: Sequence[np.ndarray]) -> None:
        """Codes several rows, which may have unequal lengths."""
        distributions = _fitted(rows)
        used = [one for one in distributions if one.reach]
        self.row(np.diff([one.reach for one in distributions], prepend=0))
        self.row(np.diff([one.scale for one in used], prepend=0))
        self.row(np.array([one.location for one in used], np.int32))
        self.row(np.array([one.tail for one in used], np.int32))
        for row, distribution in zip(rows, distributions, strict=True):
            self._values(row, distribution)

    def words(self) -> np.ndarray:
        """All that was coded: uint32."""
        self._encoder.encode(_SENTINEL, stream.model.Uniform(2**16))
        return self._encoder.get_compressed()

    def _values(self, values: np.ndarray, distribution: Distribution) -> None:
        if distribution.reach and len(values):
            places = np.asarray(values, np.int32) + np.int32(2**distribution.reach - 1)
            self._encoder.encode(places, _categorical(distribution))


class Reader:
    """Reads what `Writer` coded. Raises ValueError for words that it did not write."""

    def __init__(self, words: np.ndarray):
        self._decoder = stream.queue.RangeDecoder(words)

    def row(self, length: int) -> np.ndarray:
        """The next row: int32."""
        indices = [
            self._uniform(size) - start
            for size, start in zip(_FIELDS, _STARTS, strict=True)
        ]
        return self._values(length, Distribution(*indices))

    def rows(self, lengths: Sequence[int]) -> list[np.ndarray | None]:
        """The next rows: int32, or None for a row of zeros."""
        reaches = np.cumsum(self.row(len(lengths)))
        used = np.flatnonzero(reaches)
        scales = np.cumsum(self.row(len(used)))
        locations, tails = self.row(len(used)), self.row(len(used))
        distributions = [Distribution(0)] * len(lengths)
        for place, *indices in zip(used, scales, locations, tails, strict=True):
            distributions[place] = Distribution(int(reaches[place]), *map(int, indices))
        if not all(
            0 <= d.reach < REACHES and 0 <= d.scale < SCALES and 0 <= d.tail < TAILS
            for d in distributions
        ):
            raise ValueError("it describes an impossible distribution")
        return [
            self._values(length, distribution) if distribution.reach else None
            for length, distribution in zip(lengths, distributions, strict=True)
        ]

    def end(self) -> None:
        """Checks that all was read."""
        if self._uniform(2**16) != _SENTINEL or not self._decoder.maybe_exhausted():
            raise ValueError("its symbols do not end where they should")

    def _uniform(self, size: int) -> int:
        return int(self._decoder.decode(stream.model.Uniform(size)))

    def _values(self, length: int, distribution: Distribution) -> np.ndarray:
        if not (distribution.reach and length):
            return np.zeros(length, np.int32)
        try:
            places = self._decoder.decode(_categorical(distribution), length)
        except AssertionError:  # constriction reports impossible words in this way.
            raise ValueError("its symbols are damaged") from None
        return places - np.int32(2**distribution.reach - 1)
