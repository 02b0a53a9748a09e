"""Tables and scale matrices stored in 8 or 4 bits: symmetric, a scale a group.

Shape letters: N rows, D columns, G columns of a group.
"""

import dataclasses

import numpy as np

# Columns that share a scale: a whole row at 8 bits; few at 4, where each step counts.
GROUP = {8: None, 4: 32}
SCALE_BYTES = 2  # float16


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in integers.

    codes: int8 [N, D], from -(2^(bits-1) - 1) to its negative; scales: float16
    [N, groups], what a code of 1 stands for; bits: 8 or 4.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int

    @property
    def bytes(self) -> int:
        """Of codes and scales; two codes of 4 bits share a byte."""
        row_bytes = -(-self.codes.shape[1] * self.bits // 8)
        return len(self.codes) * row_bytes + self.scales.size * SCALE_BYTES

    def dense(self) -> np.ndarray:
        """What is stored, as float32 [N, D]."""
        width = self.codes.shape[1]
        group = GROUP[self.bits] or width
        scales_ND = np.repeat(self.scales.astype(np.float32), group, axis=1)[:, :width]
        return self.codes * scales_ND


def quantize(array_ND: np.ndarray, bits: int) -> Quantized:
    """Rounds to the nearest of 2^bits - 1 equal steps from -max to max of each group.

    The error of an entry is at most half a step, and what rounding the scale to float16
    adds: max / (2^bits - 2) * 1.002 + 2^-11 * max. Groups below float16's range are
    stored as zeros.

    Args:
      array_ND: finite, below 65504 * (2^(bits-1) - 1) in magnitude.
      bits: 8 or 4.
    """
    largest_code = 2 ** (bits - 1) - 1
    rows, width = array_ND.shape
    group = GROUP[bits] or width
    padded_ND = np.pad(array_ND.astype(np.float32), ((0, 0), (0, -width % group)))
    grouped = padded_ND.reshape(rows, -1, group)
    scales = (np.abs(grouped).max(axis=2) / largest_code).astype(np.float16)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)[:, :, None]
    codes = np.where(scales[:, :, None] > 0, np.rint(grouped / steps), 0)
    codes = np.clip(codes, -largest_code, largest_code).astype(np.int8)
    return Quantized(codes.reshape(rows, -1)[:, :width], scales, bits)
