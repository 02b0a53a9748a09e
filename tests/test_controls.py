"""Control experiments: each keeps the one property that it is named for."""

import numpy as np
import pytest

from pcagpt.config import KNOBS
from pcagpt.errors import UserError
from pcagpt.factorization import CONTROLS, control

RANDOM = np.random.default_rng(0)
# A table [40, 6] and a scale matrix [6, 12] with uneven rows.
WTE = RANDOM.normal(size=(40, 6)) * np.array([9, 5, 3, 1, 0.5, 0.1])
SCALE = RANDOM.normal(size=(6, 12)) * np.arange(1, 7)[:, None]


def made(keep, wte=WTE, scale=SCALE, seed=1):
    return control(wte, scale, keep, np.random.default_rng(seed))


def singular_values(wte, scale):
    return np.linalg.svd(wte @ scale, compute_uv=False)[:6]


@pytest.mark.parametrize("keep", CONTROLS)
def test_a_control_has_the_same_shapes_and_another_table_for_each_seed(keep):
    assert KNOBS["init.keep"].rule.holds(keep)
    wte, scale = made(keep)
    assert (wte.shape, scale.shape) == (WTE.shape, SCALE.shape)
    assert wte.dtype == scale.dtype == np.float32
    assert not np.allclose(wte, WTE, atol=0.1)
    np.testing.assert_array_equal(made(keep)[0], wte)
    assert not np.allclose(made(keep, seed=2)[0], wte, atol=0.1)


def test_std_keeps_the_root_mean_square_of_both_factors():
    large = np.tile(WTE, (500, 1))
    for found, wanted in zip(made("std", large), (large, SCALE), strict=True):
        tolerance = 4 / np.sqrt(found.size)  # Four standard errors.
        root = np.sqrt(np.mean(wanted**2))
        assert np.std(found) == pytest.approx(root, rel=tolerance)
        assert abs(np.mean(found)) < tolerance * np.std(found)


def test_spectrum_keeps_singular_values_and_the_lengths_of_scale_rows():
    wte, scale = made("spectrum")
    np.testing.assert_allclose(
        singular_values(wte, scale), singular_values(WTE, SCALE), rtol=1e-5
    )
    lengths = np.linalg.norm(scale, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(SCALE, axis=1), rtol=1e-5)
    unit = scale / lengths[:, None]
    np.testing.assert_allclose(unit @ unit.T, np.eye(6), atol=1e-6)


def test_spectrum_works_for_fewer_tokens_than_the_rank():
    wte, scale = made("spectrum", WTE[:4])
    assert (wte.shape, scale.shape) == ((4, 6), (6, 12))
    np.testing.assert_allclose(
        singular_values(wte, scale), singular_values(WTE[:4], SCALE), rtol=1e-5
    )


def rows_of(array):
    return {tuple(row) for row in array.astype(np.float32)}


def test_rows_keeps_every_row_and_the_scale():
    wte, scale = made("rows")
    np.testing.assert_array_equal(scale, SCALE.astype(np.float32))
    assert rows_of(wte) == rows_of(WTE)


@pytest.mark.parametrize("keep", CONTROLS)
def test_a_band_at_full_width_has_controls_too(keep):
    full = WTE @ SCALE
    wte, scale = made(keep, full, None)
    assert (wte.shape, scale) == (full.shape, None)
    if keep == "std":
        assert wte.std() == pytest.approx(np.sqrt(np.mean(full**2)), rel=0.2)
    if keep == "spectrum":
        found, wanted = (np.linalg.svd(a, compute_uv=False) for a in (wte, full))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    if keep == "rows":
        assert rows_of(wte) == rows_of(full)


def test_a_spectrum_of_a_scale_matrix_with_a_row_of_zeros_is_refused():
    scale = SCALE.copy()
    scale[2] = 0
    with pytest.raises(UserError, match="^a scale matrix has a row of zeros"):
        made("spectrum", scale=scale)
