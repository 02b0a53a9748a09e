"""Hashes of files, which are listed in digests, and stamps that show a change.

A JSON file has its own hash. Digests list the other files; the module that reads these
files checks them.
"""

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pcagpt.errors import UserError, unreadable
from pcagpt.files import open_file
from pcagpt.json_files import check_fields

_SETTLED_SECONDS = 2


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size in bytes, mtime and ctime in nanoseconds; of a folder, of all files in it.

    A folder's subfolders do not count.
    """
    if path.is_dir():
        files = (file for file in sorted(path.iterdir()) if file.is_file())
        return 0, *(number for file in files for number in stamp_of(file))
    return stamp_in(os.stat(path))


def stamp_in(status: os.stat_result) -> tuple[int, ...]:
    """The stamp of a file with this status."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_same_place(path: Path, opened: int | None) -> bool:
    """Whether a path still leads to the open file or folder; None: to any."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return opened is None or os.path.samestat(found, os.fstat(opened))


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
