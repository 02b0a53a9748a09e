"""Whether training leaks: a long run of a tiny model, and the slope of its memory.

    python scripts/memory.py                  10,000 steps, minutes on a CPU; Linux only
    python scripts/memory.py --steps 2000 --limit 500

The run is D of configs/demo.py with a tiny model, so that what happens besides the
arithmetic happens often: batches, logs, evaluations and checkpoints. Prints the
resident memory, without mapped files, and its slope in bytes per step: least squares
over all samples after the warm-up, the first third. The exit code is 1 if the slope is
above --limit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pcagpt.config import override

ROOT = Path(__file__).parent.parent
SAMPLE_SECONDS = 0.25
WARM_UP = 1 / 3
# Python itself collects cycles so rarely that memory rises and falls like a saw.
COLLECTING = """
import gc, runpy, threading, time
def collect():
    while True:
        gc.collect()
        time.sleep(1)
threading.Thread(target=collect, daemon=True).start()
runpy.run_module("pcagpt.main", run_name="__main__", alter_sys=True)
"""
TINY = {
    "task": "train",
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "train.batch_size": 4,
    "evaluate.batch_size": 64,
    "evaluate.every": 250,
    "mesh.data": 1,
}


def main() -> int:
    """Runs, samples and prints; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=200, help="bytes per step")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        samples = sample(asked.steps, Path(workdir))
    after = [(step, size) for step, size in samples if step > WARM_UP * asked.steps]
    slope, error = fit(after)
    told = [
        f"{size / 1e6:.1f} MB at step {step:,}"
        for step, size in after[:: len(after) - 1]
    ]
    print(
        f"{', '.join(told)}; slope {slope:.1f} ± {2 * error:.1f} bytes per step, "
        f"from {len(after)} samples"
    )
    return int(slope > asked.limit)


def fit(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Slope of (step, bytes) by least squares, and its standard error."""
    (slope, _), covariance = np.polyfit(*np.array(samples, float).T, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


def sample(steps: int, workdir: Path) -> list[tuple[int, int]]:
    """(step, resident bytes) of a run, at regular times."""
    knobs = TINY | {"train.steps": steps, "workdir": workdir}
    words = [override(path, value) for path, value in knobs.items()]
    command = [sys.executable, "-c", COLLECTING, "--config=configs/demo.py", *words]
    log, found = workdir / "gpt_baseline" / "metrics.jsonl", []
    with subprocess.Popen(command, cwd=ROOT) as run:
        while run.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            step = last_step(log)
            # Without files: the system drops and reads their pages as it likes.
            status = Path(f"/proc/{run.pid}/status").read_text()
            size = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
            if step and size:  # A process that has just ended has none.
                found.append((step, int(size[1]) * 1024))
    if run.returncode:
        raise SystemExit(run.returncode)
    return found


def last_step(log: Path) -> int:
    """The step of the last complete line of metrics.jsonl; 0 without one."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


if __name__ == "__main__":
    sys.exit(main())
