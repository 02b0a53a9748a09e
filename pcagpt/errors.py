"""Errors that end a command with one line instead of a traceback, and warnings."""

import contextlib
import errno
import functools
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in the command or its inputs; exit code 2.

    The message is printed without changes. It names what was wrong, the value seen,
    what would be right, and the knob or command that corrects it.
    """


class Unreadable(UserError):
    """The system did not let a file be read. The file may be undamaged."""


# Other programs' errors while they read a file do not say that it is damaged if they
# are of these types. An alarm of the program raises the second.
OF_NO_FILE = (MemoryError, TimeoutError)


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. The message says what is saved.

    `number` is the signal's. The exit code depends on it, see `pcagpt.main`. It is no
    Exception, so that a library does not swallow it.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


@functools.lru_cache
def warn_once(message: str) -> None:
    """Logs a message once per process."""
    logging.getLogger(__name__).warning(message)


def shown(value: object) -> str:
    """A value as a message shows it: of a hash, the first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))


def reason_of(error: BaseException) -> str:
    """What another program says in an error, as one short line."""
    text = " ".join(str(error).split())[:200]
    # The text of a KeyError is only the key.
    return text if text and not isinstance(error, KeyError) else repr(error)


_PLACE = "--config.workdir"  # names the place of most files
# What a person can do about an error of the system.
_REMEDIES = {
    errno.ENOSPC: "free some space, or use another {place}",
    errno.EDQUOT: "free some space, or use another {place}",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "use another {place}, which can be written to",
    errno.EACCES: "change its permissions, or name another file or folder{named}",
    errno.EPERM: "change its permissions, or name another file or folder{named}",
    errno.EMFILE: "raise the limit (ulimit -n 4096)",
    errno.ENFILE: "end other programs, or raise the limit of the system",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EISDIR: "a file should be there, move the folder away",
    errno.ENOTDIR: "a folder should be there, move the file away, or name another "
    "folder{named}",
    errno.EEXIST: "something else is there, perhaps a link to nothing, move it away or "
    "name another place{named}",
    errno.ENOENT: "it was removed, is a link to nothing, or cannot be made there; name "
    "another file or folder{named}",
    errno.ENOTEMPTY: "another program writes there, end it",
    errno.ELOOP: "links lead in a circle, remove one",
    errno.EPIPE: "the program that read the output has ended",
}
# The system fails; the path is right.
FAILING = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE
}  # fmt: skip
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
# The path does not exist, or is a folder instead of a file or the reverse.
_MISSING = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
# How tensorstore writes an error code and paths into a ValueError, and how it and Orbax
# say without a code that a file is gone.
_TENSORSTORE = re.compile(r"\[[^\]]*os_error_code='(\d+)'")
_PATHS = re.compile(r'local file "([^"]*)"|checkpoint directory: (.*?)\. ')
_GONE = re.compile("NOT_FOUND: |No ArrayMetadata found ")


def explain(error: BaseException) -> str | None:
    """One line for an error of the operating system: path, problem, remedy.

    None for every other error, which is then a bug. Orbax raises what happened in its
    threads as an OSError, or as a ValueError with tensorstore's text or its own.
    """
    code, path = _code_and_path(error)
    if not code:
        return None
    if not path and code == errno.ENOENT:  # os.getcwd() names no path.
        path = "the current folder"
    subject = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    problem = os.strerror(code)
    problem = problem[:1].lower() + problem[1:]
    place = getattr(error, "place", _PLACE)
    named = f" as {place}" if place != _PLACE else ""
    remedy = _REMEDIES.get(code, "").format(place=place, named=named)
    return f"{subject}{problem}{f': {remedy}' if remedy else ''}"


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """In this context, an error of the system that Orbax tells is an OSError, too."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code, path = _code_and_path(error)
        if not code:
            raise
        raise OSError(code, os.strerror(code), path) from None


@contextlib.contextmanager
def naming(path: object, place: str = _PLACE) -> Iterator[None]:
    """This context adds `path` to an error of the system that has none.

    Errors of an open file have none. `path` also replaces its temporary name and paths
    below both, which may be one. `place` is what a person sets to use another disk.
    """
    try:
        with as_os_error():
            yield
    except OSError as error:
        known, own = error.filename, Path(str(path))
        if isinstance(known, str) and Path(known).is_relative_to(own.parent):
            name = "".join(Path(known).relative_to(own.parent).parts[:1])
            if name == own.name or name.startswith(f".{own.name}."):
                known = error.filename = None
        _name(error, path)
        if not (known and hasattr(error, "place")):  # An inner context named both.
            error.place = place
        raise


def unreadable(error: BaseException, path: object = None) -> Unreadable | None:
    """The error to raise if the system did not let a file be read.

    None for every other error, and if the file is missing. `path` is for an error that
    has no path.
    """
    if isinstance(error, Unreadable):
        return error
    _name(error, path)
    code, _ = _code_and_path(error)
    return Unreadable(explain(error)) if code and code not in _MISSING else None


def _name(error: BaseException, path: object) -> None:
    if isinstance(error, OSError) and error.errno and path and not error.filename:
        error.filename = str(path)


def _code_and_path(error: BaseException) -> tuple[int | None, str | bytes | None]:
    if isinstance(error, OSError):
        return error.errno, error.filename2 or error.filename
    text = str(error)
    paths = ["".join(found) for found in _PATHS.findall(text)]
    path = paths[-1] if paths else None
    if told := _TENSORSTORE.search(text):
        return int(told[1]), path
    return (errno.ENOENT if path and _GONE.match(text) else None), path
