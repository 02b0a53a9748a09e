"""Files: replaced in one step, strict in both directions, damage named."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import pickle
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from pcagpt import array_files, coding, file_hashes, files, json_files
from pcagpt.data import meta
from pcagpt.errors import Unreadable, UserError, explain
from pcagpt.run import digests


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    json_files.write_json(path, {"a": 1})

    def stop(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(path, stop)
    with pytest.raises(TypeError):
        json_files.write_json(path, {"a": object()})
    assert json_files.read_json(path, "") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)
    for write in (files.write_text, json_files.write_json, array_files.write_npy):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "a", {} if write is json_files.write_json else "")
        assert explain(caught.value).startswith(f"{tmp_path}/a: no space left on dev")


@pytest.mark.parametrize("write", [array_files.write_npy, array_files.write_npz])
def test_an_array_that_does_not_fit_is_told_with_the_path(write, tmp_path):
    array, before = np.zeros(10**6), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError) as caught:
            write(tmp_path / "a", **{"array": array})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert explain(caught.value).startswith(f"{tmp_path}/a: file too large: raise")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_told_with_the_path(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "a").write_text("{}")
    monkeypatch.setattr(array_files, "_array", fail)
    monkeypatch.setattr(json_files, "parse_json", fail)
    monkeypatch.setattr(file_hashes.hashlib, "file_digest", fail)
    for read in (array_files.read_npy, file_hashes.sha256_of_file):
        with pytest.raises(Unreadable, match=f"^{tmp_path}/a: input/output error"):
            read(tmp_path / "a")
    with pytest.raises(Unreadable, match=f"^{tmp_path}/a: input/output error"):
        json_files.read_json(tmp_path / "a", "")


def test_json_is_strict_in_both_directions(tmp_path):
    path = tmp_path / "a.json"
    written = {8: (np.float32(0.5), math.nan, -math.inf), "é": {"n": np.int64(3)}}
    json_files.write_json(path, written)
    expected = {"8": [0.5, None, None], "é": {"n": 3}}
    assert json_files.read_json(path, "delete it") == expected
    assert "é" in path.read_text("utf-8")
    twice = '{"a": [{"b": 1, "c": 2, "b": 3}]}'
    for bad in (
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        twice,
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match="a.json is damaged .*: delete it"):
            json_files.read_json(path, "delete it")
    path.write_text('{"a": 1, "a": 1}')
    assert json_files.read_json(path, "delete it") == {"a": 1}
    assert json_files.read_json(tmp_path / "none.json", "delete it") is None


def test_older_files_may_hold_infinities_but_no_nan(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": Infinity, "b": [-Infinity, 1e999]}')
    expected = {"a": None, "b": [None, None]}
    assert json_files.read_json(path, "delete it", has_infinities=True) == expected
    path.write_text('{"a": NaN}')
    with pytest.raises(UserError, match="NaN is not JSON"):
        json_files.read_json(path, "delete it", has_infinities=True)


def test_a_number_that_python_does_not_convert_is_damage(tmp_path):
    path = tmp_path / "a.json"
    for sign in ("", "-"):
        path.write_text(f'{{"a": {sign}{"7" * 5000}}}')
        with pytest.raises(UserError, match=r"\(a number is too long\): delete it"):
            json_files.read_json(path, "delete it")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_damaged_json_says_what_to_do(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.json is damaged \(.*\): delete it"):
        json_files.read_json(path, "delete it")


def test_arrays_are_read_back_and_one_kind_is_not_the_other(tmp_path):
    npy, npz, a = tmp_path / "a.npy", tmp_path / "a.npz", np.arange(6.0)
    array_files.write_npy(npy, a)
    array_files.write_npz(npz, a=a, b=a[:2])
    np.testing.assert_array_equal(array_files.read_npy(npy), a)
    np.testing.assert_array_equal(array_files.read_npz(npz)["b"], a[:2])
    with pytest.raises(UserError, match="a.npy is not a .npz file"):
        array_files.read_npz(npy)
    with pytest.raises(UserError, match="a.npz is not a .npy file"):
        array_files.read_npy(npz)


@pytest.mark.parametrize("read", [array_files.read_npy, array_files.read_npz])
def test_arrays_that_are_missing_damaged_or_pickled_are_refused(read, tmp_path):
    path = tmp_path / "a.np"
    with pytest.raises(UserError, match="a.np does not exist"):
        read(path)
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    array_files.write_npz(tmp_path / "a.npz", a=np.arange(600.0))
    whole = (tmp_path / "a.npz").read_bytes()
    pickled = (tmp_path / "object.npy").read_bytes()
    for content in (b"", b"no array", pickled, whole[:300]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.np is not a (readable|\.np)"):
            read(path)


def test_an_array_damaged_inside_an_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    array_files.write_npz(path, a=np.ones(2000))
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.npz is not a readable array file"):
        array_files.read_npz(path)


@pytest.mark.parametrize("read", [array_files.read_npy, array_files.read_npz])
@pytest.mark.parametrize(
    ("error", "kind"),
    [(MemoryError(), MemoryError), (PermissionError(13, "x", "/a"), Unreadable)],
)
def test_an_array_that_the_system_does_not_read_is_not_damaged(
    read, error, kind, tmp_path, monkeypatch
):
    def refuse(*_):
        raise error

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(kind) as caught:
        read(tmp_path / "a")
    assert "write it again" not in str(caught.value)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
        (lambda path: os.symlink("nowhere", path), "a link to nothing"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        array_files.read_npy,
        array_files.read_npz,
        files.open_file,
        file_hashes.sha256_of_file,
        coding.read,
        lambda path: json_files.read_json(path, "delete it"),
    ],
)
def test_what_is_no_file_is_refused_by_its_kind(read, make, kind, tmp_path):
    make(tmp_path / "a")
    has_stamp = read is file_hashes.sha256_of_file and kind == "a link to nothing"
    said = "a: No such file" if has_stamp else rf"{tmp_path}/a .*is {kind}\b"
    with pytest.raises(UserError, match=said):
        read(tmp_path / "a")


def alarm(*_, **__):
    raise TimeoutError


def read_array(path, patch):
    array_files.write_npy(path, np.zeros(2))
    patch(array_files, "_array", alarm)
    array_files.read_npy(path)


def read_pickle(path, patch):
    path.write_bytes(pickle.dumps({"vocab_size": 5}))
    patch(meta, "_PlainUnpickler", alarm)
    meta._read_pickle(path)


def read_checkpoint(path, patch):
    with digests.reading(path.parent):
        alarm()


@pytest.mark.parametrize("read", [read_array, read_pickle, read_checkpoint])
def test_an_alarm_of_the_program_is_no_damage(read, tmp_path, monkeypatch):
    with pytest.raises(TimeoutError):
        read(tmp_path / "file", monkeypatch.setattr)


def test_an_array_below_a_file_does_not_exist(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a/b.npy does not exist: give the path of a"):
        array_files.read_npy(tmp_path / "a" / "b.npy")


def test_a_file_that_cannot_be_hashed_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_hashes.sha256_of_file(path).startswith(
        "ba7816bf8f01cfea414140de5dae2223"
    )
    with pytest.raises(UserError, match="No such file"):
        file_hashes.sha256_of_file(tmp_path / "b")


def test_a_file_is_hashed_again_only_if_it_may_have_changed(tmp_path, monkeypatch):
    path, hashed, digest = tmp_path / "a", [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda *a: hashed.append(a) or digest(*a)
    )
    path.write_bytes(b"abc")
    for settled, reads in ((100, 2), (0, 1)):
        monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", settled)
        hashed.clear()
        one, two = file_hashes.sha256_of_file(path), file_hashes.sha256_of_file(path)
        assert (one == two, len(hashed)) == (True, reads)
    times = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_hashes.sha256_of_file(path) != one


def test_changed_json_is_refused_unless_its_seal_is_removed(tmp_path):
    path = tmp_path / "a.json"
    json_files.write_json(path, {"loss": 1.5, "steps": [1, 2]})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1.5", b"1.4"))
    with pytest.raises(UserError, match="a.json is damaged .*changed since"):
        json_files.read_json(path, "delete it")
    path.write_text(json.dumps({"loss": 1.4}))
    assert json_files.read_json(path, "delete it") == {"loss": 1.4}


def test_json_that_a_person_changed_is_kept_when_it_is_written_anew(tmp_path, said):
    path = tmp_path / "result.json"
    for loss in (3.0, 2.0):
        json_files.write_json(path, {"loss": loss})
    assert not list(tmp_path.glob("*.replaced-*"))
    for theirs in ('{"loss": 2.0, "note": "mine"}', "no JSON"):
        path.write_text(theirs)
        json_files.write_json(path, {"loss": 1.0})
        (kept,) = tmp_path.glob("*.replaced-*")
        assert kept.read_text() == theirs
        words = f"{path} was changed by hand, or by an older version: it is kept as "
        assert said()[-1] == words + kept.name
        assert json_files.read_json(path, "") == {"loss": 1.0}
        kept.unlink()


def test_no_flipped_bit_of_json_changes_what_is_read(tmp_path):
    path, value = tmp_path / "a.json", {"loss": 1.5, "name": "é", "none": None}
    json_files.write_json(path, value)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(UserError):
            found = json_files.read_json(path, "delete it")
            assert {name: found[name] for name in value} == value


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"n": "x"}', "'n' is 'x'"),
        (b'{"n": true}', "'n' is True"),
        (b"{}", "'n' is missing"),
        (b'{"n": null}', "'n' is None"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(content, says):
    with pytest.raises(UserError, match=f"a.json is damaged .*{says}.*: delete it"):
        json_files.check_fields(
            json.loads(content), {"n": (int,)}, "a.json", "delete it"
        )


def test_an_array_file_that_declares_more_than_it_holds_is_not_read(tmp_path):
    for shape in ((10**12,), (2**62, 2**62), (3,), (-1, -6)):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(24))
        with pytest.raises(UserError, match=r"a.npy is not a readable.* 24 bytes"):
            array_files.read_npy(tmp_path / "a.npy")
    # 128 MiB of zeros in a file of 130 kB.
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**27, np.uint8))
    with pytest.raises(UserError, match="a.npz declares arrays of 134,"):
        array_files.read_npz(tmp_path / "a.npz")


def test_no_flipped_bit_of_an_archive_changes_what_is_read(tmp_path):
    path, a = tmp_path / "a.npz", np.arange(3.0)
    array_files.write_npz(path, a=a)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = array_files.read_npz(path)
        except UserError:
            refused += 1
        else:
            np.testing.assert_array_equal(found.get("a", a), a)
    assert 8 * a.nbytes < refused < 8 * len(whole)


def test_values_that_only_damage_can_make_are_refused():
    array_files.check_values(np.array([1e6, -1e6]), "t")
    for bad in (np.nan, np.inf, -2e6):
        with pytest.raises(UserError, match=r"t holds .* at \(1,\)"):
            array_files.check_values(np.array([0.0, bad]), "t")


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, n=name, call=call: (done.append(n), call(*a))
        )
    files.write_text(tmp_path / "a", "text")
    assert done == ["fsync", "replace", "fsync"]


def test_a_result_that_cannot_be_kept_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    path = tmp_path / "none" / "a.json"
    assert not files.keep(path, lambda path: json_files.write_json(path, {}))
    assert "a.json was not written: No such file" in caplog.text
    assert files.keep(tmp_path / "a.json", lambda path: json_files.write_json(path, {}))


def test_writers_of_one_file_have_temporaries_of_their_own(tmp_path):
    def write(file):
        files.write_file(tmp_path / "a", lambda other: other.write(b"other"))
        file.write(b"own")

    files.write_file(tmp_path / "a", write)  # As two threads do.
    assert (tmp_path / "a").read_bytes() == b"own"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_temporaries_of_dead_writers_are_removed(tmp_path):
    (tmp_path / "ckpt").mkdir()
    dead, own = 2**22 + 1, os.getpid()  # Linux numbers processes to 2**22.
    gone = [f".result.json.{dead}.0123abcd.partial", f"ckpt/.a.npy.{dead}.partial"]
    kept = [f".result.json.{own}.partial", ".hidden", f".mine.json.{dead}", "a.json"]
    for name in gone + kept:
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(kept)


def test_files_that_differ_from_their_digests_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    known = file_hashes.digests_of(tmp_path, ["a", "b"])
    file_hashes.check_digests(tmp_path, known)
    (tmp_path / "b").write_text("c")
    file_hashes.check_digests(tmp_path, known, "a")
    with pytest.raises(UserError, match="/b was changed or damaged"):
        file_hashes.check_digests(tmp_path, known)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="/b: No such file"):
        file_hashes.check_digests(tmp_path, known)


def test_a_full_disk_is_told_with_the_path_that_was_to_be_written(
    tmp_path, monkeypatch
):
    path = tmp_path / "name"

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")  # As of an open file: without a path.

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError) as failed:
        files.write_first(path, "text")
    assert explain(failed.value).startswith(f"{path}: no space left on device: ")


@pytest.mark.parametrize("error", [None, OSError(errno.EOPNOTSUPP, "no hard links")])
def test_the_first_of_several_writers_decides_a_file(tmp_path, monkeypatch, error):
    link = os.link

    def linked(*names):
        if error:
            raise error
        link(*names)

    monkeypatch.setattr(os, "link", linked)
    path = tmp_path / "name"
    for text in ("first", "second"):
        files.write_first(path, text)
        assert path.read_text() == "first"
    files.write_text(tmp_path / "other", "as any file")
    other = (tmp_path / "other").stat()
    assert path.stat().st_mode == other.st_mode  # Other users may read it.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name", "other"]


def test_a_file_whose_folder_is_gone_is_named_and_not_its_temporary(tmp_path):
    path = tmp_path / "gone" / "pareto.png"
    with pytest.raises(FileNotFoundError) as found:
        files.write_text(path, "")
    assert found.value.filename == str(path)
