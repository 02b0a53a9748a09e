"""Reads and writes files: JSON, text and NumPy arrays.

A writer replaces the file in one step: a reader sees the old file or the new one.
Reading and writing JSON turns NaN and infinities into null, because JSON has no such
numbers.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pcagpt.errors import UserError


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path`; `write` gets an open binary file and writes its content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """The array of a .npy file; UserError if it is missing, damaged or another file."""
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
        # np.load would leave a damaged archive open, so it reads from memory.
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
