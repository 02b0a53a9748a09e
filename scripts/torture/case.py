"""One case of the campaign: its folder, its commands, and how they are judged."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from torture import children
from torture.judge import Reference, Verdict, crashed, judge, said
from torture.scene import COMMANDS, LIMIT, result


@dataclasses.dataclass
class Case:
    """Commands in copies of the scene.

    folder: of the case; random: its random numbers; limit: seconds that a command may
    take; short: only one of the commands that could be run.
    """

    folder: Path
    random: random.Random
    scene: Path
    limit: float
    short: bool = False
    _started: int = 0

    @property
    def place(self) -> Path:
        """The folder that its commands run in; their outputs lie beside it."""
        return self.folder / "place"

    def copy(self, *names: str) -> None:
        """Makes `place` anew: the scene, or these parts of it."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for name in names or os.listdir(self.scene):
            source = self.scene / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, self.place / name)

    def start(self, name: str, **options: Any) -> children.Started:
        """Starts a command of COMMANDS; options as for `children.start`."""
        self._started += 1
        log = self.folder / str(self._started)
        return children.start(COMMANDS[name].words, self.place, log, **options)

    def run(self, name: str, **options: Any) -> children.Ended:
        """Runs a command to its end."""
        return self.start(name, **options).wait(self.limit)

    def attempt(self, name: str, damaged: str | None = None, **options: Any) -> Verdict:
        """Runs a command and judges it; `damaged` is the path of a damaged file."""
        before = units(self.place)
        return self.judged(name, self.run(name, **options), before, damaged)

    def judged(
        self,
        name: str,
        ended: children.Ended,
        before: dict[str, str],
        damaged: str | None = None,
    ) -> Verdict:
        """Judges a command that ended; `before` are the units before it."""
        reference, after = self.reference(name), units(self.place)
        lost = [
            unit
            for unit in reference.kept
            if unit in before
            and not _is_kept(unit, before, after)
            and not (damaged and f"{damaged}/".startswith(f"{unit}/"))
        ]
        return judge(ended, reference, self._result(name, ended), lost, damaged)

    def reference(self, name: str) -> Reference:
        """What a command leaves in an undamaged scene; known after the first time.

        Raises RuntimeError if it fails.
        """
        path = self.scene.parent / f"{name}.json"
        if not path.exists():
            own = path.with_suffix(f".{os.getpid()}")
            alone = Case(own, self.random, self.scene, LIMIT)
            value = json.dumps(dataclasses.asdict(alone._undisturbed(name)))
            shutil.rmtree(own)
            own.write_text(value)
            own.replace(path)
        return Reference(**json.loads(path.read_text()))

    def _undisturbed(self, name: str) -> Reference:
        self.copy()
        before, ended = units(self.place), self.run(name)
        if crashed(ended):
            raise RuntimeError(f"'{name}' fails undisturbed: {ended.err[-2000:]}")
        after = units(self.place)
        kept = [unit for unit in before if _is_kept(unit, before, after)]
        made = self._result(name, ended)
        return Reference(ended.code, made, sorted(said(ended)), kept, ended.seconds)

    def _result(self, name: str, ended: children.Ended) -> Any:
        if ended.code:
            return None
        try:
            return result(COMMANDS[name], self.place, ended.out)
        except Exception as error:  # A damaged file can raise almost any error.
            return {"unreadable": f"{type(error).__name__}: {error}"[:200]}


def _is_step(unit: str) -> bool:
    return Path(unit).parent.name == "ckpt"


def _is_kept(unit: str, before: dict[str, str], after: dict[str, str]) -> bool:
    """A file may be written again, a checkpoint may not."""
    return unit in after and (not _is_step(unit) or after[unit] == before[unit])


def units(place: Path) -> dict[str, str]:
    """{path: hash} of every file; a checkpoint is one unit of all its files.

    Plots are left out: a report without their data has no use for them.
    """
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        try:
            content = path.read_bytes()
        except OSError:  # A folder; or it was removed meanwhile.
            continue
        if path.parent.name == "plots":
            continue
        unit = next((str(p) for p in name.parents if _is_step(str(p))), str(name))
        digest = found.setdefault(unit, hashlib.sha256())
        digest.update(str(name).encode() + content)
    return {name: digest.hexdigest() for name, digest in found.items()}
