"""Writes files in one step, and knows what is no file.

A writer replaces the file in one step: a reader sees the old file or the new one, even
after a power cut.
"""

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pcagpt.errors import UserError, naming

# A temporary of `write_file`; older versions wrote no random part.
_LEFTOVER = re.compile(r"\..+\.(\d+)(\.[0-9a-f]{8})?\.partial")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_LONGEST_NAME = 255  # bytes, on all common file systems
_SPARE = 40  # of them, for the ends that `_temporary` and `unused_name` add
_LOGGER = logging.getLogger(__name__)


def odd_kind(path: Path) -> str | None:
    """What is there in place of a file: 'a named pipe'; None for a file or nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else None
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


def folder_name(name: str, end: str) -> str:
    """NAME + END; the name is cut to what file systems take."""
    return (
        name.encode()[: _LONGEST_NAME - len(end.encode())].decode("utf-8", "ignore")
        + end
    )


def file_name(name: str, end: str) -> str:
    """As `folder_name`, for a file that `write_file` may replace."""
    return folder_name(name, end + "." * _SPARE)[:-_SPARE]


def unused_name(path: Path, fate: str) -> Path:
    """NAME.FATE-TIME, which is not in use: for what is moved aside."""
    name = path.with_name(f"{path.name}.{fate}-{time.strftime('%Y%m%d-%H%M%S')}")
    while name.exists():  # Moved in the same second.
        name = name.with_name(f"{name.name}x")
    return name


def keep_copy(path: Path) -> None:
    """Gives a file the second name NAME.replaced-TIME and says so.

    It is for a file that the caller replaces and did not write. The target of a link
    stays anyway, so a link gets none.
    """
    if path.is_symlink():
        return
    kept = unused_name(path, "replaced")
    with naming(path):
        try:
            os.link(path, kept)
        except OSError:  # The file system has no hard links.
            write_file(kept, lambda file: file.write(path.read_bytes()))
    _LOGGER.warning(
        "%s was changed by hand, or by an older version: it is kept as %s",
        path,
        kept.name,
    )


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
                with (
                    contextlib.suppress(FileExistsError),
                    open(path, "x", encoding="utf-8") as file,
                ):
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
