"""Measures how fast pcagpt trains and decodes, beside PyTorch on the same GPU.

    python scripts/bench.py --out bench.json
    python scripts/bench.py --quick
    python scripts/bench.py --profile --systems pcagpt --batches 32

GPT-2 small (D) and the same with a table of rank 128, in bfloat16, at 1,024 tokens a
sequence. Systems take turns within a round, so that a GPU that warms up or slows down
does so for all; each figure is the median of the rounds. `pcagpt` is the compiled
training step on one batch, `pcagpt loop` the loop around it with data from disk,
logging, and the stall of a checkpoint shared out over the steps between two; compiling
and evaluating are left out. `torch` is a plain GPT-2 and `transformers` Hugging Face's,
both under torch.compile with fused AdamW, scaled_dot_product_attention and autocast,
which keeps the residual stream in float32; pcagpt's is bfloat16. Their peak memory is
what PyTorch allocated, pcagpt's what the compiled program needs. `decode` is greedy
generation with a key-value cache. `data parallel` and `fsdp` are the step on all GPUs
that CUDA_VISIBLE_DEVICES shows, with so many sequences and bytes on each; all else is
on one. --quick does the same at the demo's size without PyTorch, also on CPUs.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# PyTorch needs memory beside JAX; both before JAX is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import bench_pcagpt
import bench_torch
import jax

from pcagpt import provenance
from pcagpt.main import prepare_process

SYSTEMS = (
    "pcagpt",
    "pcagpt loop",
    "data parallel",
    "fsdp",
    "torch",
    "transformers",
    "decode",
)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at the demo's size")
    parser.add_argument(
        "--systems", default=",".join(SYSTEMS), help="as in pcagpt,torch"
    )
    parser.add_argument(
        "--batches", default="32", help="sequences a step, as in 32,64; decoding: 1,64"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all systems")
    parser.add_argument("--steps", type=int, default=50, help="of a system in a round")
    parser.add_argument(
        "--profile", action="store_true", help="print pcagpt's kernels by their time"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    asked = parser.parse_args()
    asked.systems = tuple(asked.systems.split(","))
    try:
        asked.batches = tuple(map(int, asked.batches.split(",")))
    except ValueError:
        parser.error(f"--batches is {asked.batches}: give whole numbers, as in 32,64")
    unknown = set(asked.systems) - set(SYSTEMS)
    if unknown or min(asked.rounds, asked.steps, *asked.batches) < 1:
        parser.error(
            f"no system is called {', '.join(sorted(unknown))}: choose of "
            f"{', '.join(SYSTEMS)}"
            if unknown
            else "--rounds, --steps and --batches are whole numbers from 1 on"
        )
    return asked


def main() -> None:
    """Measures, prints a table, and writes it where --out says."""
    asked = arguments()
    prepare_process()
    size = bench_pcagpt.QUICK if asked.quick else bench_pcagpt.GPT2_SMALL
    if asked.quick:
        asked.batches, asked.steps = (size.batch,), min(asked.steps, 5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench_pcagpt.write_corpus(Path(folder), size)
        for batch in asked.batches:
            rows += measure(make_systems(asked, size, batch, Path(folder)), asked)
            gc.collect()  # Before the next systems need the memory.
            print(table(rows), flush=True)
            write(rows, asked)
        if asked.profile:
            for model in bench_pcagpt.models(size):
                print(bench_pcagpt.profile(size, model, asked.batches[0], Path(folder)))
    if asked.out:
        print(f"written to {asked.out}")


def write(rows: list[dict], asked) -> None:
    """Writes what is known so far where --out says."""
    if asked.out:
        told = circumstances(asked, rows)
        report = {"rows": rows, "ratios": ratios(rows), **told}
        asked.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def make_systems(asked, size, batch: int, folder: Path) -> list:
    """What takes turns at one batch size, each compiled and warm."""
    makers = {
        "pcagpt": bench_pcagpt.Step,
        "pcagpt loop": bench_pcagpt.Loop,
        "data parallel": bench_pcagpt.DataParallel,
        "fsdp": bench_pcagpt.FullySharded,
        "torch": bench_torch.Plain,
        "transformers": bench_torch.Transformers,
    }
    decoded = (1,) if asked.quick else (1, 64)
    wanted = [
        (name, makers[name], batch) for name in asked.systems if name in makers
    ] + [
        ("decode", bench_pcagpt.Decoding, number)
        for number in decoded
        if "decode" in asked.systems and batch == asked.batches[0]
    ]
    systems = []
    for name, maker, number in wanted:
        reason = ""
        if maker.__module__ == "bench_torch":
            reason = "--quick is without it" if asked.quick else bench_torch.why_not()
        elif issubclass(maker, bench_pcagpt.DataParallel) and jax.device_count() == 1:
            reason = "there is one device"
        if reason:
            print(f"{name} is left out: {reason}")
            continue
        for model in bench_pcagpt.models(size):
            print(f"preparing {name} {model} at batch {number} ...", flush=True)
            systems.append(maker(size, model, number, folder))
    return systems


def measure(systems: list, asked) -> list[dict]:
    """A row for each system."""
    seconds = [[] for _ in systems]
    for number in range(asked.rounds):
        for system, found in zip(systems, seconds, strict=True):
            found.append(system.seconds_per_step(asked.steps))
            print(
                f"round {number + 1} of {asked.rounds}: {system.name} {system.model} "
                f"at batch {system.batch}: {1e3 * found[-1]:.2f} ms",
                flush=True,
            )
    return [row(system, found) for system, found in zip(systems, seconds, strict=True)]


def row(system, seconds: list[float]) -> dict:
    """What is known of one system."""
    middle = statistics.median(seconds)
    rate = system.tokens_per_step / middle
    flops = system.flops_per_token
    peak = provenance.peak_flops(system.devices)
    return {
        "system": system.name,
        "model": system.model,
        "batch": system.batch,
        "devices": system.devices,
        "tokens_per_second": rate,
        "ms_per_step": 1e3 * middle,
        "rounds_ms": [1e3 * s for s in seconds],
        "peak_bytes": system.peak_bytes,
        "flops_per_token": flops,
        "utilisation": flops * rate / peak if peak and flops else None,
        **system.details,
    }


def ratios(rows: list[dict]) -> dict[str, float]:
    """Tokens per second and device of one row over those of another."""
    rate = {
        (r["system"], r["model"], r["batch"]): r["tokens_per_second"] / r["devices"]
        for r in rows
    }
    found = {}
    for (system, model, batch), value in rate.items():
        if model != "D" and (system, "D", batch) in rate:
            name = f"{system}, batch {batch}: {model} / D"
            found[name] = value / rate[system, "D", batch]
        ours = rate.get(("pcagpt", model, batch))
        if ours and system in ("torch", "transformers"):
            found[f"{model}, batch {batch}: pcagpt / {system}"] = ours / value
        elif ours and system in ("pcagpt loop", "data parallel", "fsdp"):
            found[f"{model}, batch {batch}: {system} / pcagpt"] = value / ours
    return found


def table(rows: list[dict]) -> str:
    """The rows and their ratios, for people."""
    lines = [
        f"{'system':<14}{'model':>6}{'batch':>7}{'ms/step':>10}{'tokens/s':>12}"
        f"{'of peak':>9}{'peak GB':>9}"
    ]
    for r in rows:
        share = "" if r["utilisation"] is None else f"{r['utilisation']:.1%}"
        size = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"{r['system']:<14}{r['model']:>6}{r['batch']:>7}{r['ms_per_step']:>10.2f}"
            f"{r['tokens_per_second']:>12,.0f}{share:>9}{size:>9}"
        )
    lines += [f"{name}: {value:.3f}" for name, value in ratios(rows).items()]
    return "\n".join(["", *lines, ""])


def circumstances(asked, rows: list[dict]) -> dict:
    """What the figures depend on."""
    return {
        "command": " ".join(["python", "scripts/bench.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": provenance.device(max(row["devices"] for row in rows)),
        "gpu": gpu_state(),
        "host": platform.machine(),
        "versions": {**provenance.versions(), **bench_torch.versions()},
        "git_commit": provenance.git_commit(),
        "steps": asked.steps,
        "rounds": asked.rounds,
    }


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and memory as the driver tells them; None without one."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values, strict=True))


if __name__ == "__main__":
    main()
