"""Quantization to a few bits: packed codes, error bounds, bytes, compensation."""

import numpy as np
import pytest

from pcagpt.factorization import gptq, quantize
from pcagpt.factorization.quantize import pack_bits, unpack_bits

RANDOM = np.random.default_rng(0)
TABLE = (RANDOM.normal(size=(50, 100)) * np.exp(RANDOM.normal(size=(50, 1)))).astype(
    np.float32
)
GROUPS = dict.fromkeys((6, 5, 4, 3, 2), [(0, 32), (32, 64), (64, 96), (96, 100)])
GROUPS[8] = [(0, 100)]
LEVELS = {8: 255, 6: 63, 5: 31, 4: 15, 3: 8, 2: 4}
each_width = pytest.mark.parametrize("bits", GROUPS)
MIXED = RANDOM.normal(size=(100, 100)) / np.sqrt(np.arange(1, 101))
METRIC = MIXED @ MIXED.T


@each_width
@pytest.mark.parametrize("width", [1, 7, 32, 100])
def test_packed_codes_come_back_and_fill_no_more_than_their_last_byte(bits, width):
    half = 2 ** (bits - 1)
    codes = RANDOM.integers(-half, half, (5000, width)).astype(np.int8)
    codes[:2, 0] = -half, half - 1
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (5000, -(-width * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, width, bits), codes)


def test_packed_codes_are_those_worked_out_by_hand():
    codes = np.array([[1, -1, 3, -4]], np.int8)  # 001 111 011 100, in three bits each
    assert pack_bits(codes, 3).tolist() == [[0b00111101, 0b11000000]]
    assert pack_bits(np.array([[-2, -1, 0, 1]], np.int8), 2).tolist() == [[0b10110001]]


@each_width
def test_an_entry_is_off_by_half_a_step_at_most(bits):
    largest = np.empty_like(TABLE)
    for start, end in GROUPS[bits]:
        part = TABLE[:, start:end]
        largest[:, start:end] = np.abs(part).max(axis=1, keepdims=True)
    error = np.abs(quantize(TABLE, bits).dense() - TABLE)
    half_step = largest / (LEVELS[bits] - 1)
    assert (error <= half_step * 1.002 + largest * 2.0**-11).all()
    assert error.max() > 0.4 * half_step.max()  # The bound is tight.


def test_bytes_are_those_of_codes_and_scales():
    assert quantize(TABLE, 8).bytes == 50 * 100 + 50 * 2
    assert quantize(TABLE, 4).bytes == 50 * (50 + 4 * 2)
    # An odd number of 4-bit codes fills its last byte.
    assert quantize(TABLE[:, :33], 4).bytes == 50 * (17 + 2 * 2)
    for bits in (6, 5, 3, 2):
        stored = quantize(TABLE, bits)
        assert stored.bytes == stored.packed.nbytes + stored.scales.nbytes
        assert stored.bytes == 50 * (-(-100 * bits // 8) + 4 * 2)


@each_width
def test_levels_are_symmetric_and_keep_the_largest_entry_and_zeros(bits):
    codes = quantize(TABLE, bits).codes
    assert codes.dtype == np.int8
    assert codes.max() == 2 ** (bits - 1) - 1
    assert codes.min() == 2 ** (bits - 1) - LEVELS[bits]
    array = np.array([[0, 0, 1.5], [0, 0, 0], [1e-9, 0, 0]], np.float32)
    found = quantize(array, bits).dense()
    assert found[0, 2] == pytest.approx(1.5, rel=1e-3)
    assert (found[1:] == 0).all()
    np.testing.assert_array_equal(quantize(-array, bits).dense()[:, 2], -found[:, 2])


def test_four_levels_of_two_bits_are_those_worked_out_by_hand():
    """The largest entry, 3, is one and a half steps of 2."""
    stored = quantize(np.array([[3, -3, 0.9, -0.9, 1.9, 2.1]], np.float32), 2)
    assert stored.scales.tolist() == [[2]]
    assert stored.codes.tolist() == [[1, -2, 0, -1, 0, 1]]
    assert stored.dense().tolist() == [[3, -3, 1, -1, 1, 3]]


@each_width
def test_gptq_without_correlations_rounds_to_the_nearest(bits):
    rounded, moved = quantize(TABLE, bits), gptq(TABLE, bits, 3 * np.eye(100))
    np.testing.assert_array_equal(moved.codes, rounded.codes)
    np.testing.assert_array_equal(moved.scales, rounded.scales)


@each_width
def test_gptq_costs_less_in_its_metric_than_rounding_at_equal_bytes(bits):
    def cost(stored):
        error = stored.dense() - TABLE
        return np.einsum("nd,nd->", error @ METRIC, error)

    rounded, moved = quantize(TABLE, bits), gptq(TABLE, bits, METRIC)
    assert moved.bytes == rounded.bytes
    assert cost(moved) < 0.5 * cost(rounded)


def test_gptq_of_two_columns_that_correlate_is_as_worked_out_by_hand():
    """If columns 0 and 1 share half of a metric, -e/2 of 1 makes up for e of 0.

    The damping of 1 % makes it 0.495 e. At 2 bits, the levels are -3, -1, 1 and 3.
    """
    table = np.array([[1.9, 1.7, -3.0]], np.float32)
    metric = np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert quantize(table, 2).codes.tolist() == [[0, 0, -2]]
    # Column 0 loses 0.9, so column 1 becomes 1.7 + 0.495 * 0.9 = 2.15.
    assert gptq(table, 2, metric).codes.tolist() == [[0, 1, -2]]


def test_gptq_takes_a_singular_metric_and_rows_of_zeros():
    for bits in (4, 2):
        stored = gptq(np.zeros((3, 100)), bits, np.outer(MIXED[0], MIXED[0]))
        assert (stored.dense() == 0).all()


def test_entries_beyond_float16_scales_are_cut():
    row = np.array([[4e5, -1e6, 1.0]], np.float32)
    found = quantize(row, 4).dense()
    np.testing.assert_allclose(found, [[65504 * 6, -65504 * 7, 0]])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("largest", [1e-4, 1e-6, 1e-8])
def test_the_error_of_tiny_rows_is_within_its_stated_bound(bits, largest):
    rows_ND = np.random.default_rng(0).uniform(-largest, largest, (200, 32))
    rows_ND = rows_ND.astype(np.float32)
    levels = 2**bits if bits <= 3 else 2**bits - 1
    error_N = np.abs(quantize(rows_ND, bits).dense() - rows_ND).max(axis=1)
    bound_N = np.abs(rows_ND).max(axis=1) / (levels - 1) + levels * 2.0**-26
    assert (error_N <= bound_N * (1 + 1e-6)).all()
