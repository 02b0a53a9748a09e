"""A lock on a folder: one command at a time writes there, the others wait.

Each command that wants the folder makes a file of its own beside it, `.NAME.lock.ID`,
and holds the folder if it then sees no file of another living command; otherwise it
takes its file away and tries again. Of two commands, the later one always sees the file
of the earlier one. Network file systems have all that this needs, but it was tried on
local disks only.

A command of this machine lives as long as its process. The processes of other machines
cannot be seen from here, so every command renews the time of its file. A command counts
as ended after `STALE` seconds without renewal. The file server's clock tells the time.
This clock may have been put back, so a command that waits also counts for how long it
saw no renewal. A lock that names another place is a copy, which nobody renews: it
counts in the same way.
"""

import contextlib
import os
import random
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pcagpt import process
from pcagpt.errors import UserError
from pcagpt.files import is_running
from pcagpt.json_files import read_json, write_json
from pcagpt.sharding import processes

BEAT, STALE = 20, 120  # seconds
SHORTEST, LONGEST = 0.1, 5  # pause between two looks, in seconds


class Lock:
    """The lock of one command on one folder; use it through `held`."""

    def __init__(self, folder: Path):
        folder = folder.resolve()  # It may have several names.
        self._start = f".{folder.name}.lock."
        self._own = folder.parent / f"{self._start}{secrets.token_hex(8)}"
        self._released = threading.Event()
        self._seen: dict[Path, tuple[float, float]] = {}  # {lock: (time, seen since)}

    def attempt(self) -> str | None:
        """Takes the lock and returns None, or returns who holds it.

        '' means that another command tries at the same moment.
        """
        self._own.parent.mkdir(parents=True, exist_ok=True)
        holders = self._holders()
        if holders:
            return holders[0]
        write_json(self._own, _this_process() | {"place": _place(self._own.parent)})
        if self._holders():
            self._own.unlink(missing_ok=True)
            return ""
        for path in self._others():  # Of commands that ended, or give way to this one.
            path.unlink(missing_ok=True)
        threading.Thread(target=self._renew, daemon=True).start()
        return None

    def check(self) -> None:
        """Raises UserError if this command has lost the lock.

        Another machine takes it if this one stood still for `STALE` seconds.
        """
        if not self._own.exists():
            raise UserError(
                f"stopped, because the lock {self._own} is gone: this process stood "
                "still for minutes and another command took over, or the folder was "
                "removed; what was saved before is kept"
            )

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        self._released.set()
        # On a file system that fails, what the command wrote last says more. A lock of
        # a process that has ended blocks nobody.
        with contextlib.suppress(OSError):
            self._own.unlink()

    def _renew(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # `check` reports a missing file.
                os.utime(self._own)

    def _others(self) -> list[Path]:
        folder = self._own.parent
        of_lock = re.compile(re.escape(self._start) + "[0-9a-f]+")
        names = sorted(filter(of_lock.fullmatch, os.listdir(folder)))
        return [folder / name for name in names if name != self._own.name]

    def _holders(self) -> list[str]:
        """Descriptions of other living commands, with the end of the wait if known."""
        holders = []
        for path in self._others():
            try:
                # Reading makes a network file system look at the file anew.
                owner = read_json(path, "it is a lock") or {}
            except UserError:  # Damaged: only its time counts.
                owner = {}
            with contextlib.suppress(FileNotFoundError):  # Given back meanwhile.
                lives, limit = _is_known_to_live(owner), ""
                here = _place(path.parent)
                # Older versions name no place.
                if lives is None or (lives and owner.get("place", here) != here):
                    silent = self._silent(path)
                    lives, limit = silent < STALE, _limit(silent)
                if lives:
                    holders.append(f"{_told(owner, path)}{limit}")
        return holders

    def _silent(self, path: Path) -> float:
        """For how many seconds a lock was not renewed, as far as known."""
        renewed, now = path.stat().st_mtime, time.monotonic()
        last, since = self._seen.get(path, (None, now))
        if renewed != last:
            since = now
        self._seen[path] = renewed, since
        return max(_server_time(path.parent) - renewed, now - since)


def holder_of(folder: Path) -> str:
    """Which other living command holds a folder; '' if none is seen."""
    with contextlib.suppress(OSError):  # The folder above is not there, or not read.
        return next(iter(Lock(folder)._holders()), "")
    return ""


@contextlib.contextmanager
def held(folder: Path, meanwhile: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Waits until no other command holds the folder, and holds it within.

    The first of several processes holds it for all of them; all must call this.

    Args:
      folder: need not exist; the lock is beside it.
      meanwhile: called now and then while another command holds the folder; a
        UserError ends the wait.

    Yields:
      A function to call before files are written: it raises UserError if the lock was
      lost, on the process that holds it.
    """
    lock, told, pause = Lock(folder), False, SHORTEST
    is_first = jax.process_index() == 0

    def look() -> str | None:
        holder = lock.attempt()
        if holder is not None:
            with contextlib.suppress(OSError):  # The holder changes what is read.
                meanwhile()
        return holder

    try:
        while (holder := processes.from_first(look)) is not None:
            if holder and not told:
                told = True
                if is_first:
                    process.say(f"waiting for {folder}: {holder}; Ctrl-C ends the wait")
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST)
        yield lock.check if is_first else lambda: None
    finally:
        lock.release()


def _this_process() -> dict[str, Any]:
    """Identifies this process.

    Other commands check whether it lives and print it while they wait.
    """
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_start": _start_of(os.getpid()),
        "kernel": _kernel(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _told(owner: dict[str, Any], path: Path) -> str:
    """Who holds a lock, from the content of its file, which may be damaged."""
    if not {"process", "host", "began"} <= owner.keys():
        return f"a command that {path} does not name holds it"
    return "process {process} on {host} holds it since {began}".format_map(owner)


def _limit(silent: float) -> str:
    """When this command stops waiting for a machine, silent for these seconds."""
    last = time.time() - silent
    since, end = (
        time.strftime("%H:%M:%S", time.localtime(t)) for t in (last, last + STALE)
    )
    return (
        f", silent since {since}; if it stays silent, this command takes over at {end}"
    )


def _is_known_to_live(owner: dict[str, Any]) -> bool | None:
    """Whether the command that wrote a lock file lives; None on another machine."""
    kernel, number = _kernel(), owner.get("process")
    is_known = type(number) is int and 0 < number < 2**31 and "process_start" in owner
    if kernel and owner.get("kernel") == kernel and is_known:
        started = owner["process_start"]
        return is_running(number) and _start_of(number) in (None, started)
    return None


def _kernel() -> str | None:
    """Identifies a machine's start and container; None if not on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(process: int) -> str | None:
    """When a process started, by the kernel's clock; '' if it ended, None if hidden.

    The system reuses process numbers; a number with its start time is unique.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # A program's name holds anything.
    return "" if state in "ZX" else fields[18]


def _place(folder: Path) -> list[int]:
    """Tells a folder from its copies on this machine, by whatever path."""
    found = folder.stat()
    return [found.st_dev, found.st_ino]


def _server_time(folder: Path) -> float:
    """The present time on the clock of the folder's file server."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime
