"""Reads and writes NumPy arrays.

Readers refuse a file that declares more than it can hold.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from pcagpt.errors import OF_NO_FILE, Unreadable, UserError, unreadable
from pcagpt.files import open_file, write_file

# Largest absolute value of a table or weights; larger values mean damage.
LARGEST = 1e6
# Real arrays hardly compress. An archive that unpacks to more than this was made to
# fill the memory.
_LARGEST_RATIO, _ALWAYS_ALLOWED = 20, 2**26  # times the file's size, or bytes
_LARGEST_HEADER = 2**16  # bytes, of a .npy file
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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
    except (UserError, *OF_NO_FILE):
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

    It raises Unreadable for one that this machine cannot hold. `declared` is the size
    of its arrays in memory, `stored` the file's own.
    """
    if declared > max(_LARGEST_RATIO * stored, _ALWAYS_ALLOWED):
        raise UserError(
            f"{path} declares arrays of {declared:,} bytes, its own size is {stored:,}:"
            " it is damaged; write it again"
        )
    if declared > memory_bytes():
        raise Unreadable(
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
