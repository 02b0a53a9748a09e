"""Files: replaced in one step, strict in both directions, damage named."""

import json
import math

import numpy as np
import pytest

from pcagpt import files
from pcagpt.errors import UserError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def stop(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(path, stop)
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict_in_both_directions(tmp_path):
    path = tmp_path / "a.json"
    written = {8: (np.float32(0.5), math.nan, -math.inf), "é": {"n": np.int64(3)}}
    files.write_json(path, written)
    expected = {"8": [0.5, None, None], "é": {"n": 3}}
    assert files.read_json(path, "delete it") == expected
    assert "é" in path.read_text("utf-8")
    path.write_text('{"old": NaN}')
    assert files.read_json(path, "delete it") == {"old": None}
    assert files.read_json(tmp_path / "none.json", "delete it") is None


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_damaged_json_says_what_to_do(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.json is damaged \(.*\): delete it"):
        files.read_json(path, "delete it")


def test_arrays_are_read_back_and_one_kind_is_not_the_other(tmp_path):
    npy, npz, a = tmp_path / "a.npy", tmp_path / "a.npz", np.arange(6.0)
    files.write_npy(npy, a)
    files.write_npz(npz, a=a, b=a[:2])
    np.testing.assert_array_equal(files.read_npy(npy), a)
    np.testing.assert_array_equal(files.read_npz(npz)["b"], a[:2])
    with pytest.raises(UserError, match="a.npy is not a .npz file"):
        files.read_npz(npy)
    with pytest.raises(UserError, match="a.npz is not a .npy file"):
        files.read_npy(npz)


@pytest.mark.parametrize("read", [files.read_npy, files.read_npz])
def test_arrays_that_are_missing_damaged_or_pickled_are_refused(read, tmp_path):
    path = tmp_path / "a.np"
    with pytest.raises(UserError, match="a.np does not exist"):
        read(path)
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    files.write_npz(tmp_path / "a.npz", a=np.arange(600.0))
    whole = (tmp_path / "a.npz").read_bytes()
    pickled = (tmp_path / "object.npy").read_bytes()
    for content in (b"", b"no array", pickled, whole[:300]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.np is not a readable array file"):
            read(path)


def test_an_array_damaged_inside_an_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    files.write_npz(path, a=np.ones(2000))
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.npz is not a readable array file"):
        files.read_npz(path)


def test_a_file_that_cannot_be_hashed_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert files.sha256_of_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(UserError, match="No such file"):
        files.sha256_of_file(tmp_path / "b")
