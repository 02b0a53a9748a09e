"""The files of a factorization: written, read back, refused when damaged."""

import numpy as np
import pytest

from pcagpt import files
from pcagpt.errors import Unreadable, UserError
from pcagpt.factorization import BandFactors, FactorizedTable, factor_files

RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(7, 2)).astype(np.float32)
SCALE = RANDOM.normal(size=(2, 5)).astype(np.float32)
MEAN = RANDOM.normal(size=5).astype(np.float32)
SPECTRUM = np.array([3.0, 2.0, 1.0, 0.5, 0.25])
ORDER = np.array([6, 0, 3, 1, 2, 4, 5], np.int32)
# Three tokens at full width and four at rank 2.
BANDS = FactorizedTable(
    ORDER,
    (BandFactors(TABLE[:3] @ SCALE, None), BandFactors(TABLE[3:], SCALE)),
    MEAN,
)


def write(folder, mean=None, **metadata):
    table = FactorizedTable.of_one_band(BandFactors(TABLE, SCALE), mean)
    factor_files.write(folder, {2: table}, SPECTRUM, {"method": "svd", **metadata})


def test_a_folder_holds_the_documented_names_keys_and_types(tmp_path):
    write(tmp_path / "new" / "folder")
    found = {path.name: path for path in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(found) == [
        "metadata.json",
        "scale_mats_pca_k2.npz",
        "spectrum.npy",
        "wte_pca_k2.npy",
    ]
    with np.load(found["scale_mats_pca_k2.npz"], allow_pickle=False) as scales:
        assert {k: (a.shape, a.dtype) for k, a in scales.items()} == {
            "scale_up": ((2, 5), np.float32),
            "scale_down": ((2, 5), np.float32),
        }
    assert np.load(found["wte_pca_k2.npy"]).dtype == np.float32
    spectrum = np.load(found["spectrum.npy"])
    assert spectrum.dtype == np.float64
    np.testing.assert_array_equal(spectrum, SPECTRUM)


@pytest.mark.parametrize("mean", [None, MEAN])
def test_a_table_of_one_band_is_read_back(mean, tmp_path):
    write(tmp_path, mean)
    table = factor_files.read_table(factor_files.table_path(tmp_path, 2))
    scales = factor_files.read_scale_matrices(factor_files.scale_path(tmp_path, 2))
    np.testing.assert_array_equal(table, TABLE)
    np.testing.assert_array_equal(scales.scale_up, SCALE)
    np.testing.assert_array_equal(scales.scale_down, SCALE)
    np.testing.assert_array_equal(scales.mean, mean)
    assert factor_files.read_metadata(tmp_path) == {"method": "svd", "ranks": {}}
    assert factor_files.exists(tmp_path, 2, in_bands=False)
    assert not factor_files.exists(tmp_path, 3, in_bands=False)


@pytest.mark.parametrize("mean", [None, MEAN])
def test_a_table_in_bands_is_read_back(mean, tmp_path):
    table = BANDS._replace(mean=mean)
    factor_files.write(tmp_path, {4: table}, SPECTRUM, {}, in_bands=True)
    found = factor_files.read_bands(factor_files.bands_path(tmp_path, 4))
    assert (found.sizes, found.ranks) == ((3, 4), (0, 2))
    np.testing.assert_array_equal(found.dense(), table.dense())
    np.testing.assert_array_equal(found.mean, mean)
    assert factor_files.exists(tmp_path, 4, in_bands=True)
    assert not factor_files.exists(tmp_path, 4, in_bands=False)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_a_single_band_of_any_order_is_read_by_token_id(scale, tmp_path):
    wte = TABLE @ SCALE if scale is None else TABLE
    table = FactorizedTable(ORDER, (BandFactors(wte, scale),), None)
    factor_files.write_bands(tmp_path / "bands", table)
    found = factor_files.read_bands(tmp_path / "bands")
    np.testing.assert_array_equal(found.order, np.arange(7))
    np.testing.assert_allclose(found.dense(), table.dense(), atol=1e-6)


def test_a_killed_factorization_is_known_as_unfinished(tmp_path, monkeypatch):
    write_npy = factor_files.write_npy

    def killed(path, array):
        if path.name == "spectrum.npy":
            raise KeyboardInterrupt
        write_npy(path, array)

    monkeypatch.setattr(factor_files, "write_npy", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ranks={"1": {}, "2": {}})
    assert (tmp_path / "wte_pca_k2.npy").exists()
    metadata = factor_files.read_metadata(tmp_path)
    assert (metadata["ranks"], metadata["unfinished"]) == ({"1": {}}, [2])
    assert factor_files.not_ours(tmp_path, metadata, [1, 2]) == []
    monkeypatch.undo()
    table = FactorizedTable.of_one_band(BandFactors(TABLE, SCALE), None)
    ranks = {"ranks": {"1": {}, "4": {}}}  # Another rank ends in between.
    factor_files.write(tmp_path, {4: table}, SPECTRUM, {"method": "svd"} | ranks)
    metadata = factor_files.read_metadata(tmp_path)
    assert metadata["unfinished"] == [2]
    assert factor_files.not_ours(tmp_path, metadata, [2]) == []
    write(tmp_path, ranks={"1": {}, "2": {}, "4": {}})
    assert "unfinished" not in factor_files.read_metadata(tmp_path)


def test_files_that_a_person_put_there_are_known_as_not_ours(tmp_path):
    (tmp_path / "wte_pca_k2.npy").write_bytes(b"mine")
    (tmp_path / "bands_pca_k4").mkdir()
    found = factor_files.not_ours(tmp_path, None, [2, 4, 8])
    assert [path.name for path in found] == ["bands_pca_k4", "wte_pca_k2.npy"]
    made = tmp_path / "made"
    write(made, ranks={"2": {}})
    (made / "wte_pca_k4.npy").write_bytes(b"mine")
    metadata = factor_files.read_metadata(made)
    (found,) = factor_files.not_ours(made, metadata, [2, 4, 8])
    assert found.name == "wte_pca_k4.npy"


def test_metadata_without_ranks_describe_none(tmp_path):
    (tmp_path / "metadata.json").write_text('{"ranks": null, "unfinished": null}')
    (tmp_path / "wte_pca_k4.npy").write_bytes(b"mine")
    metadata = factor_files.read_metadata(tmp_path)
    assert metadata["ranks"] == {}
    assert len(factor_files.not_ours(tmp_path, metadata, [4])) == 1


def test_damaged_metadata_name_the_folder_to_delete(tmp_path):
    (tmp_path / "metadata.json").write_text('{"method": ')
    with pytest.raises(UserError, match=r"metadata.json is damaged .*: delete"):
        factor_files.read_metadata(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
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
        (np.array([[0.0, 1.0], [np.nan, 2.0]]), r"holds nan at \(1, 0\)"),
        (np.array([[0.0, 1e300]]), r"holds inf at \(0, 1\)"),
    ],
)
def test_an_array_that_is_no_table_is_refused(array, words, tmp_path):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(UserError, match=words):
        factor_files.read_table(tmp_path / "t.npy")


def test_scale_matrices_need_both_matrices_and_ignore_other_arrays(tmp_path):
    np.savez(tmp_path / "s.npz", scale_up=SCALE, scale_down=SCALE, note=np.array("x"))
    found = factor_files.read_scale_matrices(tmp_path / "s.npz")
    np.testing.assert_array_equal(found.scale_up, SCALE)
    np.savez(tmp_path / "s.npz", scale_up=SCALE)
    with pytest.raises(UserError, match="has no array 'scale_down'"):
        factor_files.read_scale_matrices(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", scale_up=SCALE, scale_down=SCALE[:1])
    with pytest.raises(UserError, match=r"scale_down \(1, 5\): both matrices must"):
        factor_files.read_scale_matrices(tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("token_order.npy", None, "token_order.npy does not exist"),
        ("wte_band1.npy", None, "wte_band1.npy does not exist"),
        ("token_order.npy", np.zeros(7, np.int32), "does not hold each token once"),
        ("wte_band1.npy", TABLE[:, :1], "rank 2, but the table"),
        ("wte_band0.npy", np.ones((3, 9), np.float32), r"widths \[5, 9\]"),
        ("wte_band0.npy", np.ones((9, 5), np.float32), "bands of 9 rows"),
    ],
)
def test_bands_that_contradict_each_other_are_refused(name, content, says, tmp_path):
    factor_files.write_bands(tmp_path, BANDS)
    (tmp_path / "metadata.json").unlink()  # As in older versions: no digests.
    (tmp_path / name).unlink()
    if content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError, match=says) as caught:
        factor_files.read_bands(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other", [{"scale_down": 2 * SCALE}, {"mean": np.ones(5, np.float32)}]
)
def test_a_band_with_more_than_one_scale_matrix_is_refused(other, tmp_path):
    factor_files.write_bands(tmp_path, BANDS)
    (tmp_path / "metadata.json").unlink()
    arrays = {"scale_up": SCALE, "scale_down": SCALE} | other
    np.savez(tmp_path / "scale_mats_band1.npz", **arrays)
    with pytest.raises(UserError, match=r"band1.npz holds two .* is in mean.npy"):
        factor_files.read_bands(tmp_path)


def test_any_flipped_byte_of_the_files_is_seen_by_every_reader(tmp_path):
    write(tmp_path, MEAN)
    readers = {
        factor_files.table_path(tmp_path, 2): factor_files.read_table,
        factor_files.scale_path(tmp_path, 2): factor_files.read_scale_matrices,
        tmp_path / "spectrum.npy": lambda path: factor_files.read_spectrum(path.parent),
    }
    for path, read in readers.items():
        whole = path.read_bytes()
        read(path)
        for place in range(10, len(whole) - 1, 7):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            for reader in (read, factor_files.sha256):
                with pytest.raises(UserError, match=f"{path.name} was changed"):
                    reader(path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["token_order.npy", "wte_band1.npy", "scale_mats_band1.npz", "mean.npy"]
)
def test_bands_that_changed_since_they_were_written_are_refused(name, tmp_path):
    factor_files.write_bands(tmp_path, BANDS)
    content = bytearray((tmp_path / name).read_bytes())
    content[-2] ^= 1
    for damaged in (content, content[:-1], None):
        (tmp_path / name).unlink()
        if damaged is not None:
            (tmp_path / name).write_bytes(damaged)
        for read in (factor_files.read_bands, factor_files.sha256_of_bands):
            with pytest.raises(UserError, match=name):
                read(tmp_path)


@pytest.mark.parametrize(
    "read", [factor_files.read_bands, factor_files.sha256_of_bands]
)
def test_a_file_in_place_of_a_folder_of_bands_is_not_to_be_deleted(read, tmp_path):
    (tmp_path / "bands").touch()
    with pytest.raises(UserError, match="bands is not a folder: correct the path$"):
        read(tmp_path / "bands")


def test_other_files_beside_bands_do_not_change_their_hash(tmp_path):
    factor_files.write_bands(tmp_path, BANDS)
    own = factor_files.sha256_of_bands(tmp_path)
    (tmp_path / "wte_band0_backup.npy").write_bytes(b"mine")
    assert factor_files.sha256_of_bands(tmp_path) == own


def test_factors_that_the_system_does_not_read_are_not_damaged(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path, *arguments):
        if path.suffix == ".npy":
            raise PermissionError(13, "Permission denied", f"{path}")
        return open(path, *arguments)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(Unreadable) as caught:
        factor_files.exists(tmp_path, 2, in_bands=False)
    assert "write it again" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"method": "svd"}',
        '{"ranks": []}',
        '{"ranks": {"x": {}}}',
        '{"ranks": {"8": 1}}',
        "[]",
        "{",
    ]
    + ['{"ranks": {"8": {"energy_kept": "0.5"}}}', '{"effective_rank": NaN}'],
)
def test_metadata_of_another_shape_are_refused(text, tmp_path):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=r"metadata.json.*: delete"):
        factor_files.read_metadata(tmp_path)
