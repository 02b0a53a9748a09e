"""The solver and its truncation, compared with what can be worked out by hand."""

import math

import numpy as np
import pytest

from pcagpt.factorization import (
    BandFactors,
    FactorizedTable,
    Factorizer,
    Weighting,
    effective_rank,
    energy_kept,
)
from pcagpt.factorization.solve import metric_roots, solve, table_of_rank, truncate

pytestmark = pytest.mark.usefixtures("quick")
RANDOM = np.random.default_rng(0)
TABLE = (
    RANDOM.normal(size=(40, 6)) * [9, 5, 4, 2, 1, 0.3] + [8, 0, -3, 0, 1, 0]
).astype(np.float32)


def svd(table):
    return Factorizer(table, "svd").factors


def pca(table):
    return Factorizer(table, "pca").factors


@pytest.mark.parametrize("method", [svd, pca])
def test_factors_hold_all_ranks_in_the_dtype_of_the_table(method):
    factors = method(TABLE)
    assert factors.table.shape == (40, 6)
    assert factors.directions.shape == (6, 6)
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
    few = method(TABLE[:4])  # Fewer rows than columns: as many ranks as rows.
    assert (few.table.shape, few.directions.shape) == ((4, 4), (4, 6))
    error = table_of_rank(few, 4).dense() - TABLE[:4]
    assert np.linalg.norm(error) < 2e-5


def test_singular_values_agree_with_numpy_and_only_pca_is_centred():
    exact = TABLE.astype(np.float64)
    centred = exact - exact.mean(axis=0)
    for method, rows in ((svd, exact), (pca, centred)):
        np.testing.assert_allclose(
            method(TABLE).singular_values,
            np.linalg.svd(rows, compute_uv=False),
            rtol=2e-6,
            atol=2e-6,
        )
    assert svd(TABLE).mean is None
    np.testing.assert_allclose(pca(TABLE).mean, TABLE.mean(axis=0), rtol=1e-6)


def test_signs_do_not_depend_on_how_the_solver_meets_the_table():
    factors = svd(TABLE)
    largest = np.argmax(np.abs(factors.directions), axis=1)
    assert (factors.directions[np.arange(6), largest] > 0).all()
    negated = svd(-TABLE)
    np.testing.assert_allclose(negated.directions, factors.directions, atol=2e-6)
    np.testing.assert_allclose(negated.table, -factors.table, atol=5e-5)
    order = np.random.default_rng(1).permutation(len(TABLE))
    shuffled = svd(TABLE[order])
    np.testing.assert_allclose(shuffled.directions, factors.directions, atol=2e-6)
    np.testing.assert_allclose(shuffled.table, factors.table[order], atol=5e-5)


def test_with_a_metric_signs_are_those_of_the_directions_in_it():
    root = np.tril(np.ones((6, 6)))
    metric = root @ root.T
    directions = solve(TABLE, Weighting(metric=metric)).directions

    def positive(rows):
        return (rows[np.arange(6), np.argmax(np.abs(rows), axis=1)] > 0).all()

    assert positive(directions @ metric_roots(metric)[0])
    assert not positive(directions)


def test_a_factorization_repeats_bit_for_bit():
    for a, b in zip(svd(TABLE)[:3], svd(TABLE.copy())[:3], strict=True):
        np.testing.assert_array_equal(a, b)


# Truncation


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_out_of_range_is_an_error(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.6"):
        truncate(svd(TABLE), rank)


def test_every_rank_is_a_prefix_of_the_next():
    factors = svd(TABLE)
    for rank in range(1, 7):
        wte, scale = truncate(factors, rank)
        np.testing.assert_allclose(wte, factors.table[:, :rank], rtol=1e-6)
        np.testing.assert_allclose(scale, factors.directions[:rank], rtol=1e-6)


@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
def test_a_split_shares_the_singular_values_and_keeps_the_product(split):
    factors = svd(TABLE)
    band = truncate(factors, 4, split)
    assert band.wte.dtype == band.scale.dtype == np.float32
    singular_values = factors.singular_values[:4]
    np.testing.assert_allclose(
        np.linalg.norm(band.wte, axis=0), singular_values ** (1 - split), rtol=2e-6
    )
    np.testing.assert_allclose(
        np.linalg.norm(band.scale, axis=1), singular_values**split, rtol=2e-6
    )
    np.testing.assert_allclose(band.dense(), truncate(factors, 4).dense(), atol=2e-5)


def test_singular_values_of_zero_stay_finite_at_any_split():
    table = np.zeros((5, 3), np.float32)
    table[:, 0] = [1, 2, 3, 4, 5]
    factors = svd(table)
    exact = factors._replace(
        singular_values=np.array([55**0.5, 0, 0], np.float32),
        table=factors.table * [1, 0, 0],
    )
    for split in (0.0, 0.5, 1.0):
        band = truncate(exact, 3, split)
        assert np.isfinite(band.wte).all()
        assert np.isfinite(band.scale).all()
        np.testing.assert_allclose(band.dense(), table, atol=2e-6)


# Tables


def test_a_table_knows_its_sizes_and_its_rows_by_token_id():
    wte, scale, full = (RANDOM.normal(size=shape) for shape in ((3, 2), (2, 4), (2, 4)))
    order, mean = np.array([4, 0, 3, 1, 2], np.int32), np.arange(4.0)
    bands = (BandFactors(full, None), BandFactors(wte, scale))
    table = FactorizedTable(order, bands, mean)
    assert (table.sizes, table.ranks, table.width) == ((2, 3), (0, 2), 4)
    assert table.parameters == 2 * 4 + 3 * 2 + 2 * 4 + 5  # Two bands store an order.
    wanted = np.empty((5, 4))
    wanted[[4, 0]], wanted[[3, 1, 2]] = full, wte @ scale
    np.testing.assert_allclose(table.dense(), wanted + mean)
    single = FactorizedTable.of_one_band(bands[1])
    assert (single.sizes, single.ranks, single.parameters) == ((3,), (2,), 14)
    np.testing.assert_allclose(single.dense(), wte @ scale)


# Spectra


def test_energy_kept_by_hand():
    np.testing.assert_allclose(energy_kept(np.array([4, 3])), [0.64, 1], rtol=1e-15)
    np.testing.assert_allclose(
        energy_kept(np.array([3, 2, 2, 1])), np.array([9, 13, 17, 18]) / 18, rtol=1e-15
    )
    # A float32 spectrum is summed in float64.
    spectrum = np.concatenate([[np.float32(4096)], np.full(1000, 1, np.float32)])
    kept = energy_kept(spectrum.astype(np.float32))
    np.testing.assert_allclose(kept[1], (2**24 + 1) / (2**24 + 1000), rtol=1e-15)


def test_effective_rank_by_hand():
    assert effective_rank(np.array([5.0, 0, 0])) == 1
    assert effective_rank(np.full(6, 0.1)) == pytest.approx(6, rel=1e-14)
    # Shares 1/2, 1/4, 1/4: an entropy of 3/2 bits. The scale does not matter.
    assert effective_rank(1e3 * np.array([2**0.5, 1, 1])) == pytest.approx(2**1.5)
    # Shares 16/25 and 9/25.
    entropy = 0.64 * math.log(25 / 16) + 0.36 * math.log(25 / 9)
    assert effective_rank(np.array([4, 3])) == pytest.approx(math.exp(entropy))
