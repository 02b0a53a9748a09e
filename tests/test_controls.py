"""Controls of a factorized table: each shares the one thing that it is named for."""

import numpy as np
import pytest

from pcagpt import config as knobs
from pcagpt.factorize import CONTROLS, control


@pytest.fixture
def factors():
    """A table [40, 6] and a scale matrix [6, 12] of uneven rows."""
    random = np.random.default_rng(0)
    table = random.normal(size=(40, 6)) * np.array([9, 5, 3, 1, 0.5, 0.1])
    return table, random.normal(size=(6, 12)) * np.arange(1, 7)[:, None]


def made(factors, keep, seed=1):
    return control(*factors, keep, np.random.default_rng(seed))


def singular_values(table, scale):
    return np.linalg.svd(table @ scale, compute_uv=False)[: table.shape[1]]


def test_every_control_can_be_asked_for():
    rule = knobs.KNOBS["init.keep"].rule
    assert all(rule.holds(keep) for keep in CONTROLS)


@pytest.mark.parametrize("keep", CONTROLS)
def test_a_control_has_the_shapes_another_table_and_another_one_a_seed(keep, factors):
    table, scale = made(factors, keep)
    assert (table.shape, scale.shape) == ((40, 6), (6, 12))
    assert table.dtype == scale.dtype == np.float32
    assert not np.allclose(table, factors[0], atol=0.1)
    np.testing.assert_array_equal(made(factors, keep)[0], table)
    assert not np.allclose(made(factors, keep, seed=2)[0], table, atol=0.1)


def test_std_keeps_the_root_mean_square_of_factors_and_of_their_product(factors):
    table, scale = np.tile(factors[0], (500, 1)), factors[1]
    found = made((table, scale), "std")
    for one, other in zip(found, (table, scale), strict=True):
        tolerance = 4 / np.sqrt(one.size)  # Four standard errors.
        assert np.std(one) == pytest.approx(np.sqrt(np.mean(other**2)), rel=tolerance)
        assert abs(np.mean(one)) < tolerance * np.std(one)


def test_spectrum_keeps_singular_values_and_the_lengths_of_the_scale_s_rows(factors):
    table, scale = made(factors, "spectrum")
    wanted = singular_values(*factors)
    np.testing.assert_allclose(singular_values(table, scale), wanted, rtol=1e-5)
    lengths = np.linalg.norm(scale, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(factors[1], axis=1), rtol=1e-5)
    unit = scale / lengths[:, None]
    np.testing.assert_allclose(unit @ unit.T, np.eye(6), atol=1e-6)


def test_spectrum_works_for_fewer_tokens_than_the_rank(factors):
    few = factors[0][:4]
    table, scale = made((few, factors[1]), "spectrum")
    assert (table.shape, scale.shape) == ((4, 6), (6, 12))
    found, wanted = (
        np.linalg.svd(a @ b)[1] for a, b in ((table, scale), (few, factors[1]))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_rows_keeps_every_row_and_the_scale(factors):
    table, scale = made(factors, "rows")
    np.testing.assert_array_equal(scale, factors[1].astype(np.float32))
    rows = factors[0].astype(np.float32)
    np.testing.assert_array_equal(np.sort(table, axis=0), np.sort(rows, axis=0))
    assert {tuple(row) for row in table} == {tuple(row) for row in rows}


@pytest.mark.parametrize("keep", CONTROLS)
def test_a_band_at_full_width_has_controls_too(keep, factors):
    rows = factors[0] @ factors[1]
    table, scale = control(rows, None, keep, np.random.default_rng(1))
    assert (table.shape, scale) == (rows.shape, None)
    if keep == "spectrum":
        found = np.linalg.svd(table, compute_uv=False)
        wanted = np.linalg.svd(rows, compute_uv=False)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    if keep == "rows":
        assert {tuple(r) for r in table} == {tuple(r) for r in rows.astype(np.float32)}
