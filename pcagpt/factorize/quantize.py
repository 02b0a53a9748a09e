"""Symmetric quantization to 8 or 4 bits, with one scale per group of columns.

Shape letters: N rows, D columns, G columns of a group.
"""

import dataclasses

import numpy as np

# Columns per scale; None: all columns of a row. 4 bits have few levels, so a scale must
# fit its values more closely.
GROUP = {8: None, 4: 32}
SCALE_BYTES = 2  # float16


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized array."""

    codes: np.ndarray  # int8 [N, D], at most 2^(bits-1) - 1 in magnitude
    scales: np.ndarray  # float16 [N, groups], the value of code 1
    bits: int

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales in storage; two 4-bit codes share a byte."""
        row_bytes = -(-self.codes.shape[1] * self.bits // 8)
        return len(self.codes) * row_bytes + self.scales.size * SCALE_BYTES

    def dense(self) -> np.ndarray:
        """The dequantized array, float32 [N, D]."""
        width = self.codes.shape[1]
        group = GROUP[self.bits] or width
        scales_ND = np.repeat(self.scales.astype(np.float32), group, axis=1)[:, :width]
        return self.codes * scales_ND


def quantize(array_ND: np.ndarray, bits: int) -> Quantized:
    """Rounds to 2^bits - 1 equidistant levels between -max and max of each group.

    The error of an entry is at most half a step plus the rounding of the scale to
    float16: max / (2^bits - 2) * 1.002 + 2^-11 * max. Groups below the range of float16
    become zero; entries must be below 65504 * (2^(bits-1) - 1) in magnitude.
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
