"""Reads and writes files: JSON, text and NumPy arrays.

A writer replaces the file in one step: a reader sees the old file or the new one, even
after a power cut. JSON files store a hash of their content; other files are listed in
digests, which the module that reads them checks. JSON is strict in both directions: NaN
and the infinities are not JSON. Readers refuse a file that declares more than it can
hold.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import stat
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import (
    Any,
    BinaryIO,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np

from pcagpt.errors import UserError, naming, unreadable

# Largest absolute value of a table or weights; larger values mean damage.
LARGEST = 1e6
_SETTLED_SECONDS = 2
_SEAL = "sha256"  # in a JSON object: the hash of all other fields
_LARGEST_JSON = 2**28  # bytes
# Real arrays hardly compress. An archive that unpacks to more than this was made to
# fill the memory.
_LARGEST_RATIO, _ALWAYS_ALLOWED = 20, 2**26  # times the file's size, or bytes
_LARGEST_HEADER = 2**16  # bytes, of a .npy file
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# A temporary of `write_file`; older versions wrote no random part.
_LEFTOVER = re.compile(r"\..+\.(\d+)(\.[0-9a-f]{8})?\.partial")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_NOWHERE = "a link to nothing"
_LOGGER = logging.getLogger(__name__)


def odd_kind(path: Path) -> str | None:
    """What is there in place of a file: 'a named pipe'; None for a file or nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _NOWHERE if os.path.islink(path) else None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def refuse_odd(path: Path) -> None:
    """Raises UserError if something else than a file is there.

    To open a named pipe would wait for its writer without end.
    """
    if kind := odd_kind(path):
        raise UserError(f"{path} is {kind}, not a file: name a file, or move it away")


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading; UserError as for `refuse_odd`."""
    refuse_odd(path)
    return open(path, "rb")


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` writes into an open binary file."""
    temporary = _temporary(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new name beside a file; `remove_leftovers` knows it."""
    # Threads, and processes of two machines, may have the same number.
    own = f"{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{own}.partial")


def write_first(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, unless there is one.

    Of several commands, the first one writes it. The others see it whole, if the file
    system has hard links.
    """
    temporary = _temporary(path)
    try:
        with naming(path):
            temporary.write_text(text, "utf-8")
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # It has none.
                with contextlib.suppress(FileExistsError), open(path, "x") as file:
                    file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    with contextlib.suppress(OSError):  # Some file systems cannot sync a folder.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep(path: Path, write: Callable[[Path], Any]) -> bool:
    """Calls `write(path)` for a result that is also printed; returns whether it worked.

    An error of the system, such as a read-only folder, becomes a warning of one line.
    """
    try:
        write(path)
    except OSError as error:
        _LOGGER.warning("%s was not written: %s", path, error.strerror or error)
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in a folder and the folders in it.

    The caller holds the folder's lock. Files of a writer that still lives on this
    machine stay.
    """
    for path in list(folder.rglob(".*")):
        found = _LEFTOVER.fullmatch(path.name)
        if found and not is_running(int(found[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def is_running(process: int) -> bool:
    """Whether this machine has a process of this number, of any user."""
    try:
        os.kill(process, 0)  # Sends nothing.
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # It is another user's.
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file; `strict` converts the value, and a hash seals it.

    A value that was read with `parse_json` still has its old seal; the new seal
    replaces it.
    """
    value = {name: entry for name, entry in strict(value).items() if name != _SEAL}
    text = json.dumps(
        value | {_SEAL: _sha256_of_json(value)},
        indent=2,
        allow_nan=False,
        ensure_ascii=False,
    )
    write_text(path, text + "\n")


def write_plain_json(
    path: Path, value: Mapping[str, Any], indent: int | None = None
) -> None:
    """Replaces a JSON file, without a seal: other programs read all fields of it."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def strict(value: Any) -> Any:
    """The value as plain JSON.

    Dataclasses become objects, tuples become lists, NaN and infinities become None.
    """
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(
    path: Path, remedy: str, has_infinities: bool = False
) -> dict[str, Any] | None:
    """The JSON object in a file, without its seal, or None if there is no file.

    `has_infinities` accepts the infinities as None, for files of old versions.

    Raises:
      UserError: the file cannot be read, holds no JSON object, or was changed after
        `write_json` had sealed it; `remedy` ends the message.
    """

    def damaged(reason: object) -> UserError:
        return UserError(f"{path} is damaged ({reason}): {remedy}")

    try:
        if (kind := odd_kind(path)) not in (None, _NOWHERE):
            raise damaged(f"it is {kind}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_JSON:
                raise damaged(f"{size} bytes are too many")
            value = parse_json(file.read(), has_infinities)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(error, path) or damaged(error.strerror) from None
    except ValueError as error:
        raise damaged(error) from None
    if not isinstance(value, dict):
        raise damaged("it holds no JSON object")
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _sha256_of_json(value):
        raise damaged(
            f"its content was changed since it was written; if that was on purpose, "
            f"remove its '{_SEAL}'"
        )
    return value


def is_sealed(path: Path) -> bool:
    """Whether `write_json` wrote the file, and it was not changed since."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        return False
    is_object = isinstance(content, dict)
    return is_object and content.pop(_SEAL, None) == _sha256_of_json(content)


def parse_json(text: bytes, has_infinities: bool = False) -> Any:
    """The value of strict JSON in UTF-8; ValueError for anything else."""

    def refuse(word: str) -> None:
        if word == "NaN" or not has_infinities:
            raise ValueError(f"{word} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    def whole(digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python converts only some thousand digits.
            raise ValueError("a number is too long") from None

    try:
        decoded = text.decode("utf-8-sig")  # Some editors begin a file with a mark.
        value = json.loads(
            decoded, parse_constant=refuse, parse_float=finite, parse_int=whole
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # No lone surrogates.
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def check_fields(
    content: Any, fields: Mapping[str, Any], where: object, remedy: str
) -> None:
    """Raises UserError unless an object has fields of these types.

    Args:
      content: of a JSON file, or a part of it.
      fields: {name: type}, as for `has_type`; a field that may be None may be absent.
      where: names the file, and the part of it.
      remedy: ends the message.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} is damaged (it is not a JSON object): {remedy}")
    for name, kind in fields.items():
        value = content.get(name)
        if not has_type(value, kind):
            shown = f"is {repr(value):.40}" if name in content else "is missing"
            raise UserError(f"{where} is damaged ('{name}' {shown}): {remedy}")


def has_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a declared type; numbers must be finite.

    kind: a type, a union or a tuple of types, or one of these, which also declare what
    is in the value: list[X], tuple[X, Y] (a list of this length), dict[str, X], or a
    TypedDict. A field of a TypedDict that may be None may be absent.
    """
    if isinstance(kind, tuple | UnionType):
        kinds = kind if isinstance(kind, tuple) else get_args(kind)
        return any(has_type(value, one) for one in kinds)
    if is_typeddict(kind):
        return type(value) is dict and all(
            has_type(value.get(name), of) for name, of in get_type_hints(kind).items()
        )
    whole, parts = get_origin(kind), get_args(kind)
    if whole is list:
        return type(value) is list and all(has_type(one, parts[0]) for one in value)
    if whole is dict:
        return type(value) is dict and all(
            has_type(one, parts[1]) for one in value.values()
        )
    if whole is tuple:
        is_as_long = type(value) is list and len(value) == len(parts)
        return is_as_long and all(map(has_type, value, parts))
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return value is None if kind is None else type(value) is kind


def _sha256_of_json(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_npy(path: Path, array: np.ndarray) -> None:
    """Replaces a .npy file."""

    def write(file: BinaryIO) -> None:
        # Into a file itself, NumPy writes by itself, and hides why that failed.
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)

    write_file(path, write)


def write_npz(path: Path, **arrays: Any) -> None:
    """Replaces a .npz file."""
    write_file(path, lambda file: np.savez(file, **arrays))


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file.

    Raises UserError if it is missing, damaged, no .npy file, or holds Python objects.
    """
    with _reading(path, ".npy") as file:
        size = os.fstat(file.fileno()).st_size
        check_size(path, size, size)
        if file.read(4) == b"PK\x03\x04":
            raise UserError(f"{path} is not a .npy file")
        file.seek(0)
        content = bytearray(size)
        file.readinto(content)
        return _array(content)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; UserError as for `read_npy`."""
    with _reading(path, ".npz") as file:
        if file.read(6) == b"\x93NUMPY":
            raise UserError(f"{path} is not a .npz file")
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            check_size(path, sum(member.file_size for member in members), size)
            return {
                # Reading a member as a whole checks its CRC.
                member.filename.removesuffix(".npy"): _array(
                    bytearray(archive.read(member))
                )
                for member in members
            }


@contextlib.contextmanager
def _reading(path: Path, ending: str) -> Iterator[BinaryIO]:
    """The open file; an error that its content can cause becomes a UserError."""
    try:
        with open_file(path) as file:
            yield file
    except (UserError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: give the path of a {ending}") from None
    # zipfile and NumPy's parser raise errors of many types for other content.
    except Exception as error:
        if found := unreadable(error, path):
            raise found from None
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path} is not a readable array file ({reason}): write it again"
        ) from None


def _array(content: bytearray) -> np.ndarray:
    """The array in the bytes of a .npy file; ValueError unless it fills them."""
    stream = io.BytesIO(content[:_LARGEST_HEADER])
    version = np.lib.format.read_magic(stream)
    if version not in _HEADER_READERS:  # Other versions are for structures.
        raise ValueError(f"it has version {version} of the format")
    shape, is_fortran, dtype = _HEADER_READERS[version](stream)
    offset, count = stream.tell(), math.prod(shape)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(content) - offset:
        raise ValueError(
            f"shape {shape} of {dtype} does not fill its {len(content) - offset} bytes"
        )
    if not len(content) - offset:
        return np.empty(shape, dtype)
    array = np.frombuffer(content, dtype, offset=offset)
    return array.reshape(shape, order="F" if is_fortran else "C")


def check_size(path: Path, declared: int, stored: int) -> None:
    """Raises UserError for a file that declares more bytes than it can hold.

    `declared` is the size of its arrays in memory, `stored` the file's own.
    """
    if declared > max(_LARGEST_RATIO * stored, _ALWAYS_ALLOWED):
        raise UserError(
            f"{path} declares arrays of {declared:,} bytes, its own size is {stored:,}:"
            " it is damaged; write it again"
        )
    if declared > memory_bytes():
        raise UserError(
            f"{path} holds arrays of {declared:,} bytes, this machine has a memory of "
            f"{memory_bytes():,}: read it on a larger one"
        )


def memory_bytes() -> int:
    """Size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_values(array: np.ndarray, what: str) -> None:
    """Raises UserError if a value is not finite, or its size is above LARGEST."""
    with np.errstate(invalid="ignore"):
        is_bad = ~(np.abs(array) <= LARGEST)
    if is_bad.any():
        where = tuple(int(i) for i in np.argwhere(is_bad)[0])
        raise UserError(
            f"{what} holds {array[where]} at {where}: all must be finite in float32 "
            f"and at most {LARGEST:,.0f}"
        )


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size in bytes, mtime and ctime in nanoseconds; of a folder, of all files in it.

    A folder's subfolders do not count.
    """
    if path.is_dir():
        files = (file for file in sorted(path.iterdir()) if file.is_file())
        return 0, *(number for file in files for number in stamp_of(file))
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(stamp: tuple[int, ...]) -> bool:
    """Whether any later change of the file would give it another stamp.

    A file that changed less than two seconds ago may change once more within the
    resolution of its times.
    """
    return time.time_ns() - max(stamp[1:], default=0) >= _SETTLED_SECONDS * 10**9


def read_once(read: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `read(path, ...)` read a file or folder once, until it may have changed."""

    @functools.lru_cache(maxsize=1024)
    def settled(_: tuple[int, ...], path: Path, *rest: Any) -> Any:
        return read(path, *rest)

    @functools.wraps(read)
    def read_or_known(path: Path, *rest: Any) -> Any:
        stamp = stamp_of(path)
        return settled(stamp, path, *rest) if is_settled(stamp) else read(path, *rest)

    return read_or_known


@read_once
def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hash of a file's content; UserError if it cannot be read."""
    try:
        return _sha256(path)
    except OSError as error:
        raise unreadable(error, path) or UserError(
            f"{path}: {error.strerror}"
        ) from None


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{name: {'sha256'}} of files in a folder, for `check_digests`."""
    return {name: {"sha256": sha256_of_file(folder / name)} for name in sorted(names)}


def check_digests(folder: Path, known: Any, below: str | tuple[str, ...] = "") -> None:
    """Raises UserError if listed files whose names begin with `below` differ."""
    if not isinstance(known, dict):
        raise UserError(f"the list of files in {folder} is damaged: write it again")
    for name, digest in known.items():
        if not name.startswith(below):
            continue
        check_fields(digest, {"sha256": (str,)}, name, "write it again")
        if sha256_of_file(folder / name) != digest["sha256"]:
            raise UserError(
                f"{folder / name} was changed or damaged since it was written"
            )
