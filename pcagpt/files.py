"""Reads and writes files: JSON, text and NumPy arrays.

A writer replaces the file in one step: a reader sees the old file or the new one, even
after a power cut. JSON is strict in both directions: NaN and the infinities are not
JSON.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pcagpt.errors import UserError

# Temporaries of `write_file`, .NAME.PID.partial; older versions called them .NAME.PID.
_LEFTOVER = re.compile(
    r"\..+\.(\d+)\.partial|\..+\.(?:json|jsonl|npy|npz|bin|md|html|png)\.(\d+)"
)
_LOGGER = logging.getLogger(__name__)


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` writes into an open binary file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    with contextlib.suppress(OSError):  # Some file systems cannot sync a folder.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep(path: Path, write: Callable[[Path], Any]) -> bool:
    """Calls `write(path)` for a result that is shown anyway; tells if it is on disk.

    A system's error, such as a read-only folder, becomes a warning of one line.
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
        if found and not _lives(int(found[1] or found[2])):
            with contextlib.suppress(OSError):
                path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # It is another user's.
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file; `strict` converts the value."""
    text = json.dumps(strict(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def strict(value: Any) -> Any:
    """The value as plain JSON: tuples become lists, NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """The JSON object in a file, or None if the file does not exist.

    Raises:
      UserError: the file holds no JSON object; `remedy` ends the message.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return strict(value)


def write_npy(path: Path, array: np.ndarray) -> None:
    """Replaces a .npy file."""
    write_file(path, lambda file: np.save(file, array, allow_pickle=False))


def write_npz(path: Path, **arrays: Any) -> None:
    """Replaces a .npz file."""
    write_file(path, lambda file: np.savez(file, **arrays))


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file; UserError if it is missing, damaged or no such file."""
    loaded = _load(path, ".npy")
    if not isinstance(loaded, np.ndarray):
        raise UserError(f"{path} is not a .npy file")
    return loaded


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; UserError as for `read_npy`."""
    loaded = _load(path, ".npz")
    if isinstance(loaded, np.ndarray):
        raise UserError(f"{path} is not a .npz file")
    with loaded as archive:
        try:
            return {name: archive[name] for name in archive}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from None


def _load(path: Path, ending: str):
    try:
        # From memory: np.load leaves the file of a damaged archive open.
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a {ending}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a readable array file ({error}): write it again")


def sha256_of_file(path: Path) -> str:
    """Hash of a file's content; UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
