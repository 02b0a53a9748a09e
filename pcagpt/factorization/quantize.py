"""Symmetric quantization to a few bits, with one scale per group of columns.

Shape letters: N rows, D columns, G groups of columns, n rows at a time.
"""

import dataclasses

import numpy as np

from pcagpt.factorization.chunks import chunks

# Columns that share a scale at few bits. GPTQ moves their errors on together.
_GROUP = 32
LARGEST_SCALE = float(np.finfo(np.float16).max)
_DAMPING = 0.01  # share of the metric's mean diagonal that GPTQ adds to its diagonal


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized array [N, width], as it is stored."""

    packed: np.ndarray  # uint8 [N, bytes of a row], of `pack_bits`
    scales: np.ndarray  # float16 [N, G], the step between two levels
    width: int
    bits: int

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales in storage."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def codes(self) -> np.ndarray:
        """int8 [N, width]: a level is (code + `offset_of`) * scale."""
        return unpack_bits(self.packed, self.width, self.bits)

    def dense(self) -> np.ndarray:
        """The dequantized array, float32 [N, width]."""
        group, scales_NG = group_of(self.bits, self.width), self.scales
        scales_ND = np.repeat(scales_NG.astype(np.float32), group, axis=1)
        return (self.codes + offset_of(self.bits)) * scales_ND[:, : self.width]


def quantize(array_ND: np.ndarray, bits: int) -> Quantized:
    """Rounds to equidistant levels between -max and max of each group.

    From 4 bits on, they are 2^bits - 1 levels, with 0 in the middle. 3 and 2 bits have
    all 2^bits levels, (code + 1/2) * scale, without 0. The error of an entry is at most
    half a step plus the rounding of the scale to float16: max / (levels - 1) * 1.002 +
    2^-11 * max. If the step is below 2^-14, where float16 has fixed spacing, it is max
    / (levels - 1) + levels * 2^-26, and steps below 2^-25 become zero. Entries beyond
    65504 * (levels - 1) / 2 are cut to that magnitude.
    """
    return _quantize(array_ND, bits, None)


def gptq(array_ND: np.ndarray, bits: int, metric_DD: np.ndarray) -> Quantized:
    """Rounds so that the error E of each row has a small E M E' in a metric M.

    Column after column, the error is compensated in the columns that follow (GPTQ,
    Frantar et al. 2022). A group gets its scale when its first column is due. With the
    identity as metric, the result is that of `quantize`.
    """
    width = array_ND.shape[1]
    damping = _DAMPING * np.trace(metric_DD) / width
    inverse_DD = np.linalg.inv(metric_DD + damping * np.eye(width))
    moves_DD = np.linalg.cholesky(inverse_DD, upper=True)
    moves_DD /= moves_DD.diagonal()[:, None]
    return _quantize(array_ND, bits, moves_DD.astype(np.float32))


def group_of(bits: int, width: int) -> int:
    """Columns per scale: few bits have few levels, so their scale must fit closely."""
    return width if bits == 8 else min(_GROUP, width)


def largest_code(bits: int) -> int:
    """The code of the largest level."""
    return 2 ** (bits - 1) - 1


def offset_of(bits: int) -> np.float32:
    """The level of code 0, in steps.

    It is 1/2 at 2 and 3 bits, which use all 2^bits levels and have no level 0: few bits
    need every level. More bits have a level 0 and do not use the code -2^(bits-1).
    """
    return np.float32(0.5 if bits <= 3 else 0)


def pack_bits(codes_ND: np.ndarray, bits: int) -> np.ndarray:
    """Codes in two's complement side by side; rows end in full bytes: uint8 [N, bytes].

    codes_ND: int8 from -2^(bits-1) to `largest_code`.
    """
    packed = np.empty((len(codes_ND), -(-codes_ND.shape[1] * bits // 8)), np.uint8)
    for rows in chunks(len(codes_ND)):
        bytes_nD1 = codes_ND[rows].view(np.uint8)[..., None]
        bits_nDb = np.unpackbits(bytes_nD1, axis=2)[..., -bits:]
        packed[rows] = np.packbits(bits_nDb.reshape(len(bits_nDb), -1), axis=1)
    return packed


def unpack_bits(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """The codes of `pack_bits`: int8 [N, width]."""
    codes_ND = np.empty((len(packed), width), np.int8)
    for rows in chunks(len(packed)):
        bits_n = np.unpackbits(packed[rows], axis=1, count=width * bits)
        bytes_nD1 = np.packbits(bits_n.reshape(len(bits_n), width, bits), axis=2)
        # The code is in the upper bits; a shift to the right repeats its sign.
        codes_ND[rows] = bytes_nD1[..., 0].view(np.int8) >> (8 - bits)
    return codes_ND


def _quantize(
    array_ND: np.ndarray, bits: int, moves_DD: np.ndarray | None
) -> Quantized:
    """Rounds; column i subtracts `moves_DD[j, i]` times the error of column j."""
    rows, width = array_ND.shape
    group, offset = group_of(bits, width), offset_of(bits)
    largest = largest_code(bits) + offset  # Levels are in units of the step.
    codes_ND = np.empty((rows, width), np.int8)
    scales_NG = np.empty((rows, -(-width // group)), np.float16)
    for part in chunks(rows):
        left_Dn = np.array(array_ND[part].T, np.float32, order="C")
        for start in range(0, width, _GROUP):
            end = min(start + _GROUP, width)
            if start % group == 0:
                size_n = np.abs(left_Dn[start : start + group]).max(axis=0)
                scale_n = np.minimum(size_n / largest, LARGEST_SCALE).astype(np.float16)
                scales_NG[part, start // group] = scale_n
                step_n = scale_n.astype(np.float32)
            for j in range(start, end):
                if moves_DD is not None:
                    left_Dn[j] -= moves_DD[start:j, j] @ left_Dn[start:j]
                steps_n = left_Dn[j] / np.where(step_n > 0, step_n, 1)
                levels_n = np.rint(steps_n - offset) + offset
                levels_n = np.clip(levels_n, -largest, largest)
                codes_ND[part, j] = (levels_n - offset) * (step_n > 0)
                left_Dn[j] -= levels_n * step_n  # It now holds the error.
            if moves_DD is not None:
                left_Dn[end:] -= moves_DD[start:end, end:].T @ left_Dn[start:end]
    return Quantized(pack_bits(codes_ND, bits), scales_NG, width, bits)
