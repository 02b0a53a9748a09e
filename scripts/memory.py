"""Measures whether training leaks memory, in a long run of a tiny model.

    python scripts/memory.py                         10,000 steps, minutes; Linux only
    python scripts/memory.py --steps 2000 --config.checkpoint.every=1000000 --limit 100

The run is D of configs/demo.py with a tiny model. Its arithmetic is fast, so that it
makes many batches, logs, evaluations and checkpoints. Other arguments are passed to it.
Prints the slope of the bytes that C and Python use. Resident memory shows no leak of
this size: it rises and falls by far more when freed memory goes back to the system. The
exit code is 1 if the slope is above --limit.

Each save loses some 4 KB for each array: tensorstore 0.1.86, which Orbax uses, loses
objects in Spec.to_json. With a save every 75 steps the slope was 2326 ± 249 bytes per
step, and without saves 43 ± 165 (10,000 steps, jax 0.10.2).
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from pcagpt import process
from pcagpt.config import override

ROOT = Path(__file__).parent.parent
SAMPLE_SECONDS = 0.5
WARM_UP = 1 / 3  # of the steps
PARTS = 20  # of the rest; the lowest sample of each counts
TINY = {
    "task": "train",
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "train.batch_size": 4,
    "evaluate.batch_size": 64,
    "evaluate.every": 250,
    "finetune.steps_share": 0.1,  # The demo's own share is of B.
    "mesh.data": 1,
}


class Allocated(ctypes.Structure):
    """The struct mallinfo2 of <malloc.h>."""

    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]


def main() -> int:
    """Trains, samples and prints; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=3000, help="bytes per step")
    asked, further = parser.parse_known_args()
    # With this variable, C also counts what Python allocates.
    if os.environ.get("PYTHONMALLOC") != "malloc":
        again = [sys.executable, *sys.argv]
        os.execve(sys.executable, again, os.environ | {"PYTHONMALLOC": "malloc"})
    process.prepare()
    with tempfile.TemporaryDirectory() as workdir:
        samples = sample(asked.steps, Path(workdir), further)
    after = lowest([(s, b) for s, b in samples if s > WARM_UP * asked.steps], PARTS)
    if len(after) < 4:
        print("too few samples for a slope: raise --steps", file=sys.stderr)
        return 2
    slope, error = fit(after)
    told = [f"{size / 1e6:.1f} MB at step {step:,}" for step, size in after]
    print(
        f"in use: {told[0]}, {told[-1]}; slope {slope:.0f} ± {2 * error:.0f} bytes per "
        f"step ({len(after)} parts)"
    )
    return int(slope > asked.limit)


def sample(steps: int, workdir: Path, further: list[str]) -> list[tuple[int, int]]:
    """(step, bytes in use) of a run in this process, at regular times."""
    # Imported late: it takes the environment that `prepare` sets.
    from pcagpt.main import main as run

    log = workdir / "gpt_baseline" / "metrics.jsonl"
    found: list[tuple[int, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            if step := last_step(log):
                found.append((step, bytes_in_use()))

    knobs = TINY | {"train.steps": steps, "workdir": workdir}
    words = [override(path, value) for path, value in knobs.items()]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = run(["pcagpt", f"--config={ROOT / 'configs/demo.py'}", *words, *further])
    finally:
        ended.set()
        watcher.join()
    if code:
        raise SystemExit(code)
    return found


def bytes_in_use() -> int:
    """What C and Python have allocated and not freed, without garbage."""
    gc.collect()
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = Allocated
    now = mallinfo2()
    return now.field_7 + now.field_4  # uordblks, and hblkhd for large blocks


def last_step(log: Path) -> int:
    """The step of the last complete line of metrics.jsonl; 0 without one."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def lowest(samples: list[tuple[int, int]], parts: int) -> list[tuple[int, int]]:
    """The lowest sample of each part: saves and evaluations briefly need more."""
    chunks = np.array_split(np.array(samples), min(parts, len(samples) // 3) or 1)
    return [tuple(part[part[:, 1].argmin()].tolist()) for part in chunks if len(part)]


def fit(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Slope of (step, bytes) by least squares, and its standard error."""
    (slope, _), covariance = np.polyfit(*np.array(samples, float).T, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


if __name__ == "__main__":
    sys.exit(main())
