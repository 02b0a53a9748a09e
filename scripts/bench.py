"""Measures how fast pcagpt trains and decodes, next to PyTorch on the same device.

    python scripts/bench.py --out bench.json
    python scripts/bench.py --quick
    python scripts/bench.py --systems pcagpt --profile
    python scripts/bench.py --systems pcagpt,data-parallel,fsdp --batches 32,64

Two models are measured: GPT-2 small (D), and GPT-2 small with a token table of rank 128
(k128). Both compute in bfloat16 on sequences of 1,024 tokens. The compiled step also
has a table of k128's size in bands, each with its own rank. A packed table, in codes of
4 bits that are read in place, only decodes.

The systems take turns in each round, so that a GPU that slows down affects all of them.
The GPU rests before each turn, because a hot GPU at its power limit is slower. A figure
is the median over the rounds. A ratio is computed within each round; the report has its
median, minimum and maximum over the rounds. A turn that departs from the median of its
system by more than 3% is listed, with the clock of the GPU at its end.

  pcagpt         the compiled training step, on one batch that stays on the device
  pcagpt-loop    a training run: reads data from disk, logs and saves. Each step counts
                 its share of a save: the time of a save, divided by the default of
                 checkpoint.every. Compiling, evaluating and the first step after a
                 pause are not counted
  data-parallel  the step on all GPUs in CUDA_VISIBLE_DEVICES, one batch on each
  fsdp           the same, with parameters and optimizer state split over the GPUs
  torch          a plain GPT-2
  transformers   Hugging Face's GPT-2
  decode         greedy decoding by pcagpt with a key-value cache, 1 and 64 sequences at
                 a time (--quick: only 1); its memory is weights plus cache
  decode-torch   the same by a plain GPT-2 without a cache, as nanoGPT decodes
  decode-transformers
                 the same by Hugging Face's generate with a static cache

Those of PyTorch need `pip install torch transformers`. They train under
torch.compile with flash attention, fused AdamW, gradient clipping and autocast.
Autocast keeps the residual stream in float32; in pcagpt it is bfloat16. Their peak
memory is the memory that PyTorch allocated; for pcagpt it is the memory that the
compiled program needs. --quick measures at the demo's size, and also runs on a CPU,
where all systems compute in float32 on the same threads. There, torch.compile needs a
compiler of C++; without one, PyTorch runs as it is.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# JAX must leave GPU memory to PyTorch. JAX reads both variables during its import.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pcagpt import process

if __name__ == "__main__":
    process.prepare()  # Sets JAX's compilation cache, so it runs before the import.

import bench_pcagpt
import jax

from pcagpt import json_files
from pcagpt.run import provenance

bench_torch = None
if importlib.util.find_spec("torch"):
    import bench_torch

PARALLEL = {
    "data-parallel": bench_pcagpt.DataParallel,
    "fsdp": bench_pcagpt.FullySharded,
}
TRAINED = {
    "pcagpt": bench_pcagpt.Step,
    "pcagpt-loop": bench_pcagpt.Loop,
    **PARALLEL,
    "torch": bench_torch and bench_torch.Plain,
    "transformers": bench_torch and bench_torch.Transformers,
}
DECODING = {
    "decode": bench_pcagpt.Decoding,
    "decode-torch": bench_torch and bench_torch.PlainDecoding,
    "decode-transformers": bench_torch and bench_torch.TransformersDecoding,
}
OURS = {"torch": "pcagpt", "transformers": "pcagpt"}  # {peer: what it is compared to}
OURS |= {"decode-torch": "decode", "decode-transformers": "decode"}
SYSTEMS = (*TRAINED, *DECODING)
DECODED = (1, 64)  # sequences at a time
REST = 5.0  # seconds
DEPARTS = 0.03  # of a turn's time from the median of its system, relative


def arguments() -> argparse.Namespace:
    """The command line, with the defaults of --quick filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use the demo's size")
    parser.add_argument(
        "--systems",
        default=",".join(SYSTEMS),
        help="for example pcagpt,torch (default: all that can run here)",
    )
    parser.add_argument(
        "--batches",
        help="sequences per step on each GPU, for example 32,64 (32; --quick 16)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--steps", type=int, help="steps of each system in a round (50; --quick 10)"
    )
    parser.add_argument(
        "--rest", type=float, default=REST, help=f"seconds of rest on a GPU ({REST:g})"
    )
    parser.add_argument(
        "--profile", action="store_true", help="list the slowest kernels of pcagpt"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    args.size = bench_pcagpt.QUICK if args.quick else bench_pcagpt.GPT2_SMALL
    args.systems = tuple(dict.fromkeys(map(str.strip, args.systems.split(","))))
    for name in args.systems:
        if name not in SYSTEMS:
            parser.error(f"--systems has '{name}': choose from {', '.join(SYSTEMS)}")
    try:
        batches = set(map(int, (args.batches or str(args.size.batch)).split(",")))
    except ValueError:
        parser.error(f"--batches is {args.batches}: give whole numbers such as 32,64")
    # The largest batch comes first, because smaller ones fit into its memory.
    args.batches = sorted(batches, reverse=True)
    if args.steps is None:
        args.steps = 10 if args.quick else 50
    if args.rounds < 1 or min(args.batches) < 1:
        parser.error("--rounds and --batches must be at least 1")
    most = args.size.corpus_tokens // (args.size.block_size + 1)
    if max(batches) > most:
        parser.error(f"--batches must be at most {most}")
    if args.steps < bench_pcagpt.MIN_STEPS:
        parser.error(f"--steps must be at least {bench_pcagpt.MIN_STEPS}")
    if not 0 <= args.rest <= 3600:
        parser.error("--rest must be between 0 and 3600 seconds")
    folder = args.out and args.out.absolute().parent
    if folder and (args.out.is_dir() or not os.access(folder, os.W_OK)):
        parser.error(f"--out is {args.out}: a file cannot be written there")
    return args


def main() -> int:
    """Measures, prints a table after each group, writes --out; returns the exit code.

    It rewrites the file after every round, so that an interrupted run keeps its rounds.
    """
    args = arguments()
    groups, rows, problem = groups_to_measure(args), [], ""
    if not groups:
        return fail("none of these systems can run here", 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_pcagpt.write_corpus(folder, args.size)
        try:
            for group in groups:
                finished = rows
                try:
                    for measured in measure(group, args, folder):
                        rows = finished + measured
                        if args.out:
                            json_files.write_json(args.out, report(rows))
                except RuntimeError as error:  # JAX and PyTorch derive from it.
                    if not is_out_of_memory(error):
                        raise
                    problem = "some systems did not fit in memory"
                    systems = " + ".join(dict.fromkeys(name for name, *_ in group))
                    print(
                        f"out of memory: {systems}, batch {group[0][2]}: give fewer "
                        "--systems or smaller --batches"
                    )
                release_memory()
                print(table(rows), flush=True)
            for model in bench_pcagpt.models(args.size) if args.profile else ():
                step = bench_pcagpt.Step(args.size, model, args.batches[-1], folder)
                print(bench_pcagpt.profile(step))
        except KeyboardInterrupt:
            print(table(rows))
            problem = "interrupted: only the rounds so far were measured"
    if args.out and rows:
        print(f"written to {args.out}")
    return fail(problem, 1) if problem else 0


def fail(message: str, code: int) -> int:
    """Prints a line to stderr; returns the exit code."""
    print(f"bench.py: {message}", file=sys.stderr)
    return code


def groups_to_measure(args) -> list[list[tuple]]:
    """Lists of (name, class, batch) of the systems that take turns with each other.

    A group is training at one batch size, or decoding. Prints the systems that cannot
    run here.
    """
    possible = []
    for name in args.systems:
        if reason := why_left_out(name, args.quick):
            print(f"{name} is left out: {reason}")
        else:
            possible.append(name)
    groups = [
        [(name, TRAINED[name], batch) for name in possible if name in TRAINED]
        for batch in args.batches
    ]
    groups += [
        [(name, DECODING[name], batch) for name in possible if name in DECODING]
        for batch in (DECODED[:1] if args.quick else DECODED)
    ]
    return [group for group in groups if group]


def why_left_out(name: str, quick: bool) -> str:
    """Why a system cannot be measured here; empty if it can."""
    if name in PARALLEL and jax.device_count() == 1:
        return "it needs several devices"
    if name not in OURS:
        return ""
    if bench_torch is None:
        return "PyTorch is not installed (pip install torch)"
    return bench_torch.why_left_out(name, quick)


def measure(group: list[tuple], args, folder: Path) -> Iterator[list[dict]]:
    """Yields the rows of all systems of a group after each round."""
    systems = []
    if bench_torch:
        bench_torch.forget_compiled()
    for name, system, batch in group:
        for model in bench_pcagpt.models(args.size, name):
            print(f"preparing {name} {model} at batch {batch} ...", flush=True)
            start = time.perf_counter()
            systems.append(system(args.size, model, batch, folder))
            print(f"... took {time.perf_counter() - start:.1f} s", flush=True)
    rounds = [[] for _ in systems]
    for number in range(args.rounds):
        for system, turns in zip(systems, rounds, strict=True):
            if system.rests and jax.default_backend() == "gpu":
                time.sleep(args.rest)
            gc.collect()  # A collection within the turn would make the GPU wait.
            seconds = system.seconds_per_step(args.steps)
            turns.append((seconds, (gpu_state() or {}).get("clocks.sm")))
            print(
                f"round {number + 1} of {args.rounds}: {system.name} {system.model} at "
                f"batch {system.batch}: {1e3 * seconds:.2f} ms",
                flush=True,
            )
        yield [
            row(system, turns, args.steps)
            for system, turns in zip(systems, rounds, strict=True)
        ]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether JAX or PyTorch ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)


def release_memory() -> None:
    """Frees the memory of a finished group."""
    gc.collect()
    if bench_torch:
        bench_torch.release_memory()


def row(system, turns: list[tuple], steps: int) -> dict:
    """The figures of a system after turns of (seconds per step, GPU clock)."""
    seconds = [turn[0] for turn in turns]
    middle = statistics.median(seconds)
    rate = system.tokens_per_step / middle
    peak, flops = provenance.peak_flops(system.devices), system.flops_per_token
    return {
        "system": system.name,
        "model": system.model,
        "batch": system.batch,
        "devices": system.devices,
        "tokens_per_second": rate,
        "ms_per_step": 1e3 * middle,
        "rounds_ms": [1e3 * s for s in seconds],
        "rounds_clock": [turn[1] for turn in turns],
        "steps": steps,
        "tokens_per_step": system.tokens_per_step,
        "peak_bytes": system.peak_bytes,
        "flops_per_token": flops,
        "utilisation": flops * rate / peak if peak and flops else None,
        **system.details,
    }


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{name: `ratio`} of all rows to compare."""
    known = {(r["system"], r["model"], r["batch"]): r for r in rows}
    found = {}
    for (system, model, batch), r in known.items():
        variant = system in ("pcagpt-loop", *PARALLEL)
        full = known.get((system, "D", batch))
        if full and model != "D" and not variant:
            found[f"{system}, batch {batch}: {model} / D"] = ratio(r, full)
        base = known.get(("pcagpt", model, batch))
        if base and variant:
            found[f"{model}, batch {batch}: {system} / pcagpt"] = ratio(r, base)
        if ours := known.get((OURS.get(system), model, batch)):
            name = f"{model}, batch {batch}: {OURS[system]} / {system}"
            found[name] = ratio(ours, r)
    return found


def ratio(row: dict, base: dict) -> dict[str, float]:
    """Tokens per second and device of `row` divided by those of `base`.

    Median, minimum and maximum over the rounds.
    """
    share = row["tokens_per_step"] / row["devices"]
    share /= base["tokens_per_step"] / base["devices"]
    pairs = zip(row["rounds_ms"], base["rounds_ms"], strict=True)
    found = [share * base_ms / row_ms for row_ms, base_ms in pairs]
    return {"ratio": statistics.median(found), "least": min(found), "most": max(found)}


def table(rows: list[dict]) -> str:
    """Rows and ratios as text."""
    lines = [
        "",
        f"{'system':<20}{'model':>6}{'batch':>7}{'GPUs':>6}{'ms/step':>10}"
        f"{'least to most':>20}{'tokens/s':>12}{'of peak':>9}{'peak GB':>9}",
    ]
    for r in rows:
        share = "" if r["utilisation"] is None else f"{r['utilisation']:.1%}"
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        spread = f"{min(r['rounds_ms']):.2f} to {max(r['rounds_ms']):.2f}"
        lines.append(
            f"{r['system']:<20}{r['model']:>6}{r['batch']:>7}{r['devices']:>6}"
            f"{r['ms_per_step']:>10.2f}{spread:>20}{r['tokens_per_second']:>12,.0f}"
            f"{share:>9}{memory:>9}"
        )
    for r in rows:
        lines += departures(r)
    for name, r in ratios(rows).items():
        lines.append(f"{name}: {r['ratio']:.3f} ({r['least']:.3f} to {r['most']:.3f})")
    return "\n".join([*lines, ""])


def departures(row: dict) -> list[str]:
    """The turns of a row that depart from its median, one line each."""
    found = []
    turns = zip(row["rounds_ms"], row["rounds_clock"], strict=True)
    for number, (milliseconds, clock) in enumerate(turns, 1):
        share = milliseconds / row["ms_per_step"] - 1
        if abs(share) > DEPARTS:
            at = f", GPU clock {clock}" if clock else ""
            found.append(
                f"round {number} of {row['system']} {row['model']}, batch "
                f"{row['batch']}: {share:+.1%} from the median{at}"
            )
    return found


def report(rows: list[dict]) -> dict:
    """All figures, with their command, device, versions and commit."""
    return {
        "rows": rows,
        "ratios": ratios(rows),
        "command": command(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": provenance.device(max(r["devices"] for r in rows)),
        "gpu": gpu_state(),
        "host": platform.machine(),
        "versions": {**provenance.versions(), **peer_versions()},
        "git_commit": provenance.git_commit(),
    }


def command(words: list[str]) -> str:
    """This command line without --out."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    return shlex.join(
        ["python", "scripts/bench.py", *parser.parse_known_args(words)[1]]
    )


def peer_versions() -> dict[str, str]:
    """Versions of PyTorch and its packages, if installed."""
    found = {}
    for name in ("torch", "transformers", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and memory of the first visible GPU; None without nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
    fields += ",memory.total"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={visible}", f"--query-gpu={fields}"]
    try:
        output = subprocess.check_output(
            [*query, "--format=csv,noheader"], text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    values = output.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values, strict=True))


if __name__ == "__main__":
    sys.exit(main())
