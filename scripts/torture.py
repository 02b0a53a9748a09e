"""The torture campaign: kills, damages, full disks, rivals and bad inputs. CPU only.

    python scripts/torture.py --out FOLDER            an hour at most, on two cores
    python scripts/torture.py --out FOLDER --short    five minutes at most
    python scripts/torture.py --only damages --seed 1 --case 17

Prints progress and a table and writes the table to --out, as torture.md and with every
case as torture.json. The exit code is 1 if anything was silently wrong, was lost, ended
in a traceback or did not end. The folder of such a case, with its commands and what
they printed, is kept in --out, and the table names the command that repeats it. The
seed decides everything but the moments of signals, which depend on the machine.

A case has one of these outcomes, of several commands the worst:

  same       the result is that of an undisturbed run, perhaps after a warning
  refused    exit code 2 and one line that names the file
  warned     another result, and a line that says why
  unclear    refused, but in many lines or without the file's name
  SILENT     another result and no word
  LOST       something good was deleted
  TRACEBACK  a traceback, or an exit code besides 0 and 2
  HANG       no end within --limit seconds
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

# The code that stands beside this script.
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
from torture.judge import BAD, OUTCOMES, TRACEBACK, UNCLEAR
from torture.parts import PARTS

# What the commands import. None of it may start JAX's backend or a thread. The user of
# the read-only cases may not be allowed to import anything.
IMPORTED = (
    "encodings.ascii", "jax", "matplotlib.pyplot", "pcagpt.pipeline.tasks",
)  # fmt: skip


def main() -> int:
    """Runs the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("torture"), help="folder")
    parser.add_argument("--short", action="store_true", help="fewer cases")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part")
    parser.add_argument("--seed", type=int, default=1)
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
    (folder / "compiled").mkdir(mode=0o777)
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
            chance, own = (
                random.Random(f"{args.seed} {part} {index}"),
                f"{part}-{index}",
            )
            case = Case(folder / own, chance, folder / "scene", args.limit, args.short)
            tasks[part, index] = functools.partial(_one, part, index, case, args.out)
    cases, counts = [], Counter()
    for (part, index), found in pool(tasks.items(), args.jobs):
        if isinstance(found, RuntimeError):  # The campaign itself is wrong.
            why = f"the campaign: {str(found)[-500:]}"
            found = {"outcome": TRACEBACK, "what": "no case", "why": why, "seconds": 0}
            found |= {"outcomes": {TRACEBACK: 1}, "kept": None}
        found |= {"part": part, "case": index}
        cases.append(found)
        counts[found["outcome"]] += 1
        if found["outcome"] in (*BAD, UNCLEAR) or len(cases) % 25 == 0:
            spent = time.monotonic() - began
            print(
                f"{spent:5.0f} s  {len(cases)} of {len(tasks)}  {part} {index}: "
                f"{found['outcome']}, {found['what']}: {found['why'][:150]}",
                flush=True,
            )
    return sorted(
        cases, key=lambda case: (list(PARTS).index(case["part"]), case["case"])
    )


def _one(part: str, index: int, case: Case, out: Path) -> dict[str, Any]:
    """Does one case in this process; keeps its folder if it failed."""
    began = time.monotonic()
    case.folder.mkdir()
    what, verdict = PARTS[part].run(case, index)
    kept = None
    if verdict.outcome in BAD:
        kept = out / f"{part}-{index}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(case.folder, kept, symlinks=True)
    shutil.rmtree(case.folder)
    return {
        "what": what,
        "outcome": verdict.outcome,
        "why": verdict.why,
        "outcomes": verdict.outcomes or {verdict.outcome: 1},
        "seconds": round(time.monotonic() - began, 1),
        "kept": kept and str(kept),
    }


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
    """Those that must not be, and the unclear ones: a line for each kind."""
    kinds: dict[tuple[str, str], list[dict]] = {}
    for case in report["cases"]:
        if case["outcome"] in (*BAD, UNCLEAR):
            kinds.setdefault((case["outcome"], case["what"]), []).append(case)
    lines = []
    for outcome, what in sorted(kinds, key=lambda kind: OUTCOMES.index(kind[0])):
        cases = kinds[outcome, what]
        first, short = cases[0], " --short" if report["short"] else ""
        repeat = (
            f"--only {first['part']} --seed {report['seed']} --case {first['case']}"
        )
        why = first["why"].replace("`", "'").replace("\n", " ")
        lines += [
            f"- **{outcome}** {len(cases)} x {what}: `{why}`",
            f"  (`python scripts/torture.py {repeat}{short}`)",
        ]
    return lines or ["No failures."]


if __name__ == "__main__":
    sys.exit(main())
