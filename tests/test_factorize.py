"""Factorizations of a token table, against what can be worked out by hand."""

import math

import numpy as np
import pytest

from pcagpt.factorize import (
    METHODS,
    effective_rank,
    energy_kept,
    solve,
    table_of_rank,
    truncate,
)

pytestmark = pytest.mark.usefixtures("quick")
RANDOM = np.random.default_rng(0)
TABLE = (
    RANDOM.normal(size=(40, 6)) * [9, 5, 4, 2, 1, 0.3] + [8, 0, -3, 0, 1, 0]
).astype(np.float32)


def svd(table):
    return solve(table, METHODS["svd"](table, None))


def pca(table):
    return solve(table, METHODS["pca"](table, None))


each_method = pytest.mark.parametrize("method", [svd, pca])


def error(table, low_rank):
    return np.linalg.norm(table - low_rank.dense())


@each_method
def test_methods_return_all_ranks_in_the_dtype_of_the_table(method):
    factors = method(TABLE)
    assert factors.table.shape == (40, 6)
    assert factors.directions.shape == (6, 6)
    assert factors.singular_values.shape == (6,)
    arrays = [array for array in factors if array is not None]
    assert {type(array) for array in arrays} == {np.ndarray}
    assert {array.dtype for array in arrays} == {np.dtype("float32")}
    assert (np.diff(factors.singular_values) < 0).all()
    np.testing.assert_allclose(
        np.linalg.norm(factors.table, axis=0), factors.singular_values, rtol=1e-6
    )
    np.testing.assert_allclose(
        factors.directions @ factors.directions.T, np.eye(6), atol=1e-6
    )


@each_method
def test_table_with_fewer_rows_than_columns_has_as_many_ranks_as_rows(method):
    factors = method(TABLE[:4])
    assert factors.table.shape == (4, 4)
    assert factors.directions.shape == (4, 6)
    assert error(TABLE[:4], table_of_rank(factors, 4)) < 2e-5


def test_svd_agrees_with_numpy():
    singular_values = np.linalg.svd(TABLE.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(
        svd(TABLE).singular_values, singular_values, rtol=2e-6, atol=2e-6
    )
    centred = TABLE.astype(np.float64) - TABLE.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(
        pca(TABLE).singular_values,
        np.linalg.svd(centred, compute_uv=False),
        rtol=2e-6,
        atol=2e-6,
    )


def test_svd_does_not_centre_and_pca_does():
    assert svd(TABLE).mean is None
    np.testing.assert_allclose(pca(TABLE).mean, TABLE.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(pca(TABLE).table.sum(axis=0), 0, atol=1e-4)


# Signs


def test_largest_entry_of_every_direction_is_positive():
    directions = svd(TABLE).directions
    largest = np.argmax(np.abs(directions), axis=1)
    assert (directions[np.arange(6), largest] > 0).all()


def test_factorization_repeats_bit_for_bit():
    for a, b in zip(svd(TABLE)[:3], svd(TABLE.copy())[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_signs_do_not_hang_on_how_the_solver_meets_the_table():
    factors = svd(TABLE)
    negated = svd(-TABLE)
    np.testing.assert_allclose(negated.directions, factors.directions, atol=2e-6)
    np.testing.assert_allclose(negated.table, -factors.table, atol=5e-5)
    order = np.random.default_rng(1).permutation(len(TABLE))
    shuffled = svd(TABLE[order])
    np.testing.assert_allclose(shuffled.directions, factors.directions, atol=2e-6)
    np.testing.assert_allclose(shuffled.table, factors.table[order], atol=5e-5)


# Truncation


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_rank_that_is_not_there_is_an_error_that_says_so(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.6"):
        truncate(svd(TABLE), rank)


def test_every_rank_is_a_prefix_of_the_next():
    factors = svd(TABLE)
    for rank in range(1, 7):
        low_rank = truncate(factors, rank)
        np.testing.assert_allclose(low_rank.wte, factors.table[:, :rank], rtol=1e-6)
        np.testing.assert_allclose(low_rank.scale, factors.directions[:rank], rtol=1e-6)


@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
def test_split_shares_out_the_singular_values_and_changes_no_product(split):
    factors = svd(TABLE)
    low_rank = truncate(factors, 4, split)
    assert low_rank.wte.dtype == low_rank.scale.dtype == np.float32
    singular_values = factors.singular_values[:4]
    np.testing.assert_allclose(
        np.linalg.norm(low_rank.wte, axis=0), singular_values ** (1 - split), rtol=2e-6
    )
    np.testing.assert_allclose(
        np.linalg.norm(low_rank.scale, axis=1), singular_values**split, rtol=2e-6
    )
    whole = truncate(factors, 4)
    np.testing.assert_allclose(
        low_rank.wte @ low_rank.scale, whole.wte @ whole.scale, atol=2e-5
    )


def test_singular_values_of_zero_stay_finite_at_any_split():
    table = np.zeros((5, 3), np.float32)
    table[:, 0] = [1, 2, 3, 4, 5]
    factors = svd(table)
    exact = factors._replace(
        singular_values=np.array([55**0.5, 0, 0], np.float32),
        table=factors.table * [1, 0, 0],
    )
    for split in (0.0, 0.5, 1.0):
        low_rank = truncate(exact, 3, split)
        assert np.isfinite(low_rank.wte).all()
        assert np.isfinite(low_rank.scale).all()
        np.testing.assert_allclose(low_rank.wte @ low_rank.scale, table, atol=2e-6)


# Spectra


def test_energy_kept_by_hand():
    np.testing.assert_allclose(energy_kept(np.array([4, 3])), [0.64, 1], rtol=1e-15)
    np.testing.assert_allclose(
        energy_kept(np.array([3, 2, 2, 1])), np.array([9, 13, 17, 18]) / 18, rtol=1e-15
    )


def test_effective_rank_by_hand():
    assert effective_rank(np.array([7.0])) == 1
    assert effective_rank(np.array([5.0, 0, 0])) == 1
    assert effective_rank(np.full(6, 0.1)) == pytest.approx(6, rel=1e-14)
    # Shares 1/2, 1/4, 1/4: an entropy of 3/2 bits.
    assert effective_rank(np.array([2**0.5, 1, 1])) == pytest.approx(2**1.5)
    # Shares 16/25 and 9/25.
    entropy = 0.64 * math.log(25 / 16) + 0.36 * math.log(25 / 9)
    assert effective_rank(np.array([4, 3])) == pytest.approx(math.exp(entropy))


def test_effective_rank_does_not_depend_on_the_scale_of_the_table():
    spectrum = svd(TABLE).singular_values
    assert effective_rank(spectrum) == pytest.approx(effective_rank(1e3 * spectrum))


def test_energy_of_a_float32_spectrum_is_summed_in_float64():
    spectrum = np.concatenate([[np.float32(4096)], np.full(1000, 1, np.float32)])
    kept = energy_kept(spectrum.astype(np.float32))
    assert kept.dtype == np.float64
    np.testing.assert_allclose(kept[1], (2**24 + 1) / (2**24 + 1000), rtol=1e-15)
