"""A factorized token table: a list of bands with their factors.

Shape letters: V vocabulary, n tokens of a band, K rank, D model width.
"""

import hashlib
from typing import NamedTuple

import numpy as np

FLOAT_BYTES = 4  # of a stored value


def sha256_of_arrays(*arrays: np.ndarray | None) -> str:
    """Hash of the values of arrays, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class BandFactors(NamedTuple):
    """Factors of one band's rows."""

    wte: np.ndarray  # [n, K], or [n, D] at full width
    scale: np.ndarray | None  # [K, D]; None at full width

    @property
    def rank(self) -> int:
        """K, or 0 at full width, as in `model.band_ranks`."""
        return 0 if self.scale is None else len(self.scale)

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return self.wte.size + (0 if self.scale is None else self.scale.size)

    def dense(self) -> np.ndarray:
        """The rows as [n, D]."""
        return self.wte if self.scale is None else self.wte @ self.scale


class FactorizedTable(NamedTuple):
    """A token table as a list of bands; a table of a single rank has one band.

    Only the input embedding adds the mean. In the head, it would add the same logit to
    all tokens, which the softmax cancels.
    """

    order: np.ndarray  # [V] int32, the token at each position; a single band: 0, 1, ...
    bands: tuple[BandFactors, ...]
    mean: np.ndarray | None  # [D]

    @classmethod
    def of_one_band(
        cls, band: BandFactors, mean: np.ndarray | None = None
    ) -> "FactorizedTable":
        """A table of a single band in the order of token ids."""
        return cls(np.arange(len(band.wte), dtype=np.int32), (band,), mean)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens in each band."""
        return tuple(len(band.wte) for band in self.bands)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each band; 0 at full width."""
        return tuple(band.rank for band in self.bands)

    @property
    def width(self) -> int:
        """Model width D."""
        first = self.bands[0]
        return (first.wte if first.scale is None else first.scale).shape[1]

    @property
    def parameters(self) -> int:
        """Number of values of the bands, and of the order if there are several."""
        order = len(self.order) if len(self.bands) > 1 else 0
        return sum(band.parameters for band in self.bands) + order

    @property
    def mean_parameters(self) -> int:
        """Number of values of the mean, which position embeddings may hold."""
        return 0 if self.mean is None else len(self.mean)

    @property
    def sha256(self) -> str:
        """Hash of all values: the same recipe can give another table."""
        factors = (factor for band in self.bands for factor in band)
        return sha256_of_arrays(self.order, *factors, self.mean)

    def dense(self) -> np.ndarray:
        """The whole table by token id, mean included: [V, D]."""
        rows_VD = np.concatenate([band.dense() for band in self.bands])
        dense_VD = np.empty_like(rows_VD)
        dense_VD[self.order] = rows_VD
        return dense_VD if self.mean is None else dense_VD + self.mean
