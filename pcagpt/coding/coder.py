"""Entropy-codes rows of integers into 32-bit words, and reads them back.

Each row has its own `Model`. A group begins with four rows, one for each index of its
models. Each of these rows begins with its own four indices, coded uniformly.
"""

from collections.abc import Sequence

import numpy as np
from constriction import stream

from pcagpt.coding.fit import fit
from pcagpt.coding.models import (
    LARGEST_LOCATION,
    REACHES,
    SCALES,
    TAILS,
    Model,
    frequencies,
)

# For each index of a model: its number of values, and the offset that makes them start
# at 0.
_FIELDS = (REACHES, SCALES, 2 * LARGEST_LOCATION + 1, TAILS)
_STARTS = (0, 0, LARGEST_LOCATION, 0)
_SENTINEL = 0xC0DE  # The last number; a decoder of damaged words does not read it.


def _categorical(model: Model) -> stream.model.Categorical:
    """The coder's form of a table.

    constriction adds 1 to each share. The shares then have the sum that it expects, so
    it does not round them.
    """
    shares = (frequencies(model) - 1).astype(np.float64)
    return stream.model.Categorical(shares, perfect=False)


class Writer:
    """Codes rows of integers; all must be below 2^15 in magnitude."""

    def __init__(self):
        self._encoder = stream.queue.RangeEncoder()

    def row(self, values: np.ndarray) -> None:
        """Codes one row; the reader knows its length."""
        (model,) = fit([values])
        for size, start, index in zip(_FIELDS, _STARTS, model, strict=True):
            self._encoder.encode(index + start, stream.model.Uniform(size))
        self._values(values, model)

    def rows(self, rows: Sequence[np.ndarray]) -> None:
        """Codes several rows, which may have unequal lengths."""
        models = fit(rows)
        used = [model for model in models if model.reach]
        self.row(np.diff([model.reach for model in models], prepend=0))
        self.row(np.diff([model.scale for model in used], prepend=0))
        self.row(np.array([model.location for model in used], np.int32))
        self.row(np.array([model.tail for model in used], np.int32))
        for row, model in zip(rows, models, strict=True):
            self._values(row, model)

    def words(self) -> np.ndarray:
        """All that was coded: uint32."""
        self._encoder.encode(_SENTINEL, stream.model.Uniform(2**16))
        return self._encoder.get_compressed()

    def _values(self, values: np.ndarray, model: Model) -> None:
        if model.reach and len(values):
            places = np.asarray(values, np.int32) + np.int32(2**model.reach - 1)
            self._encoder.encode(places, _categorical(model))


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
        return self._values(length, Model(*indices))

    def rows(self, lengths: Sequence[int]) -> list[np.ndarray | None]:
        """The next rows: int32, or None for a row of zeros."""
        reaches = np.cumsum(self.row(len(lengths)))
        used = np.flatnonzero(reaches)
        scales = np.cumsum(self.row(len(used)))
        locations, tails = self.row(len(used)), self.row(len(used))
        models = [Model(0)] * len(lengths)
        for place, *indices in zip(used, scales, locations, tails, strict=True):
            models[place] = Model(int(reaches[place]), *map(int, indices))
        if not all(
            0 <= m.reach < REACHES and 0 <= m.scale < SCALES and 0 <= m.tail < TAILS
            for m in models
        ):
            raise ValueError("it describes an impossible model")
        return [
            self._values(length, model) if model.reach else None
            for length, model in zip(lengths, models, strict=True)
        ]

    def end(self) -> None:
        """Checks that all was read."""
        if self._uniform(2**16) != _SENTINEL or not self._decoder.maybe_exhausted():
            raise ValueError("its symbols do not end where they should")

    def _uniform(self, size: int) -> int:
        return int(self._decoder.decode(stream.model.Uniform(size)))

    def _values(self, length: int, model: Model) -> np.ndarray:
        if not (model.reach and length):
            return np.zeros(length, np.int32)
        try:
            places = self._decoder.decode(_categorical(model), length)
        except AssertionError:  # constriction reports impossible words in this way.
            raise ValueError("its symbols are damaged") from None
        return places - np.int32(2**model.reach - 1)
