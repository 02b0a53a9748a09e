"""Arrays in 8 and 4 bits: how far off, how many bytes."""

import numpy as np
import pytest

from pcagpt.factorize.quantize import quantize

RANDOM = np.random.default_rng(0)
TABLE = (RANDOM.normal(size=(50, 100)) * np.exp(RANDOM.normal(size=(50, 1)))).astype(
    np.float32
)


def largest_of_group(array, bits):
    """The largest magnitude of each entry's group, group after group of a row."""
    group = {8: 100, 4: 32}[bits]
    found = np.empty_like(array)
    for start in range(0, array.shape[1], group):
        part = array[:, start : start + group]
        found[:, start : start + group] = np.abs(part).max(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_an_entry_is_off_by_half_a_step_at_most(bits):
    largest = largest_of_group(TABLE, bits)
    error = np.abs(quantize(TABLE, bits).dense() - TABLE)
    bound = largest / (2**bits - 2) * 1.002 + largest * 2.0**-11
    assert (error <= bound).all()
    assert error.max() > 0.4 * (largest / (2**bits - 2)).max()  # The bound is tight.


@pytest.mark.parametrize(
    ("bits", "wanted"), [(8, 50 * 100 + 50 * 2), (4, 50 * (50 + 4 * 2))]
)
def test_bytes_are_those_of_codes_and_scales(bits, wanted):
    assert quantize(TABLE, bits).bytes == wanted


def test_an_odd_number_of_4_bit_codes_fills_its_last_byte():
    assert quantize(TABLE[:, :33], 4).bytes == 50 * (17 + 2 * 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_entry_and_zeros_are_kept(bits):
    array = np.array([[0, 0, 1.5], [0, 0, 0], [1e-9, 0, 0]], np.float32)
    found = quantize(array, bits).dense()
    assert found[0, 2] == pytest.approx(1.5, rel=1e-3)
    assert (found[1:] == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_symmetric_and_fit_their_bits(bits):
    codes = quantize(TABLE, bits).codes
    assert codes.dtype == np.int8
    assert codes.max() == -codes.min() == 2 ** (bits - 1) - 1
