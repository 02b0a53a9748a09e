"""Tests what is promised: kills, damage, full disks, parallel commands, bad input.

    python scripts/torture.py --out FOLDER            an hour at most, on two cores
    python scripts/torture.py --out FOLDER --short    five minutes at most

Runs on a CPU. Prints progress and a table. Writes the table to FOLDER/torture.md and
every case to FOLDER/torture.json. The exit code is 1 if a case is SILENT, LOST,
TRACEBACK or HANG.

To repeat a case, name its part, seed and number, and give --short if it ran with it:

    python scripts/torture.py --only damages --seed 1 --case 17

The table ends with this command for each kind of failure. FOLDER/damages-17 keeps what
a failed case left: its commands, what they printed, and its files in place/. The seed
decides everything but the moments of signals, which depend on the machine.

A case has one of these outcomes. A case of several commands has the worst of theirs:

OUTCOMES
"""

import argparse
import functools
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

# Tests the pcagpt of this checkout, even if another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Read when NumPy and JAX are imported. OpenBLAS must not start threads: they do not
# survive a fork.
os.environ.pop("XLA_FLAGS", None)
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    OPENBLAS_NUM_THREADS="1",
    PYTHONDONTWRITEBYTECODE="1",
)

from torture import scene
from torture.case import Case
from torture.children import pool
from torture.judge import BAD, OUTCOMES, SKIPPED, TRACEBACK, UNCLEAR, Verdict
from torture.parts import PARTS

# Imported before the forks, because the user of the read-only cases may not be allowed
# to read the packages. None of these modules may start JAX's backend or a thread.
IMPORTED = (
    "encodings.ascii", "jax", "pcagpt.pipeline.tasks", "vl_convert",
)  # fmt: skip


def main() -> int:
    """Runs the campaign; returns the exit code."""
    outcomes = "\n".join(f"  {name:9}  {text}" for name, text in OUTCOMES.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("OUTCOMES", outcomes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("torture"), help="folder")
    parser.add_argument("--short", action="store_true", help="fewer cases")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part")
    parser.add_argument("--seed", type=int, default=1, help="1 if not given")
    parser.add_argument("--case", type=int, help="only this case of the part")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a command")
    args = parser.parse_args()
    began = time.monotonic()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.chmod(folder, 0o755)  # Another user runs the cases of read-only folders.
        cases = campaign(args, Path(folder), began)
    report = {
        "command": " ".join(["python", "scripts/torture.py", *sys.argv[1:]]),
        "seed": args.seed,
        "short": args.short,
        "seconds": round(time.monotonic() - began),
        "cases": cases,
    }
    text = as_markdown(report)
    (args.out / "torture.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "torture.md").write_text(text)
    print(text)
    return int(any(case["outcome"] in BAD for case in cases))


def campaign(args: argparse.Namespace, folder: Path, began: float) -> list[dict]:
    """Makes the scene and does every case in it; returns their outcomes."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    (folder / "compiled").mkdir()
    (folder / "compiled").chmod(0o777)
    warnings.filterwarnings("ignore", ".*os.fork.*")
    for name in IMPORTED:
        importlib.import_module(name)
    scene.build(folder / "scene")
    print(f"the scene is made, {time.monotonic() - began:.0f} s", flush=True)

    tasks = {}
    for part in args.only or PARTS:
        count = PARTS[part].short if args.short else PARTS[part].full
        for index in [args.case] if args.case is not None else range(count):
            own = folder / f"{part}-{index}"
            chance = random.Random(f"{args.seed} {part} {index}")
            case = Case(own, chance, folder / "scene", args.limit, args.short)
            tasks[part, index] = functools.partial(_do, part, index, case, args.out)
    cases, counts = [], Counter()
    for (part, index), found in pool(tasks.items(), args.jobs):
        if isinstance(found, RuntimeError):  # The campaign itself is wrong.
            why = f"the campaign: {str(found)[-500:]}"
            found = _entry("no case", Verdict(TRACEBACK, why), 0)
        found |= {"part": part, "case": index}
        cases.append(found)
        counts[found["outcome"]] += 1
        if found["outcome"] in (*BAD, UNCLEAR) or len(cases) % 25 == 0:
            spent = f"{time.monotonic() - began:5.0f} s  {len(cases)} of {len(tasks)}"
            short = f"{found['outcome']}, {found['what']}: {found['why'][:150]}"
            print(f"{spent}  {part} {index}: {short}", flush=True)
    order = list(tasks)
    return sorted(cases, key=lambda case: order.index((case["part"], case["case"])))


def _do(part: str, index: int, case: Case, out: Path) -> dict[str, Any]:
    """Does one case in this process; keeps its folder if it failed."""
    began = time.monotonic()
    case.folder.mkdir()
    what, verdict = PARTS[part].run(case, index)
    if verdict.outcome in BAD:
        kept = out / case.folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(case.folder, kept, symlinks=True)
    shutil.rmtree(case.folder)
    return _entry(what, verdict, round(time.monotonic() - began, 1))


def _entry(what: str, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """A case in torture.json, besides its part and number."""
    counts = verdict.outcomes or {verdict.outcome: 1}
    entry = {"what": what, "outcome": verdict.outcome, "why": verdict.why}
    return entry | {"outcomes": counts, "seconds": seconds}


def as_markdown(report: dict[str, Any]) -> str:
    """A table of the outcomes of each part, and the failures with their commands."""
    lines = [
        "# Torture",
        "",
        f"`{report['command']}`: seed {report['seed']}, {report['seconds']:,} s",
        "",
        f"| part | cases | {' | '.join(OUTCOMES)} | seconds of all |",
        "|---" * (len(OUTCOMES) + 3) + "|",
    ]
    for part, about in PARTS.items():
        cases = [case for case in report["cases"] if case["part"] == part]
        counts = sum((Counter(case["outcomes"]) for case in cases), Counter())
        seconds = sum(case["seconds"] for case in cases)
        numbers = [counts.total(), *(counts[outcome] for outcome in OUTCOMES)]
        cells = " | ".join(map(str, [*numbers, round(seconds)]))
        if cases:
            lines.append(f"| {part}: {about.meaning} | {cells} |")
    lines += ["", *_failures(report)]
    return "\n".join(lines) + "\n"


def _failures(report: dict[str, Any]) -> list[str]:
    """An entry for each kind of bad, unclear or skipped case."""
    kinds: dict[tuple[str, str], list[dict]] = {}
    for case in report["cases"]:
        if case["outcome"] in (*BAD, UNCLEAR, SKIPPED):
            kinds.setdefault((case["outcome"], case["what"]), []).append(case)
    short, lines = " --short" if report["short"] else "", []
    for outcome, what in sorted(kinds, key=lambda kind: list(OUTCOMES).index(kind[0])):
        cases = kinds[outcome, what]
        first = cases[0]
        why = first["why"].replace("`", "'").replace("\n", " ")
        repeat = f"--only {first['part']} --seed {report['seed']} --case"
        lines += [
            f"- **{outcome}** {len(cases)} x {what}: `{why}`",
            f"  (`python scripts/torture.py {repeat} {first['case']}{short}`)",
        ]
    return lines or ["No failures."]


if __name__ == "__main__":
    sys.exit(main())
