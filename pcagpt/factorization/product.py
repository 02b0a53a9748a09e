"""Product quantization: each part of a row is the index of a vector in a codebook.

Shape letters: V vocabulary, D columns, P parts of a row, C centroids, d columns of a
part.
"""

import dataclasses
import warnings

import numpy as np
from scipy.cluster.vq import kmeans2, vq

from pcagpt.factorization.quantize import LARGEST_SCALE

CENTROIDS = 256  # of a part: a code is one byte
_SAMPLE = 8192  # rows that k-means sees
_ITERATIONS = 20


@dataclasses.dataclass(frozen=True)
class ProductQuantized:
    """A quantized table, as it is stored."""

    codes: np.ndarray  # uint8 [V, P]
    codebooks: tuple[np.ndarray, ...]  # P times float16 [C, d]

    @property
    def bytes(self) -> int:
        """Bytes of codes and codebooks in storage."""
        return self.codes.nbytes + sum(book.nbytes for book in self.codebooks)

    def dense(self) -> np.ndarray:
        """The dequantized table, float32 [V, D]."""
        pairs = zip(self.codebooks, self.codes.T, strict=True)
        rows_VD = np.concatenate([book[codes] for book, codes in pairs], axis=1)
        return rows_VD.astype(np.float32)


def product_quantize(
    table_VD: np.ndarray, parts: int, weights_V: np.ndarray
) -> ProductQuantized:
    """Codebooks by k-means (Jégou et al. 2011) with plain Euclidean distances.

    A metric would whiten the parts, and directions of tiny weight then get errors so
    large that second order no longer holds. Likely tokens are more often in the sample
    of rows that k-means sees, so codebooks fit them better. Centroids are cut to the
    range of float16.

    Args:
      table_VD: finite.
      parts: P; their widths differ by at most one column.
      weights_V: positive, of the tokens.
    """
    random, count = np.random.default_rng(0), min(_SAMPLE, len(table_VD))
    shares_V = weights_V / weights_V.sum()
    sample = random.choice(len(table_VD), count, replace=False, p=shares_V)
    codes, codebooks = [], []
    for part_Vd in np.array_split(table_VD, parts, axis=1):
        part_Vd = np.ascontiguousarray(part_Vd, np.float32)
        sampled_nd = part_Vd[sample]
        with warnings.catch_warnings():
            # Of equal starting rows, one gets all the tokens. The others stay empty,
            # which does no harm.
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            start_Cd = sampled_nd[:CENTROIDS]
            book_Cd, _ = kmeans2(sampled_nd, start_Cd, _ITERATIONS, minit="matrix")
        book_Cd = np.clip(book_Cd, -LARGEST_SCALE, LARGEST_SCALE)
        codebooks.append(book_Cd.astype(np.float16))
        codes.append(vq(part_Vd, codebooks[-1].astype(np.float32))[0].astype(np.uint8))
    return ProductQuantized(np.stack(codes, axis=1), tuple(codebooks))
