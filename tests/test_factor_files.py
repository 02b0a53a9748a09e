"""The files of a factorization: written whole, read back, refused when damaged."""

import numpy as np
import pytest

from pcagpt.errors import UserError
from pcagpt.factorize import BandFactors, FactorizedTable
from pcagpt.factorize import files as factor_files

RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(7, 2)).astype(np.float32)
SCALE = RANDOM.normal(size=(2, 5)).astype(np.float32)
MEAN = RANDOM.normal(size=5).astype(np.float32)
SPECTRUM = np.array([3.0, 2.0, 1.0, 0.5, 0.25])


def write(folder, mean=None, metadata=None):
    low_ranks = {2: FactorizedTable.of_one_band(BandFactors(TABLE, SCALE), mean)}
    factor_files.write(folder, low_ranks, SPECTRUM, metadata or {"method": "svd"})


@pytest.mark.parametrize("mean", [None, MEAN])
def test_what_is_written_is_read_back(mean, tmp_path):
    write(tmp_path / "new" / "folder", mean)
    folder = tmp_path / "new" / "folder"
    table = factor_files.read_table(folder / "wte_pca_k2.npy")
    scales = factor_files.read_scale_matrices(folder / "scale_mats_pca_k2.npz")
    np.testing.assert_array_equal(table, TABLE)
    np.testing.assert_array_equal(scales.scale_up, SCALE)
    np.testing.assert_array_equal(scales.scale_down, SCALE)
    if mean is None:
        assert scales.mean is None
    else:
        np.testing.assert_array_equal(scales.mean, mean)
    assert factor_files.read_metadata(folder) == {"method": "svd"}


def test_the_files_have_their_documented_names_keys_and_types(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metadata.json",
        "scale_mats_pca_k2.npz",
        "spectrum.npy",
        "wte_pca_k2.npy",
    ]
    with np.load(tmp_path / "scale_mats_pca_k2.npz", allow_pickle=False) as scales:
        assert {k: (a.shape, a.dtype) for k, a in scales.items()} == {
            "scale_up": ((2, 5), np.float32),
            "scale_down": ((2, 5), np.float32),
        }
    assert np.load(tmp_path / "wte_pca_k2.npy").dtype == np.float32
    spectrum = np.load(tmp_path / "spectrum.npy")
    assert spectrum.dtype == np.float64
    np.testing.assert_array_equal(spectrum, SPECTRUM)


def test_files_without_metadata_are_no_factorization(tmp_path):
    with pytest.raises(TypeError):  # stands for a crash before the last file
        write(tmp_path, metadata={"method": object()})
    assert (tmp_path / "wte_pca_k2.npy").exists()
    assert factor_files.read_metadata(tmp_path) is None


def test_damaged_metadata_say_which_folder_to_delete(tmp_path):
    (tmp_path / "metadata.json").write_text('{"method": ')
    with pytest.raises(UserError, match="metadata.json is damaged .*: delete"):
        factor_files.read_metadata(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_tables_of_any_origin_become_float32(dtype, order, tmp_path):
    np.save(tmp_path / "t.npy", np.asarray(TABLE, dtype, order=order))
    found = factor_files.read_table(tmp_path / "t.npy")
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, TABLE.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\): 2 dimensions are needed"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((2, 3), np.uint8), "dtype uint8: floating point is needed"),
        (np.zeros((2, 3), complex), "dtype complex128"),
        (np.array([[0.0, 1.0], [np.nan, 2.0]]), r"holds nan at \(1, 0\)"),
        (np.array([[0.0, -np.inf]]), r"holds -inf at \(0, 1\)"),
    ],
)
def test_what_is_no_table_is_refused(array, words, tmp_path):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(UserError, match=words):
        factor_files.read_table(tmp_path / "t.npy")


def test_a_pickle_is_never_loaded(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable array file"):
        factor_files.read_table(tmp_path / "t.npy")


def test_an_array_cut_off_inside_an_archive_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, scale_up=np.ones((40, 50)), scale_down=np.ones((40, 50)))
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="s.npz is not a readable array file"):
        factor_files.read_scale_matrices(path)


def test_other_arrays_in_an_archive_do_not_matter(tmp_path):
    np.savez(tmp_path / "s.npz", scale_up=SCALE, scale_down=SCALE, note=np.array("x"))
    found = factor_files.read_scale_matrices(tmp_path / "s.npz")
    np.testing.assert_array_equal(found.scale_up, SCALE)


def bands():
    """Three tokens at full width and four at rank 2, in another order than by id."""
    order = np.array([6, 0, 3, 1, 2, 4, 5], np.int32)
    full = BandFactors(TABLE[:3] @ SCALE, None)
    return FactorizedTable(order, (full, BandFactors(TABLE[3:], SCALE)), MEAN)


@pytest.mark.parametrize("mean", [None, MEAN])
def test_a_table_in_bands_is_read_back(mean, tmp_path):
    table = bands()._replace(mean=mean)
    factor_files.write_bands(tmp_path / "bands", bands())
    factor_files.write_bands(tmp_path / "bands", table)  # In place of the other.
    found = factor_files.read_bands(tmp_path / "bands")
    assert (found.sizes, found.ranks) == ((3, 4), (0, 2))
    np.testing.assert_array_equal(found.dense(), table.dense())
    assert (found.mean is None) == (mean is None)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "token_order.npy").unlink(), "token_order.npy does not exist"),
        (lambda f: (f / "wte_band1.npy").unlink(), "wte_band1.npy does not exist"),
        (
            lambda f: np.save(f / "token_order.npy", np.zeros(7, np.int32)),
            "does not hold each token once",
        ),
        (lambda f: np.save(f / "wte_band1.npy", TABLE[:, :1]), "rank 2, the table"),
        (
            lambda f: np.save(f / "wte_band0.npy", np.ones((3, 9), np.float32)),
            r"widths \[5, 9\]",
        ),
        (
            lambda f: np.save(f / "wte_band0.npy", np.ones((9, 5), np.float32)),
            "bands of 9 rows",
        ),
        (lambda f: (f / "mean.npy").write_bytes(b"no"), "mean.npy is not a readable"),
    ],
)
def test_bands_that_do_not_fit_together_are_refused(harm, says, tmp_path):
    factor_files.write_bands(tmp_path / "bands", bands())
    harm(tmp_path / "bands")
    with pytest.raises(UserError, match=says) as caught:
        factor_files.read_bands(tmp_path / "bands")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_full", [True, False])
def test_a_single_band_of_any_order_is_read_by_token_id(is_full, tmp_path):
    order = np.array([6, 0, 3, 1, 2, 4, 5], np.int32)
    part = BandFactors(TABLE @ SCALE, None) if is_full else BandFactors(TABLE, SCALE)
    table = FactorizedTable(order, (part,), None)
    factor_files.write_bands(tmp_path / "bands", table)
    found = factor_files.read_bands(tmp_path / "bands")
    np.testing.assert_array_equal(found.order, np.arange(7))
    np.testing.assert_allclose(found.dense(), table.dense(), atol=1e-6)
