"""A table in codes of a few bits, to be read in place by `pcagpt.model`.

Shape letters: V vocabulary, D model width, K directions, B bands, S blocks of
directions, W widths of codes, n tokens of a band.

A band has tokens of similar weight. Its codes have one width for each block of
directions. Widths are those of least second-order loss for their bytes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from pcagpt.coding.encode import Prepared
from pcagpt.coding.transform import Coefficients, coefficients, mean_row
from pcagpt.factorize import BudgetTooSmall
from pcagpt.model import BLOCK, WIDTHS

OVERHEAD = 4096  # bytes of the file that hold no values
_ALL = np.array([0, *reversed(WIDTHS)])  # widths, ascending; 0: left out
_LLOYD_STEPS = 50


class PackedBand(NamedTuple):
    """Codes of one band."""

    codes: np.ndarray  # [n, bytes] uint8; see `pcagpt.model.packed`
    scales: np.ndarray  # [K] float32
    blocks: tuple[int, ...]  # number of blocks of each of `WIDTHS`


@dataclasses.dataclass(frozen=True)
class PackedTable:
    """Row v is mean + columns * (scales * levels[codes_v]) @ basis."""

    order: np.ndarray  # [V] int32, token ids, band after band
    bands: tuple[PackedBand, ...]
    basis: np.ndarray  # [K, D] int8
    columns: np.ndarray  # [D] float32
    mean: np.ndarray  # [D] float32
    levels: np.ndarray  # of each of `WIDTHS`, one after another: float32

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each band."""
        return tuple(len(band.codes) for band in self.bands)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of all bands, one after another."""
        return sum((band.blocks for band in self.bands), ())

    @property
    def bytes(self) -> int:
        """Memory of all arrays."""
        shared = (self.order, self.basis, self.columns, self.mean, self.levels)
        own = [array for band in self.bands for array in (band.codes, band.scales)]
        return sum(array.nbytes for array in (*shared, *own))

    def dense(self) -> np.ndarray:
        """The table, float32 [V, D]."""
        dense_VD = np.empty((len(self.order), len(self.mean)), np.float32)
        start = 0
        for codes, scales_K, blocks in self.bands:
            values_nK = _unpack(codes, blocks, self.levels) * scales_K
            rows_nD = (values_nK @ self.basis[: len(scales_K)]) * self.columns
            dense_VD[self.order[start : start + len(codes)]] = rows_nD + self.mean
            start += len(codes)
        return dense_VD


def pack(prepared: Prepared, bands: int, most: int) -> PackedTable:
    """The best table of at most that many bytes; BudgetTooSmall if none fits."""
    table_VD, weighting = prepared.table_VD, prepared.weighting
    width, weights_V = table_VD.shape[1], prepared.weights_V
    mean_D = mean_row(weighting, width)
    exact_DV = coefficients(
        table_VD, weighting._replace(contexts=None), prepared.synthesis_DD, mean_D
    ).values
    tokens_of_bands = _bands(weights_V, bands)
    levels, distortions_W = _levels(exact_DV, tokens_of_bands)
    energy_BS = _block_energy(exact_DV, weights_V, tokens_of_bands)
    sizes_B = np.array([len(tokens) for tokens in tokens_of_bands])
    widths_BS = _widths(energy_BS, distortions_W, sizes_B, width, most)

    directions = min(BLOCK * int((widths_BS > 0).any(axis=0).sum()), width)
    basis = _basis(prepared.synthesis_DD[:directions], weighting.metric)
    stored = coefficients(table_VD, weighting, basis.dense(), mean_D)
    return PackedTable(
        np.concatenate(tokens_of_bands).astype(np.int32),
        tuple(
            _pack_band(stored, tokens, widths_S[widths_S > 0], levels, basis.rows)
            for tokens, widths_S in zip(tokens_of_bands, widths_BS, strict=True)
        ),
        np.pad(basis.integers, ((0, -directions % BLOCK), (0, 0))),
        basis.columns.astype(np.float32),
        mean_D.astype(np.float32),
        np.concatenate([levels[bits] for bits in WIDTHS]).astype(np.float32),
    )


class _Basis(NamedTuple):
    """Rows of a synthesis as integers: entry [k, j] is n rows[k] columns[j]."""

    integers: np.ndarray  # [K, D] int8
    rows: np.ndarray  # [K]
    columns: np.ndarray  # [D]

    def dense(self) -> np.ndarray:
        """The rows, [K, D]."""
        return self.integers * self.rows[:, None] * self.columns


def _basis(rows_KD: np.ndarray, metric_DD: np.ndarray | None) -> _Basis:
    """Rounds rows to 8 bits; in the metric, a column's step costs like another's."""
    columns_D = np.ones(rows_KD.shape[1])
    if metric_DD is not None:
        diagonal_D = metric_DD.diagonal()
        columns_D = np.maximum(diagonal_D, 1e-6 * diagonal_D.mean()) ** -0.5
    rows_KD = rows_KD / columns_D
    steps_K = np.maximum(np.abs(rows_KD).max(axis=1), 1e-30) / 127
    integers_KD = np.rint(rows_KD / steps_K[:, None]).astype(np.int8)
    return _Basis(integers_KD, steps_K, columns_D)


def _bands(weights_V: np.ndarray, bands: int) -> list[np.ndarray]:
    """The tokens of each band, by falling weight; each spans the same factor."""
    order_V = np.argsort(-weights_V, kind="stable")
    falling_V = -np.log2(weights_V[order_V])
    edges = np.linspace(falling_V[0], falling_V[-1], bands + 1)[1:-1]
    found = np.split(order_V, np.searchsorted(falling_V, edges))
    return [tokens for tokens in found if len(tokens)]


def _block_energy(
    values_DV: np.ndarray, weights_V: np.ndarray, tokens_of_bands: list[np.ndarray]
) -> np.ndarray:
    """Weighted energy of each band's coefficients in each block: [B, S].

    It never rises from block to block, so that wide blocks come first.
    """
    found = []
    for tokens in tokens_of_bands:
        energy_D = np.square(values_DV[:, tokens]) @ weights_V[tokens]
        energy_D = np.pad(energy_D, (0, -len(energy_D) % BLOCK))
        found.append(energy_D.reshape(-1, BLOCK).sum(axis=1))
    return np.maximum.accumulate(np.array(found)[:, ::-1], axis=1)[:, ::-1]


def _levels(
    values_DV: np.ndarray, tokens_of_bands: list[np.ndarray]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """({width: the best levels for values of unit energy}, distortion by `_ALL`).

    Lloyd's algorithm (1982), for values of all bands and directions.
    """
    samples = []
    for tokens in tokens_of_bands:
        tokens = tokens[:: max(1, len(tokens) // 256)]
        values_Dn = values_DV[:: max(1, len(values_DV) // 128), tokens]
        energy_D1 = np.square(values_Dn).mean(axis=1, keepdims=True)
        samples.append((values_Dn / np.sqrt(np.maximum(energy_D1, 1e-30))).ravel())
    sample = np.sort(np.concatenate(samples).astype(np.float64))
    sums = np.concatenate([[0], np.cumsum(sample)])
    found, distortions = {}, [np.mean(sample**2)]
    for width in _ALL[1:].tolist():
        levels = np.quantile(sample, (np.arange(2**width) + 0.5) / 2**width)
        for _ in range(_LLOYD_STEPS):
            borders = np.searchsorted(sample, (levels[1:] + levels[:-1]) / 2)
            ends = np.concatenate([[0], borders, [len(sample)]])
            counts = np.diff(ends)
            centres = np.diff(sums[ends]) / np.maximum(counts, 1)
            levels = np.where(counts > 0, centres, levels)
        found[width] = levels
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, sample)]
        distortions.append(np.mean((nearest - sample) ** 2))
    return found, np.array(distortions)


def _widths(energy_BS, distortions_W, sizes_B, width, most) -> np.ndarray:
    """The width of each block's codes that gives the least loss within some bytes."""
    loss_BSW = energy_BS[..., None] * distortions_W
    bytes_BSW = sizes_B[:, None, None] * _ALL + 4 * BLOCK * (_ALL > 0)

    def chosen(price: float) -> tuple[np.ndarray, int]:
        best_BS = np.argmin(loss_BSW + price * bytes_BSW, axis=2)
        used = int(np.take_along_axis(bytes_BSW, best_BS[..., None], 2).sum())
        blocks = int((best_BS > 0).any(axis=0).sum())
        shared = 4 * int(sizes_B.sum()) + 8 * width + 4 * sum(2**w for w in WIDTHS)
        return best_BS, used + blocks * BLOCK * width + shared + OVERHEAD

    low, high = 1e-30, 1e30
    best_BS, least = chosen(high)
    if least > most:
        raise BudgetTooSmall(
            f"{most:,} bytes cannot hold a packed table: without any codes, it takes "
            f"{least:,}"
        )
    for _ in range(100):
        middle = np.sqrt(low * high)
        found_BS, used = chosen(middle)
        if used > most:
            low = middle
        else:
            best_BS, high = found_BS, middle
    return _ALL[best_BS]


def _pack_band(
    stored: Coefficients,
    tokens: np.ndarray,
    widths_S: np.ndarray,
    levels: dict[int, np.ndarray],
    units_K: np.ndarray,
) -> PackedBand:
    """Quantizes the tokens of a band, direction after direction, the weakest first.

    Each error is compensated in what follows; see `quantize`.
    """
    values_Kn = stored.values[:, tokens]
    scales_K = np.sqrt(np.square(values_Kn).mean(axis=1)) + 1e-30
    widths_K = np.repeat(widths_S, BLOCK)
    numbers_Kn = np.zeros((len(widths_K), len(tokens)), np.uint8)
    if stored.contexts is not None:
        contexts_Kn, error_n = stored.contexts[:, tokens], stored.left_out[tokens]
        coming_n = np.einsum("kn,kn->n", contexts_Kn, contexts_Kn, dtype=np.float64)
    for k in reversed(range(len(values_Kn))):
        target_n = values_Kn[k].astype(np.float64)
        if stored.contexts is not None:
            target_n -= error_n * contexts_Kn[k] / (1 + coming_n)
        value_n = np.zeros(len(tokens))
        if k < len(widths_K):
            own = levels[int(widths_K[k])]
            borders = (own[1:] + own[:-1]) / 2
            numbers_Kn[k] = np.searchsorted(borders, target_n / scales_K[k])
            value_n = own[numbers_Kn[k]] * scales_K[k]
        if stored.contexts is not None:
            error_n += (value_n - values_Kn[k]) * contexts_Kn[k]
            coming_n = np.maximum(coming_n - np.square(contexts_Kn[k]), 0)
    scales_K = np.pad(scales_K * units_K, (0, -len(scales_K) % BLOCK))[: len(widths_K)]
    blocks = tuple(int((widths_S == width).sum()) for width in WIDTHS)
    return PackedBand(_packed(numbers_Kn, blocks), scales_K.astype(np.float32), blocks)


def _packed(numbers_Kn: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Codes [n, bytes] uint8: byte i of a block has bit i of its codes."""
    parts, start, rows = [], 0, numbers_Kn.shape[1]
    for width, count in zip(WIDTHS, blocks, strict=True):
        own_Kn = numbers_Kn[start : start + BLOCK * count]
        own_nS8 = own_Kn.T.reshape(rows, count, BLOCK)
        bits_nSW8 = (own_nS8[:, :, None] >> np.arange(width)[:, None]) & 1
        packed = np.packbits(bits_nSW8.astype(np.uint8), axis=-1, bitorder="little")
        parts.append(packed.reshape(rows, count * width))
        start += BLOCK * count
    return np.concatenate(parts, axis=1)


def _unpack(codes, blocks, levels) -> np.ndarray:
    """The values of packed rows: [n, bytes] uint8 -> [n, K] float32."""
    values, byte, level, rows = [], 0, 0, len(codes)
    for width, count in zip(WIDTHS, blocks, strict=True):
        part = codes[:, byte : byte + count * width].reshape(rows, count, width, 1)
        bits_nSW8 = np.unpackbits(part, axis=-1, bitorder="little")
        numbers_nS8 = (bits_nSW8 << np.arange(width)[:, None].astype(np.uint8)).sum(
            axis=2, dtype=np.uint8
        )
        own = levels[level : level + 2**width]
        values.append(own[numbers_nS8].reshape(rows, count * BLOCK))
        byte, level = byte + count * width, level + 2**width
    return np.concatenate(values, axis=1)
