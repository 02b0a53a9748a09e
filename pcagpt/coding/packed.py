"""A table in codes of a few bits, which a model reads in place.

Shape letters: V vocabulary, D model width, K directions, S blocks of directions, n
tokens of a band.

The tokens of a band have similar weights. The codes of a band have one width for each
block of directions.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from pcagpt.coding.encode import Prepared
from pcagpt.coding.quantize import compensated
from pcagpt.coding.transform import Coefficients, coefficients, mean_row
from pcagpt.coding.widths import Widths, borders_of, levels_of
from pcagpt.factorization.chunks import chunks
from pcagpt.factorization.table import sha256_of_arrays
from pcagpt.model import (
    BLOCK_RANK,
    WIDTHS,
    PackedBand,
    SharedArrays,
    packed_constants,
)

# Upper limits of the bytes that describe the arrays in a file.
_FILE_BYTES, _BAND_BYTES = 2300, 560


@dataclasses.dataclass(frozen=True)
class PackedTable:
    """A packed table, in the bands that a model's head has."""

    order: np.ndarray  # [V] int32, token ids, band after band
    bands: tuple[PackedBand, ...]  # of host arrays

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each band."""
        return tuple(band.size for band in self.bands)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of all bands: 0, full width."""
        return (0,) * len(self.bands)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of all bands, one after another, as in `model.band_blocks`."""
        return sum((band.blocks for band in self.bands), ())

    @property
    def memory(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self.constants))

    @property
    def constants(self) -> dict:
        """The 'constants' of a model with this table."""
        return packed_constants(self.order, self.bands)

    @property
    def sha256(self) -> str:
        """Hash of all values."""
        return sha256_of_arrays(self.order, *jax.tree.leaves(self.bands))

    def dense(self) -> np.ndarray:
        """The table, float32 [V, D]."""
        # With NumPy: on a GPU, JAX would compile each operation for each band.
        parts = [
            band.decode(band.codes[part])
            for band in self.bands
            for part in chunks(band.size)
        ]
        rows_VD = np.concatenate(parts)
        dense_VD = np.empty_like(rows_VD)
        dense_VD[self.order] = rows_VD
        return dense_VD


class _ByteBasis(NamedTuple):
    """Rows of a synthesis as integers: entry [k, j] is n rows[k] columns[j]."""

    integers: np.ndarray  # [K, D] int8
    rows: np.ndarray  # [K] float64
    columns: np.ndarray  # [D] float64

    def dense(self) -> np.ndarray:
        """The rows, float64 [K, D]."""
        return self.integers * self.rows[:, None] * self.columns


def pack(prepared: Prepared, bands: int, most: int) -> PackedTable:
    """The best table in a file of some bytes; the smallest one if none surely fits.

    Args:
      prepared: of the table.
      bands: number of bands; those without tokens are left out.
      most: bytes of its file.
    """
    table_VD, weighting = prepared.table_VD, prepared.weighting
    mean_D = mean_row(weighting, table_VD.shape[1])
    tokens_of_bands, levels, widths = choices(prepared, bands)
    widths_BS = widths.within_bytes(most).widths
    directions = BLOCK_RANK * int((widths_BS > 0).any(axis=0).sum())
    synthesis_KD = prepared.synthesis_DD[:directions]
    padding = directions - len(synthesis_KD)  # Blocks may have more rows than a table.
    synthesis_KD = np.pad(synthesis_KD, ((0, padding), (0, 0)))
    basis = _basis(synthesis_KD, weighting.metric)
    stored = coefficients(table_VD, weighting, basis.dense(), mean_D)
    shared = SharedArrays(
        basis=basis.integers,
        columns=basis.columns.astype(np.float32),
        mean=mean_D.astype(np.float32),
        levels=np.concatenate([levels[width] for width in WIDTHS], dtype=np.float32),
    )
    packed, start = [], 0
    for tokens, widths_S in zip(tokens_of_bands, widths_BS, strict=True):
        widths_S = widths_S[widths_S > 0]
        assert (np.diff(widths_S) <= 0).all(), "codes are stored by falling width"
        numbers_nK, scales_K = _quantize(stored, tokens, widths_S, levels)
        scales_K = (scales_K * basis.rows[: len(scales_K)]).astype(np.float32)
        blocks = tuple(int((widths_S == width).sum()) for width in WIDTHS)
        codes = _packed(numbers_nK, blocks)
        packed.append(PackedBand(codes, scales_K, shared, blocks, start, len(tokens)))
        start += len(tokens)
    return PackedTable(np.concatenate(tokens_of_bands).astype(np.int32), tuple(packed))


def estimated_packed_bytes(prepared: Prepared, bands: int, loss: float) -> int:
    """About the size of a file with this `second_order_loss`; inf gives the smallest.

    The error of a token's logit in its context does not count.
    """
    return choices(prepared, bands)[2].bytes_of(2 * loss / prepared.mean_weight)


def choices(
    prepared: Prepared, bands: int
) -> tuple[list[np.ndarray], dict[int, np.ndarray], Widths]:
    """(the tokens of each band, the levels of each width, the choice of widths)."""
    # A search asks for many sizes of the same bands.
    if bands not in prepared.choices:
        prepared.choices[bands] = _choices(prepared, bands)
    return prepared.choices[bands]


def _choices(
    prepared: Prepared, bands: int
) -> tuple[list[np.ndarray], dict[int, np.ndarray], Widths]:
    weighting, width = prepared.weighting, prepared.table_VD.shape[1]
    tokens_of_bands = _bands(prepared.weights_V, bands)
    exact_DV = coefficients(
        prepared.table_VD,
        weighting._replace(contexts=None),
        prepared.synthesis_DD,
        mean_row(weighting, width),
    ).values
    # The squares of very small values are 0 in float32; a power of two loses nothing.
    exponent = int(np.frexp(max(exact_DV.max(), -exact_DV.min()))[1])
    np.ldexp(exact_DV, -exponent, out=exact_DV)
    levels, errors_W = levels_of(exact_DV, tokens_of_bands)
    errors_W = np.ldexp(errors_W, 2 * exponent)
    overhead = _FILE_BYTES + _BAND_BYTES * len(tokens_of_bands)
    weights_V = prepared.weights_V
    widths = Widths(exact_DV, weights_V, tokens_of_bands, errors_W, overhead)
    return tokens_of_bands, levels, widths


def _bands(weights_V: np.ndarray, bands: int) -> list[np.ndarray]:
    """The tokens of each band; each band spans the same factor of weights."""
    order_V = np.argsort(-weights_V, kind="stable")
    falling_V = -np.log2(weights_V[order_V])
    edges = np.linspace(falling_V[0], falling_V[-1], bands + 1)[1:-1]
    found = np.split(order_V, np.searchsorted(falling_V, edges))
    # A model of one band has its tokens in the order of ids.
    return [np.sort(tokens) for tokens in found if len(tokens)]


def _basis(rows_KD: np.ndarray, metric_DD: np.ndarray | None) -> _ByteBasis:
    """Rounds rows to 8 bits; in the metric, the steps of all columns cost the same."""
    columns_D = np.ones(rows_KD.shape[1])
    if metric_DD is not None:
        diagonal_D = metric_DD.diagonal()
        columns_D = np.maximum(diagonal_D, 1e-6 * diagonal_D.mean()) ** -0.5
    rows_KD = rows_KD / columns_D
    steps_K = np.abs(rows_KD).max(axis=1) / 127
    steps_K[steps_K == 0] = 1
    integers_KD = np.rint(rows_KD / steps_K[:, None]).astype(np.int8)
    return _ByteBasis(integers_KD, steps_K, columns_D)


def _quantize(
    stored: Coefficients,
    tokens: np.ndarray,
    widths_S: np.ndarray,
    levels: dict[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(indices of levels [n, K] uint8, scales [K] float64) of the tokens of a band."""
    of_band = Coefficients(*(x if x is None else x[..., tokens] for x in stored))
    squares_Kn = np.square(of_band.values, dtype=np.float64)
    scales_K = np.sqrt(squares_Kn.mean(axis=1))
    widths_K = np.repeat(widths_S, BLOCK_RANK)

    def rounded(k: int, target_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if k >= len(widths_K):  # The band leaves this direction out.
            return (zeros_n := np.zeros(len(tokens))), zeros_n
        own = levels[int(widths_K[k])]
        numbers_n = np.searchsorted(borders_of(own), target_n / (scales_K[k] or 1))
        return numbers_n, own[numbers_n] * scales_K[k]

    numbers_Kn, used = compensated(of_band, rounded), slice(len(widths_K))
    return numbers_Kn[used].T.astype(np.uint8), scales_K[used]


def _packed(numbers_nK: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Codes [n, bytes] uint8: byte i of a block has bit i of its eight indices."""
    parts, start = [], 0
    for width, count in zip(WIDTHS, blocks, strict=True):
        own_nK = numbers_nK[:, start : start + BLOCK_RANK * count]
        own_nS8 = own_nK.reshape(len(own_nK), count, BLOCK_RANK)
        bits_nSW8 = (own_nS8[:, :, None] >> np.arange(width)[:, None]) & 1
        packed_nSW1 = np.packbits(bits_nSW8.astype(np.uint8), -1, bitorder="little")
        parts.append(packed_nSW1.reshape(len(own_nK), count * width))
        start += BLOCK_RANK * count
    return np.concatenate(parts, axis=1)
