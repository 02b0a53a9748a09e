"""The parts of the campaign: each function does one case, returns what and verdict."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torture import children, damage
from torture.case import Case, units
from torture.inputs import inputs
from torture.judge import (
    REFUSED,
    SAME,
    SILENT,
    SKIPPED,
    UNCLEAR,
    WARNED,
    Verdict,
    crashed,
    worst,
)
from torture.scene import REPOSITORY

NOBODY = 65534  # the user that may not read or write what root may
ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE
)  # fmt: skip
# Changes of files by Python that a command makes, about.
OPERATIONS = {"train": 90, "A": 220, "compress anew": 110, "factorize": 30}


def kills(case: Case, index: int) -> tuple[str, Verdict]:
    """Kills a command once to three times, at a moment or a file operation; goes on."""
    name = case.random.choice(("train",) * 7 + ("A", "compress anew", "factorize"))
    at_operation = index % 2 == 0
    what = f"{name} killed at {'a file operation' if at_operation else 'a moment'}"
    case.copy("corpus", "runs")
    for _ in range(case.random.choice((1, 1, 2, 3))):
        if at_operation:
            ended = case.run(name, prepare=_at_some_operation(case, name, _kill))
        else:
            ended = _signalled(case, name, signal.SIGKILL)
        if ended.code not in (0, -signal.SIGKILL):
            refused = Verdict(UNCLEAR, f"resuming is refused: {ended.err[-200:]}")
            return what, crashed(ended) or refused
    return what, case.attempt(name)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_some_operation(case: Case, name: str, act: Callable) -> Callable[[], None]:
    number = case.random.randint(1, OPERATIONS.get(name, 12))
    return lambda: children.at_file_operation(number, case.place, act)


def _signalled(case: Case, name: str, number: signal.Signals) -> children.Ended:
    """Sends a signal at a random moment of a command's usual time."""
    moment = case.random.random() * case.reference(name).seconds
    started = case.start(name)
    time.sleep(moment)
    started.send(number)
    return started.wait(case.limit)


def signals(case: Case, index: int) -> tuple[str, Verdict]:
    """Sends SIGINT or SIGTERM at a random moment; the same command then goes on."""
    number = (signal.SIGINT, signal.SIGTERM)[index % 2]
    name = case.random.choice(("train", "train", "A", "resume"))
    what = f"{name} stopped by {number.name}"
    case.copy("corpus", "stopped")
    ended = _signalled(case, name, number)
    # Exit code 1 has a line. Before pcagpt starts, a signal ends any process at once.
    if found := crashed(ended, (0, 1, 2, -number)):
        return what, found
    return what, case.attempt(name)


# Files of the scene and the commands that read them; the first pattern counts.
READERS = (
    ("*events.out*", ()),
    ("*.html", ()),
    ("*.png", ()),
    ("runs/*/ckpt/[24]/*", ()),
    ("stopped/*/ckpt/2/*", ()),
    ("runs/*/optimizer/*", ()),
    ("stopped/*/optimizer/*", ("resume",)),
    ("stopped/*/config.json", ("resume", "resume at another rate", "evaluate stopped")),
    ("stopped/*", ("resume", "evaluate stopped")),
    ("runs/gpt_baseline/ckpt/*", ("evaluate", "sample", "factorize", "compress anew")),
    ("runs/gpt_baseline/statistics*", ("compress",)),
    ("runs/gpt_baseline/evaluation*", ("evaluate",)),
    ("runs/gpt_baseline/config.json", ("report", "evaluate", "compress")),
    ("runs/gpt_pca_k4/ckpt/*", ("evaluate A",)),
    ("runs/gpt_pca_k4/config.json", ("report", "evaluate A")),
    ("runs/gpt_*/ckpt/*", ()),
    ("runs/gpt_*", ("report",)),
    ("runs/pca_factorized/*", ("report", "A at rank 3")),
    ("runs/compressed/best_k4/*", ("evaluate best", "recover")),
    ("runs/compressed/best_coded_k4/table.pcat", ("compress",)),
    ("runs/compressed/best_coded_k4/*", ("evaluate coded",)),
    ("runs/compressed/best_packed_k4/table.npz", ("compress",)),
    ("runs/compressed/best_packed_k4/*", ("evaluate packed",)),
    ("runs/compressed/sweep.json", ("compress",)),
    ("runs/results.json", ("report",)),
    ("banded/pca_factorized/bands_pca_k4/*", ("train on bands",)),
    ("table*", ("factorize a table",)),
    ("corpus/train.bin", ("resume", "compress anew")),
    ("corpus/val.bin", ("resume", "evaluate")),
    ("corpus/meta.json", ("resume", "evaluate", "sample")),
)


def readers(path: str) -> tuple[str, ...]:
    """The commands that read a file of the scene."""
    return next((names for pattern, names in READERS if fnmatch(path, pattern)), ())


def damages(case: Case, index: int) -> tuple[str, Verdict]:
    """Damages one file; each command that reads it then runs in its own copy.

    Every second case flips a bit of weights or of the optimizer.
    """
    kinds: dict[str, list[str]] = {}
    for path in files_of(case.scene):
        if readers(path):
            kinds.setdefault(_kind(path), []).append(path)
    stored = [kind for kind in kinds if kind.endswith("arrays")]
    turn, turns = index // 2, stored if index % 2 else list(kinds)
    kind = turns[turn % len(turns)]
    path, number = case.random.choice(kinds[kind]), case.random.randrange(1 << 30)
    ways = damage.ways_for(case.scene / path)
    way = "flip" if index % 2 else ways[(turn // len(kinds) + turn) % len(ways)]
    poisons = index % 10 == 4  # Weights that are not finite, in a sound checkpoint.
    if poisons:
        kind, way = case.random.choice(stored), "NaN"
        path = kinds[kind][0].partition("/weights")[0].partition("/optimizer")[0]
    names = readers(kinds[kind][0])
    names, verdicts = [case.random.choice(names)] if case.short else names, []
    for name in names:
        case.copy()
        if poisons:
            details = children.in_child(damage.save_nan, str(case.place / path), number)
        else:
            details = damage.WAYS[way](case.place / path, random.Random(number))
        found = case.attempt(name, damaged=path)
        why = f"'{name}' of {path}, {details}: {found.why}"
        verdicts.append(Verdict(found.outcome, why))
    found = worst(verdicts)
    name = names[verdicts.index(found)]
    return f"{way} in {kind}, read by '{name}'", found


def files_of(scene: Path) -> list[str]:
    """The path of every file in the scene, by kind and size.

    Their order must not change: Orbax's names differ each time, sizes hardly do.
    """
    found = [path for path in scene.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(scene)): path.stat().st_size for path in found}
    return sorted(sizes, key=lambda path: (_kind(path), sizes[path]))


def _kind(path: str) -> str:
    """Files of one kind have one name: those whose names are numbers and hashes."""
    run, ckpt, rest = path.partition("/ckpt/")
    if not ckpt:
        return path
    _, item, *inner = rest.split("/")
    if item in ("weights", "optimizer") and "d" in inner:
        inner = ["arrays"]
    return "/".join([run, "ckpt", "*", item, *inner])


def disk(case: Case, index: int) -> tuple[str, Verdict]:
    """Lets writing or reading fail; the same command must then end as if it had not."""
    fail = DISK[index % len(DISK)]
    if fail in (_read_only, _unreadable) and (path := hidden_from_nobody()):
        skipped = Verdict(SKIPPED, f"user {NOBODY} cannot read {path}")
        return "commands of a user without permission", skipped
    case.copy()
    what, name, options = fail(case)
    first = case.attempt(name, **options)
    _permit(case.place, 0o755)
    # Nobody reads what goes into a closed pipe: it may be missing without a word.
    is_unread = fail is _closed_pipe and first.outcome in (SILENT, WARNED)
    again = case.attempt(name)
    again = Verdict(again.outcome, again.why and f"undisturbed again: {again.why}")
    return f"{name} {what}", worst([Verdict(SAME) if is_unread else first, again])


_WRITERS = ("train", "resume", "factorize", "compress anew", "report", "evaluate", "A")
_Failure = tuple[str, str, dict]  # what fails, the command, how it is started


def _file_size(case: Case) -> _Failure:
    # What a command prints is a file, too, and must fit.
    size = case.random.choice((4096, 20_000, 100_000, 300_000))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return "with files limited", case.random.choice(_WRITERS), {"prepare": limit}


def _errors(case: Case) -> _Failure:
    name, number = case.random.choice(_WRITERS), case.random.choice(ERRORS)
    what = f"with {errno.errorcode[number]} at an operation"
    fail = children.fail_with(number)
    return what, name, {"prepare": _at_some_operation(case, name, fail)}


def _full_output(case: Case) -> _Failure:
    name = case.random.choice(("evaluate", "sample", "train", "compress anew"))
    return "> /dev/full", name, {"stdout": Path("/dev/full")}


def _closed_pipe(case: Case) -> _Failure:
    name = case.random.choice(("evaluate", "sample", "train", "compress anew"))
    pipe = case.folder / "pipe"
    os.mkfifo(pipe)
    # Opened without a reader left, it is a pipe that was closed.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    return "| closed pipe", name, {"stdout": pipe, "prepare": lambda: os.close(reader)}


def _read_only(case: Case) -> _Failure:
    _permit(case.place, 0o555)
    name = case.random.choice((*_WRITERS, "sample", "evaluate", "evaluate best"))
    return "in read-only folders", name, {"prepare": _become_nobody}


def _unreadable(case: Case) -> _Failure:
    files = [path for path in files_of(case.place) if readers(path)]
    path = case.random.choice(files)
    _permit(case.place, 0o777)
    (case.place / path).chmod(0o000)
    name = case.random.choice(readers(path))
    return "with an unreadable file", name, {"prepare": _become_nobody}


def _permit(place: Path, mode: int) -> None:
    for path in (place, *place.rglob("*")):
        path.chmod(mode)


def hidden_from_nobody() -> str:
    """A file of Python or pcagpt that the user NOBODY cannot read, or "".

    Only root can become that user; all others already lack permissions.
    """
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    options = nobody if os.getuid() == 0 else {}
    needed = (
        sys.executable,
        os.__file__,
        np.__file__,
        str(REPOSITORY / "pcagpt/main.py"),
    )
    for path in needed:
        if subprocess.run(["test", "-r", path], **options).returncode:
            return path
    return ""


def _become_nobody() -> None:
    if os.getuid() == 0:  # Root may write and read everything.
        os.environ["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


DISK = (_file_size, _errors, _full_output, _closed_pipe, _read_only, _unreadable)

KILLED = " (killed)"
TOGETHER = (
    ("train", "train"),
    ("A", "B"),
    ("train", "train at another rate"),
    ("train", "train", "train"),
    ("resume", "resume at another rate", "evaluate"),
    ("train", "train (killed)", "train"),
    ("A", "B", "train"),
    ("compress anew", "compress anew"),
    ("factorize", "factorize", "evaluate"),
    ("report", "report", "evaluate"),
    ("resume", "resume"),
)


def together(case: Case, index: int) -> tuple[str, Verdict]:
    """Starts commands in one folder; each that ends well must have its own result."""
    names = TOGETHER[index % len(TOGETHER)]
    case.copy()
    before, started = units(case.place), []
    for name in names:
        started.append(case.start(name.removesuffix(KILLED)))
        time.sleep(case.random.choice((0, 0, 0.5, 2)) * case.random.random())
    if KILLED in "".join(names):
        started[1].send(signal.SIGKILL)
    ended = [running.wait(2 * case.limit) for running in started]
    verdicts = [
        case.judged(name, command, before)
        for name, command in zip(names, ended, strict=True)
        if not name.endswith(KILLED)
    ]
    if all(verdict.outcome == REFUSED for verdict in verdicts):
        verdicts.append(Verdict(UNCLEAR, f"all are refused: {verdicts[0].why}"))
    again = case.attempt(names[0])
    if again.outcome != REFUSED:
        why = again.why and f"'{names[0]}' afterwards: {again.why}"
        verdicts.append(Verdict(again.outcome, why))
    return f"together: {', '.join(names)}", worst(verdicts)


class Part(NamedTuple):
    """A part: its function of (case, index), its meaning, and its numbers of cases."""

    run: Callable[[Case, int], tuple[str, Verdict]]
    meaning: str
    full: int
    short: int


PARTS = {
    "kills": Part(kills, "SIGKILL, then the same command", 60, 10),
    "signals": Part(signals, "SIGINT or SIGTERM, then the same command", 24, 4),
    "damages": Part(damages, "a damaged file, then a command reads it", 320, 50),
    "disk": Part(disk, "a full disk, missing permission, a closed output", 96, 12),
    "together": Part(together, "two or three commands start at once", 33, 5),
    "inputs": Part(inputs, "generated knobs, token files, arrays, JSON", 60, 10),
}
