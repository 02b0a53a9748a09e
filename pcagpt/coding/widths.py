"""Chooses the width of each code of a packed table, and the levels of each width.

Shape letters: V vocabulary, D model width, B bands, S blocks of directions, W widths, n
sampled tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pcagpt.model import BLOCK_RANK, LEVELS, WIDTHS

CHOICES = np.array([0, *reversed(WIDTHS)])  # 0: a block is left out
_LLOYD_STEPS = 50
_SAMPLED = 256  # tokens of a band, and directions


def levels_of(
    values_DV: np.ndarray, tokens_of_bands: list[np.ndarray]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """The levels that serve best for coefficients of unit energy (Lloyd 1982).

    The largest of the values must be about 1. Returns ({width: its levels}, squared
    error with each of `CHOICES`).
    """
    samples = []
    for tokens in tokens_of_bands:
        tokens = tokens[:: max(1, len(tokens) // _SAMPLED)]
        values_Dn = values_DV[:: max(1, len(values_DV) // _SAMPLED), tokens]
        energy_D1 = np.square(values_Dn).mean(axis=1, keepdims=True)
        samples.append((values_Dn / np.sqrt(np.maximum(energy_D1, 1e-30))).ravel())
    sample = np.sort(np.concatenate(samples).astype(np.float64))
    sums = np.concatenate([[0], np.cumsum(sample)])
    found, errors = {}, [np.mean(sample**2)]
    for width in CHOICES[1:].tolist():
        # The best density of many levels is proportional to the cube root of that of
        # the values (Panter and Dite 1951): a Gaussian with three times the variance.
        shares = (np.arange(2**width) + 0.5) / 2**width
        levels = np.sqrt(3) * np.quantile(sample, shares)
        for _ in range(_LLOYD_STEPS):
            ends = np.searchsorted(sample, borders_of(levels))
            ends = np.concatenate([[0], ends, [len(sample)]])
            counts = np.diff(ends)
            centres = np.diff(sums[ends]) / np.maximum(counts, 1)
            levels = np.where(counts > 0, centres, levels)
        found[width] = levels
        nearest = levels[np.searchsorted(borders_of(levels), sample)]
        errors.append(np.mean((nearest - sample) ** 2))
    return found, np.array(errors)


def borders_of(levels: np.ndarray) -> np.ndarray:
    """The thresholds between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


class Choice(NamedTuple):
    """Widths, and what they cost."""

    widths: np.ndarray  # [B, S]
    bytes: int  # at most, of the file
    error: float  # weighted squared error; contexts do not count


class Widths:
    """Chooses widths of least weighted error; more bytes never have a larger error.

    Widths never rise from block to block, and each band has at least one block.
    errors_W: squared error of each of `CHOICES`, at mean square 1 of the values.
    overhead: bytes of the file that describe its arrays.
    """

    def __init__(
        self,
        values_DV: np.ndarray,
        weights_V: np.ndarray,
        tokens_of_bands: list[np.ndarray],
        errors_W: np.ndarray,
        overhead: int = 0,
    ):
        self._width, energy = len(values_DV), []
        for tokens in tokens_of_bands:
            energy_D = np.square(values_DV[:, tokens]) @ weights_V[tokens]
            energy_D = np.pad(energy_D, (0, -self._width % BLOCK_RANK))
            energy.append(energy_D.reshape(-1, BLOCK_RANK).sum(axis=1))
        falling_BS = np.maximum.accumulate(np.array(energy)[:, ::-1], axis=1)[:, ::-1]
        self._errors_BSW = falling_BS[..., None] * errors_W
        self._errors_BSW[:, 0, 0] = np.inf  # Orbax stores no empty arrays.
        sizes_B = np.array([len(tokens) for tokens in tokens_of_bands])
        # A code takes its bits; each direction of a band takes a scale.
        bytes_BSW = sizes_B[:, None, None] * CHOICES + 4 * BLOCK_RANK * (CHOICES > 0)
        self._bytes_BSW = np.broadcast_to(bytes_BSW, self._errors_BSW.shape)
        order = sizes_B.sum() if len(sizes_B) > 1 else 0  # One band stores none.
        self._fixed = overhead + 4 * (order + 2 * self._width + LEVELS)

    def within_bytes(self, most: int) -> Choice:
        """The best choice for a file of some bytes; the coarsest if none must fit."""
        return self._finest(lambda choice: choice.bytes <= most)

    def bytes_of(self, error: float) -> int:
        """About the size of a file with this error; slightly too small.

        If all files have smaller errors, the size of the smallest.
        """
        return self._finest(lambda choice: choice.error > error).bytes

    def _finest(self, fits: Callable[[Choice], bool]) -> Choice:
        """The finest choice that fits, or the coarsest if none does."""
        largest = self._errors_BSW[..., 1:].max()
        low, high = np.log2(largest + 1e-200) + np.array([-200, 1])
        found = self._at(2.0**high)
        if not fits(found):
            return found
        for _ in range(60):
            middle = (low + high) / 2
            choice = self._at(2.0**middle)
            if fits(choice):
                found, high = choice, middle
            else:
                low = middle
        return found

    def _at(self, price: float) -> Choice:
        """The choice at a price of a byte."""
        priced_BSW = self._errors_BSW + price * self._bytes_BSW
        best_BS1 = np.argmin(priced_BSW, axis=2)[..., None]
        used = np.take_along_axis(self._bytes_BSW, best_BS1, 2).sum()
        error = np.take_along_axis(self._errors_BSW, best_BS1, 2).sum()
        rows = BLOCK_RANK * (best_BS1 > 0).any(axis=0).sum()  # of the basis
        size = int(used + rows * self._width + self._fixed)
        return Choice(CHOICES[best_BS1[..., 0]], size, float(error))
