"""The outcome of a command whose files were damaged, or that was disturbed."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from torture.children import Ended

SAME, REFUSED, WARNED = "same", "refused", "warned"
SKIPPED, UNCLEAR = "skipped", "unclear"
BAD = SILENT, LOST, TRACEBACK, HANG = "SILENT", "LOST", "TRACEBACK", "HANG"
# From good to bad: a case of several commands has the worst of their outcomes.
OUTCOMES = {
    SAME: "the result is that of an undisturbed run, perhaps after a warning",
    REFUSED: "exit code 2 and one line that names the file",
    WARNED: "another result, and a line that says why",
    SKIPPED: "not tried, because this machine cannot",
    UNCLEAR: "refused, but in many lines or without the file's name",
    SILENT: "another result without a warning",
    LOST: "something good was deleted",
    TRACEBACK: "a traceback, or an exit code besides 0 and 2",
    HANG: "no end within --limit seconds",
}

_MARK = "Traceback (most recent call last)"
_MOST_LINES = 5


@dataclass(frozen=True)
class Reference:
    """What a command leaves if nothing disturbs it.

    result: JSON of its numbers; kept: files and checkpoints that it leaves as they
    were; seconds: that it takes.
    """

    code: int
    result: Any
    said: list[str]
    kept: list[str]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """An outcome, and why; `outcomes` counts those of a series of inputs."""

    outcome: str
    why: str = ""
    outcomes: dict[str, int] | None = None


def worst(verdicts: list[Verdict]) -> Verdict:
    """The worst of several, the first of its kind."""
    return max(verdicts, key=lambda verdict: list(OUTCOMES).index(verdict.outcome))


def crashed(ended: Ended, codes: tuple[int, ...] = (0, 2)) -> Verdict | None:
    """The verdict on a hang, a traceback or another exit code; None without them."""
    if ended.hung:
        return Verdict(HANG, f"no end after {ended.seconds:.0f} s")
    last = " ".join(ended.err.split())[-200:]
    if _MARK in ended.out + ended.err or "Fatal Python error" in ended.err:
        errors = re.findall(
            r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", ended.err, re.M
        )
        return Verdict(TRACEBACK, errors[-1][:200] if errors else last)
    if ended.code not in codes:
        return Verdict(TRACEBACK, f"exit code {ended.code}: {last}")
    return None


def judge(
    ended: Ended,
    reference: Reference,
    result: Any = None,
    lost: tuple[str, ...] = (),
    damaged: str | None = None,
) -> Verdict:
    """The verdict on a command.

    Args:
      ended: what it left.
      reference: what it leaves undisturbed.
      result: its numbers, if it ended well.
      lost: undamaged files that it deleted, and `reference` did not.
      damaged: path of the damaged file in the folder of the case.
    """
    if found := crashed(ended):
        return found
    if lost:
        return Verdict(LOST, f"lost {', '.join(lost[:3])}")
    lines = said(ended).difference(reference.said)
    if ended.code == 2:
        if reference.code == 2:
            return Verdict(SAME)
        return _refused(ended, damaged)
    if reference.code == 2:
        return Verdict(SILENT, "exit code 0 for a command that must be refused")
    if result == reference.result:
        return Verdict(SAME)
    why = f"another {differing(reference.result, result)}"
    warned = [line for line in lines if line.startswith("pcagpt: ")]
    if warned or any(damaged and names(line, damaged) for line in lines):
        return Verdict(WARNED, why)
    return Verdict(SILENT, why)


def _refused(ended: Ended, damaged: str | None) -> Verdict:
    """The verdict on exit code 2: one line of its own that names the file."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    shown = [line for line in lines if not re.search(r"\d+%", line)]  # Not progress.
    own = [line for line in shown if line.startswith("pcagpt: ")]
    if not own:
        return Verdict(UNCLEAR, "exit code 2 without a line")
    if len(shown) > _MOST_LINES:
        return Verdict(UNCLEAR, f"{len(shown)} lines: {shown[0][:120]}")
    if damaged and not any(names(line, damaged) for line in own):
        return Verdict(UNCLEAR, f"the file is not named: {own[-1][:200]}")
    return Verdict(REFUSED, own[-1][:200])


def said(ended: Ended) -> set[str]:
    """Every line of both outputs."""
    return set((ended.out + "\n" + ended.err).splitlines())


def names(line: str, path: str) -> bool:
    """Whether a line names a file, its checkpoint, or the very folder that it is in."""
    file = PurePosixPath(path)
    found = [file.name, str(file.parent), *map(str, file.parents[1:-2])]
    if file.name.isdigit():  # It is a checkpoint.
        found[0] = f"ckpt/{file.name}"
    checkpoint = re.search(r"ckpt/\d+", path)
    if checkpoint and f"{checkpoint[0]}/" in line:  # Anything in it.
        return True
    return any(re.search(rf"(?<![\w.]){re.escape(n)}(?![\w/])", line) for n in found)


def differing(wanted: Any, found: Any, where: str = "") -> str:
    """Where two JSON values differ first, as in 'rows.0.loss (1.5, not 1.4)'."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if wanted.get(key) != found.get(key):
                return differing(wanted.get(key), found.get(key), f"{where}.{key}")
    if isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            return f"{where.strip('.')} ({len(found)} entries, not {len(wanted)})"
        for number, pair in enumerate(zip(wanted, found, strict=True)):
            if pair[0] != pair[1]:
                return differing(*pair, f"{where}.{number}")
    shown = [str(value)[:60] for value in (found, wanted)]
    return f"{where.strip('.') or 'result'} ({shown[0]}, not {shown[1]})"
