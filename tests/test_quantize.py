"""Quantization to 8 and 4 bits: error bounds and bytes."""

import numpy as np
import pytest

from pcagpt.factorize import quantize

RANDOM = np.random.default_rng(0)
TABLE = (RANDOM.normal(size=(50, 100)) * np.exp(RANDOM.normal(size=(50, 1)))).astype(
    np.float32
)
GROUPS = {8: [(0, 100)], 4: [(0, 32), (32, 64), (64, 96), (96, 100)]}
each_width = pytest.mark.parametrize("bits", [8, 4])


@each_width
def test_an_entry_is_off_by_half_a_step_at_most(bits):
    largest = np.empty_like(TABLE)
    for start, end in GROUPS[bits]:
        part = TABLE[:, start:end]
        largest[:, start:end] = np.abs(part).max(axis=1, keepdims=True)
    error = np.abs(quantize(TABLE, bits).dense() - TABLE)
    bound = largest / (2**bits - 2) * 1.002 + largest * 2.0**-11
    assert (error <= bound).all()
    assert error.max() > 0.4 * (largest / (2**bits - 2)).max()  # The bound is tight.


def test_bytes_are_those_of_codes_and_scales():
    assert quantize(TABLE, 8).bytes == 50 * 100 + 50 * 2
    assert quantize(TABLE, 4).bytes == 50 * (50 + 4 * 2)
    # An odd number of 4-bit codes fills its last byte.
    assert quantize(TABLE[:, :33], 4).bytes == 50 * (17 + 2 * 2)


@each_width
def test_codes_are_symmetric_and_keep_the_largest_entry_and_zeros(bits):
    codes = quantize(TABLE, bits).codes
    assert codes.dtype == np.int8
    assert codes.max() == -codes.min() == 2 ** (bits - 1) - 1
    array = np.array([[0, 0, 1.5], [0, 0, 0], [1e-9, 0, 0]], np.float32)
    found = quantize(array, bits).dense()
    assert found[0, 2] == pytest.approx(1.5, rel=1e-3)
    assert (found[1:] == 0).all()
