"""Commands in forked children of one process that has imported everything already.

The process that forks has not started JAX and has one thread, so its children are sound
and need no seconds for imports. Each runs `python -m pcagpt.main` as it stands.
"""

import errno
import faulthandler
import itertools
import json
import os
import runpy
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_FLUSH_FAILED = 120  # Python's exit code if stdout cannot be written at the end

PROGRAM = "pcagpt.main"  # the module that a command runs


@dataclass(frozen=True)
class Ended:
    """What a command left. A negative code is the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool


@dataclass(frozen=True)
class Started:
    """A command that runs, with the files that it prints into."""

    pid: int
    out: Path
    err: Path
    began: float

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the command still runs (nobody has waited for it)."""
        os.kill(self.pid, number)

    def wait(self, limit: float) -> Ended:
        """Waits for the end; after `limit` seconds it is killed and counts as hung."""
        hung = False
        while (status := _status(self.pid)) is None:
            if time.monotonic() - self.began > limit:
                hung = True
                os.kill(self.pid, signal.SIGABRT)  # faulthandler writes the stacks.
                time.sleep(0.5)
                os.killpg(self.pid, signal.SIGKILL)
                status = os.waitpid(self.pid, 0)[1]
                break
            time.sleep(0.01)
        said = [path.read_text("utf-8", "replace") for path in (self.out, self.err)]
        seconds = time.monotonic() - self.began
        return Ended(os.waitstatus_to_exitcode(status), *said, seconds, hung)


def _status(pid: int) -> int | None:
    """The wait status of a child that ended; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def start(
    words: list[str],
    place: Path,
    log: Path,
    prepare: Callable[[], Any] = lambda: None,
    stdout: Path | None = None,
) -> Started:
    """Starts `python -m pcagpt.main WORD...` in the folder `place`.

    It prints into LOG.out (or `stdout`) and LOG.err, and calls `prepare` before.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    line = f"cd {place} && {shlex.join(['python', '-m', 'pcagpt.main', *words])}\n"
    log.with_suffix(".command").write_text(line)
    for path in (out, err):
        path.touch()  # A child may be killed before it opens them.

    def body() -> None:
        os.chdir(place)
        sys.argv = ["pcagpt", *words]
        prepare()
        runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)

    pid = _fork(body, stdout or out, err)
    return Started(pid, out, err, time.monotonic())


def _fork(body: Callable[[], None], out: Path, err: Path) -> int:
    """Forks a child that calls `body`, ends like an interpreter, and never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        _redirect(out, err)
        try:
            body()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException:
            traceback.print_exc()
        try:
            threading._shutdown()  # Waits for threads, as the interpreter does.
            sys.stdout.flush()
        except BaseException:
            code = _FLUSH_FAILED
            traceback.print_exc()
    finally:
        os._exit(code)  # Even if nothing can be printed any more.


def _redirect(out: Path, err: Path) -> None:
    """Gives a child standard streams and signals of its own."""
    # A shell starts background commands with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for path, number in ((out, 1), (err, 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags, 0o666), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    faulthandler.enable(2)


def in_child(function: Callable[..., Any], *arguments: Any, limit: float = 300) -> Any:
    """The JSON value that a function returns in a child, which may start JAX.

    Raises RuntimeError with the child's last line if it fails, or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err, value = (Path(folder) / name for name in ("out", "err", "value"))

        def body() -> None:
            value.write_text(json.dumps(function(*arguments)))

        started = Started(_fork(body, out, err), out, err, time.monotonic())
        ended = started.wait(limit)
        if ended.code:
            last = ended.err.strip().split("\n")[-1]
            raise RuntimeError(f"exit code {ended.code}: {last}")
        return json.loads(value.read_text())


def at_file_operation(number: int, under: Path, act: Callable[[], Any]) -> None:
    """Calls `act` before this process's N-th change of files in the folder `under`.

    Counts files opened for writing, renamed and removed, and folders made and removed,
    by Python; `act` may raise. Number 0 calls it at every change.
    """
    count, root = itertools.count(1), str(under)

    def hook(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        if path.startswith(root) and (number == 0 or next(count) == number):
            act()

    sys.addaudithook(hook)


def fail_with(number: int) -> Callable[[], None]:
    """A function that raises the system's error of this errno."""
    injected = f"injected {errno.errorcode[number]}"

    def act() -> None:
        raise OSError(number, os.strerror(number), injected)

    return act


def pool(
    tasks: Iterable[tuple[Any, Callable[[], Any]]], jobs: int
) -> Iterator[tuple[Any, Any]]:
    """Yields (key, value of the function) of each task, computed in `jobs` children.

    A value is JSON. It is a RuntimeError if the function failed: the campaign is wrong.
    """
    waiting, running = iter(tasks), {}
    while True:
        for key, function in itertools.islice(waiting, jobs - len(running)):
            file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - the child writes into it
            sys.stdout.flush()
            if not (pid := os.fork()):
                code = 0
                try:
                    value = function()
                except BaseException:
                    value, code = traceback.format_exc(), 1
                json.dump(value, file)
                file.flush()
                os._exit(code)
            running[pid] = key, file
        if not running:
            return
        pid, status = os.wait()
        key, file = running.pop(pid)
        with file:
            file.seek(0)
            text = file.read()
        yield key, RuntimeError(text) if status else json.loads(text)
