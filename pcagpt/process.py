"""This process: its environment, its streams, its signals and its end."""

import atexit
import codecs
import contextlib
import contextvars
import ctypes
import errno
import io
import logging
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import logging as absl_logging

from pcagpt.errors import Interrupted, UserError, explain

SUCCEEDED, FAILED, REFUSED, WARNED = 0, 1, 2, 75  # exit codes; `main` explains them
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm's --signal sends one before the end
# A terminal that is closed sends SIGHUP.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
SEARCH_INTERRUPTED = (
    "interrupted: a search for a bound saves only the model's statistics; run the same "
    "command again to search from the start"
)
STOPPED = "interrupted"  # before a task begins, and after its end
INTERRUPTED = {  # by whether the task resumes
    True: "interrupted: run the same command again to continue",
    False: "interrupted: nothing was saved; run the same command again to start over",
}
_OTHERS_ENDED = (
    "another process of this run ended or cannot be reached{}, so this one ends: "
    "run the same command again; if it can, it continues from what is saved"
)
_LOGGED = "2"  # TF_CPP_MIN_LOG_LEVEL: errors and aborts

# A terminal that cannot show a sign shows these instead.
_PLAIN_SIGNS = {"−": "-", "–": "-", "±": "+/-", "×": "x", "…": "..."}

_OFF = ("", "0", "false", "off", "no", "n", "f")
# These variables of JAX change the numbers of a run, which must not depend on the
# environment, or stop commands. The values here do neither.
_NOT_HEEDED = {
    "JAX_ENABLE_X64": _OFF,
    "JAX_DEFAULT_DTYPE_BITS": ("32",),
    "JAX_DEFAULT_MATMUL_PRECISION": ("", "default"),
    "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": _OFF,
    "JAX_RANDOM_SEED_OFFSET": _OFF,
    "JAX_THREEFRY_PARTITIONABLE": ("1", "true", "on", "yes", "y", "t"),
    "JAX_DISABLE_JIT": _OFF,
    "JAX_NO_TRACING": _OFF,
    "JAX_NO_EXECUTION": _OFF,
    "JAX_DEBUG_KEY_REUSE": _OFF,
    "JAX_ERROR_CHECKING_BEHAVIOR_DIVIDE": ("ignore",),
    "JAX_ERROR_CHECKING_BEHAVIOR_NAN": ("ignore",),
    "JAX_ERROR_CHECKING_BEHAVIOR_OOB": ("ignore",),
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
    "JAX_NUMPY_RANK_PROMOTION": ("allow", "warn"),
    "JAX_TRANSFER_GUARD": ("allow", "log"),
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": ("allow", "log"),
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": ("allow", "log"),
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": ("allow", "log"),
}


# Of a program that imports pcagpt: whether it asked for progress. None: the command.
_guest: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "guest", default=None
)
_guests, _entry = 0, threading.Lock()  # contexts of `as_guest` in all threads


@contextlib.contextmanager
def as_guest(shows_progress: bool) -> Iterator[None]:
    """In this context, pcagpt works for another program and is not the command.

    It prints nothing, except progress if that is asked for, and keeps nothing beside
    files that it only reads.
    """
    global _guests, _programs_hook
    # absl configures the root logger at its first message, unless it has a handler.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    with _entry:
        _guests += 1
        if sys.unraisablehook not in (_hide_failed_writes, _report_unraisable):
            _programs_hook, sys.unraisablehook = sys.unraisablehook, _hide_failed_writes
    token, is_done = _guest.set(shows_progress), False
    try:
        yield
        is_done = True
    finally:
        with _entry:
            _guests -= 1
            # After an error, messages about other writes may still come.
            is_last = is_done and not _guests
            if is_last and sys.unraisablehook is _hide_failed_writes:
                sys.unraisablehook = _programs_hook
        _guest.reset(token)
        logging.getLogger().removeHandler(handler)


def shows_progress() -> bool:
    """Whether progress may be printed."""
    return _guest.get() is not False


def is_guest() -> bool:
    """Whether pcagpt works for another program, see `as_guest`."""
    return _guest.get() is not None


def say(line: str) -> None:
    """Prints a line; for a guest, it goes to the logger instead."""
    if is_guest():
        logging.getLogger(__name__).info(line)
    else:
        print(line, flush=True)


def prepare() -> None:
    """Silences libraries and caches compiled programs; call before importing jax."""
    _open_streams()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", _LOGGED)
    with contextlib.suppress(RuntimeError):  # A user without a home.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        os.environ.setdefault(
            "JAX_COMPILATION_CACHE_DIR", str(cache / "pcagpt" / "compilation")
        )
    # JAX would write that cache in zstd, without a checksum: a flipped bit would change
    # numbers or end the process. zlib has one, and JAX then compiles again.
    for name in ("zstandard", "compression.zstd"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    # The run goes on without a cache.
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation")
    _keep_freed_memory()
    sys.unraisablehook = _report_unraisable
    threading.excepthook = _end_with_thread
    # Orbax raises every error that it logs.
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    absl_logging.set_verbosity(absl_logging.FATAL)
    warnings_shown = logging.StreamHandler()
    warnings_shown.setFormatter(logging.Formatter("pcagpt: %(message)s"))
    logger = logging.getLogger("pcagpt")
    logger.addHandler(warnings_shown)
    logger.propagate = False  # Libraries add their own handlers to the root logger.
    for name, harmless in _NOT_HEEDED.items():
        if os.environ.get(name, harmless[0]).lower() not in harmless:
            logger.warning(
                "%s=%s is ignored: it would change the numbers or stop the command",
                name,
                os.environ.pop(name),
            )


def _report_unraisable(unraisable: Any) -> None:
    """As `_hide_failed_writes`, of the command.

    Ends the process if a signal came while Python was freeing an object: nobody gets
    the exception.
    """
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
        _end_at_once(str(error) or STOPPED, getattr(error, "number", signal.SIGINT))
    if unraisable.object is not None:
        sys.__unraisablehook__(unraisable)


_programs_hook = sys.unraisablehook  # of the program for which pcagpt is a guest


def _hide_failed_writes(unraisable: Any) -> None:
    """Hides tensorstore's messages about failed writes, which come without an object.

    Nothing is lost, because tensorstore also raises the first failure.
    """
    is_closed = "Event loop is closed" in str(unraisable.exc_value)
    if unraisable.object is not None or not is_closed:
        _programs_hook(unraisable)


def _end_with_thread(uncaught: threading.ExceptHookArgs) -> None:
    """Ends the process if the system stopped a thread: others may wait for its work."""
    line = uncaught.exc_value and explain(uncaught.exc_value)
    if not line:
        threading.__excepthook__(uncaught)
        return
    tell(line)
    os._exit(REFUSED)


def _open_streams() -> None:
    """Opens closed standard streams, and lets the terminal show any text.

    The next file opened would otherwise get the number of the closed stream, and
    libraries would write their messages into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    codecs.register_error("plain_signs", _in_plain_signs)
    for number, name, kind in ((1, "stdout", _Output), (2, "stderr", _Optional)):
        given = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(kind(number, "w", closefd=False)),
            given.encoding,
            "plain_signs",
            line_buffering=kind is _Optional or given.line_buffering,
        )
        setattr(sys, name, text)


def _in_plain_signs(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handles text that cannot be encoded: a plain sign, or else its code."""
    error.end = error.start + 1
    plain = _PLAIN_SIGNS.get(error.object[error.start])
    return (plain, error.end) if plain else codecs.backslashreplace_errors(error)


class _Output(io.FileIO):
    """stdout: an error of the system says that it is about this stream, not a disk.

    What goes to a terminal that was closed is dropped.
    """

    def write(self, data: bytes) -> int:
        """Writes; UserError if that fails and the stream has a reader."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            mode = os.fstat(self.fileno()).st_mode
            if error.errno == errno.EIO and stat.S_ISCHR(mode):  # No disk: a terminal.
                return len(data)
            raise UserError(
                f"stdout cannot be written ({error.strerror}): send it elsewhere"
            ) from None


class _Optional(io.FileIO):
    """A stream that ignores write errors."""

    def write(self, data: bytes) -> int:
        """Writes what it can."""
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, so that each step on a CPU reuses it.

    By default glibc returns large buffers to the system after each step and gets them
    back with a page fault for every 4 KiB. glibc's own variables take precedence.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_threshold, arenas = -1, -3, -8  # Numbers of <malloc.h>.
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library.
        return
    # Older versions refuse this threshold. The other options alone would do harm.
    if mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arenas, 1)


def end_with_others() -> None:
    """Makes this process end with one line and FAILED if JAX loses another one.

    Call it before importing jax. When JAX loses a process, it aborts in its own thread
    while the main thread may wait for ever. JAX's hook for this case is broken: it also
    aborts. This hides what XLA and JAX log at an abort, unless the person chose a
    level.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == _LOGGED:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "4"
    c_signal = ctypes.CDLL(None).signal  # Python's only runs in the main thread.
    c_signal.restype = ctypes.c_void_p
    c_signal(signal.SIGABRT, _on_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    say_others_ended()


_first = threading.Lock()


def say_others_ended(reason: str = "") -> NoReturn:
    """Ends this process because another one did; only the first thread says so."""
    _first.acquire()
    tell(_OTHERS_ENDED.format(reason and f" ({reason})"))
    os._exit(FAILED)


def exit_code(number: int) -> int:
    """The exit code of a process that a signal stopped."""
    return WARNED if number in WARNINGS else FAILED


def tell(message: str) -> None:
    """Writes a line to stderr at once, also while a signal is handled."""
    with contextlib.suppress(OSError):  # stderr is closed, or its terminal is.
        below = "\n" if os.isatty(2) else ""  # A bar may be shown.
        os.write(2, f"{below}pcagpt: {message}\n".encode())


def _end_at_once(message: str, number: int) -> NoReturn:
    tell(message)
    os._exit(exit_code(number))


def end_at_signals() -> None:
    """Makes `STOPS` end the process with a line, from now on until it has ended."""
    _handle(lambda number, _: _end_at_once(STOPPED, number))
    # Runs last: all work is done, and Python soon calls no handlers any more.
    atexit.register(_handle, signal.SIG_IGN)


def _handle(handler: Callable[[int, FrameType | None], None] | int) -> None:
    for number in STOPS:
        # nohup ignores SIGHUP, so that a command outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_by_signals(message: str) -> Iterator[None]:
    """Makes `STOPS` end the process at once, with a message.

    An exception would not do: some libraries swallow it while they are imported.
    """
    with handled(lambda number, _: _end_at_once(message, number)):
        yield


@contextlib.contextmanager
def interrupted_by_signals(message: str) -> Iterator[None]:
    """Makes the first of `STOPS` raise Interrupted with a message.

    A second one ends the process at once.
    """
    raised: list[Interrupted] = []

    def stop(number: int, _) -> None:
        if raised:
            _end_at_once(message, raised[0].number)
        raised.append(Interrupted(message, number))
        raise raised[0]

    try:
        with handled(stop):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if raised:  # A library may have made another error of it.
            raise raised[0] from None
        if type(error) is KeyboardInterrupt:
            raise Interrupted(message) from None
        raise


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles `STOPS` within; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers.
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        _handle(handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end(code: int) -> NoReturn:
    """Ends this process.

    After an error it does not wait for threads, because Orbax's may wait for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        # Python would try again, and change the exit code.
        except (OSError, UserError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code != SUCCEEDED:
        os._exit(code)
    sys.exit(code)
