"""Measures how fast pcagpt trains and decodes, beside PyTorch on the same GPU.

    python scripts/bench.py --out bench.json
    python scripts/bench.py --quick
    python scripts/bench.py --profile --systems pcagpt
    python scripts/bench.py --systems pcagpt,data-parallel,fsdp --batches 32,64

GPT-2 small (D) and the same with a table of rank 128 (k128), in bfloat16, at 1,024
tokens a sequence. The systems take turns within a round, so that a GPU that slows down
does so for all, and a GPU rests before each turn, as it does while a training loop
begins: at its power limit a hot one is slower. Each figure is the median of the rounds,
each ratio that of the ratios within a round, with the least and the most.

  pcagpt         the compiled training step, on one batch
  pcagpt-loop    the training loop around it: data from disk, logging, and the stall of
                 a checkpoint, shared out over the steps between two; without compiling,
                 evaluating, and the first step after a pause
  data-parallel  the step on all GPUs that CUDA_VISIBLE_DEVICES shows, a batch on each
  fsdp           the same, parameters and moments split over them, too
  torch          a plain GPT-2
  transformers   Hugging Face's GPT-2
  decode         greedy generation of pcagpt's models with a key-value cache, at a batch
                 of 1 and of 64 (of 1 with --quick); its memory is weights and cache

Both peers run under torch.compile with flash attention, fused AdamW, clipping and
autocast, which keeps the residual stream in float32; pcagpt's is bfloat16. They need
`pip install torch transformers` and a GPU. Their peak memory is what PyTorch allocated,
pcagpt's what the compiled program needs. --quick measures pcagpt alone at the demo's
size, also on CPUs.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# PyTorch needs memory beside JAX; both before JAX is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pcagpt.main import prepare_process

if __name__ == "__main__":
    prepare_process()  # Before JAX is imported, which then keeps what it compiles.

import bench_pcagpt
import bench_report
import bench_torch
import jax

from pcagpt.errors import Interrupted

TRAINED = {
    "pcagpt": bench_pcagpt.Step,
    "pcagpt-loop": bench_pcagpt.Loop,
    "data-parallel": bench_pcagpt.DataParallel,
    "fsdp": bench_pcagpt.FullySharded,
    "torch": bench_torch.Plain,
    "transformers": bench_torch.Transformers,
}
SYSTEMS = (*TRAINED, "decode")
DECODED = (1, 64)  # sequences side by side
REST = 5  # seconds
MOST_REST = 3600


def arguments() -> argparse.Namespace:
    """What the command line asks for, with --quick's sizes where nothing else is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at the demo's size")
    parser.add_argument(
        "--systems",
        default=",".join(SYSTEMS),
        help="as in pcagpt,torch; all unless given, but for those that cannot run here",
    )
    parser.add_argument(
        "--batches",
        help="sequences a step, on each GPU, as in 32,64 (default 32; --quick 16)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all systems (3)")
    parser.add_argument(
        "--steps", type=int, help="of a system in a round (default 50; --quick 10)"
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=float(REST),
        help=f"seconds before the turn of a training step, on GPUs ({REST})",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print pcagpt's kernels by their time"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    asked = parser.parse_args()
    asked.size = bench_pcagpt.QUICK if asked.quick else bench_pcagpt.GPT2_SMALL
    names = [name.strip() for name in asked.systems.split(",")]
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        parser.error(
            f"no system is called {unknown[0] or '(nothing)'}: choose of "
            f"{', '.join(SYSTEMS)}"
        )
    asked.systems = tuple(dict.fromkeys(names))
    try:
        numbers = (asked.batches or str(asked.size.batch)).split(",")
        # The largest first: what it needs then serves the smaller ones.
        asked.batches = tuple(sorted(set(map(int, numbers)), reverse=True))
    except ValueError:
        parser.error(f"--batches is {asked.batches}: give whole numbers, as in 32,64")
    if asked.steps is None:
        asked.steps = 10 if asked.quick else 50
    if min(asked.rounds, *asked.batches) < 1 or asked.steps < bench_pcagpt.LEAST_RUN:
        parser.error(
            "--rounds and --batches are whole numbers from 1 on, --steps from "
            f"{bench_pcagpt.LEAST_RUN} on"
        )
    if not 0 <= asked.rest <= MOST_REST:
        parser.error(f"--rest is a number of seconds from 0 to {MOST_REST}")
    if asked.out:
        try:
            with open(asked.out, "a"):  # Now and not after minutes.
                pass
        except OSError as error:
            parser.error(f"--out {asked.out} cannot be written: {error.strerror}")
    return asked


def main() -> int:
    """Measures, prints a table, and writes it where --out says; the exit code."""
    asked = arguments()
    rows, failed, ending, code = [], [], "", 0
    groups = possible_groups(asked)
    if not groups:
        return say("none of the systems asked for can run here", 2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench_pcagpt.write_corpus(Path(folder), asked.size)
            for group in groups:
                finished = rows
                with told_if_out_of_memory(group, failed):
                    for found in measured(group, asked, Path(folder)):
                        rows = finished + found
                        write(rows, asked)
                release()
                print(bench_report.table(rows), flush=True)
            if asked.profile:
                for model in bench_pcagpt.models(asked.size):
                    batch = asked.batches[-1]
                    made = bench_pcagpt.Step(asked.size, model, batch, Path(folder))
                    print(bench_pcagpt.profile(made))
        except (KeyboardInterrupt, Interrupted):
            print(bench_report.table(rows))
            ending, code = "interrupted: these are the rounds until then", 1
    if asked.out and rows:
        print(f"written to {asked.out}")
    elif asked.out and not asked.out.stat().st_size:
        asked.out.unlink()
    if failed and not ending:
        ending, code = "not all that was asked for was measured", 1
    return say(ending, code) if ending else code


def say(message: str, code: int) -> int:
    """Prints a line to stderr; returns the exit code."""
    print(f"bench.py: {message}", file=sys.stderr)
    return code


def possible_groups(asked) -> list[list[tuple]]:
    """(name, maker, batch) of the systems that take turns, group by group.

    A group is a batch size of training, or decoding. Says which systems are left out.
    """
    possible = []
    for name in asked.systems:
        reason = ""
        if issubclass(TRAINED.get(name, object), bench_torch.Peer):
            why_not = bench_torch.why_not(name)
            reason = "--quick is without it" if asked.quick else why_not
        elif issubclass(TRAINED.get(name, object), bench_pcagpt.DataParallel):
            reason = "there is one device" if jax.device_count() == 1 else ""
        if reason:
            print(f"{name} is left out: {reason}")
        else:
            possible.append(name)
    groups = [
        [(name, TRAINED[name], batch) for name in possible if name in TRAINED]
        for batch in asked.batches
    ]
    if "decode" in possible:
        counts = DECODED[:1] if asked.quick else DECODED
        groups.append([("decode", bench_pcagpt.Decoding, count) for count in counts])
    return [group for group in groups if group]


def measured(group: list[tuple], asked, folder: Path) -> Iterator[list[dict]]:
    """After each round the rows of all systems of a group."""
    systems = []
    bench_torch.forget_compiled()
    for name, maker, batch in group:
        for model in bench_pcagpt.models(asked.size):
            print(f"preparing {name} {model} at batch {batch} ...", flush=True)
            systems.append(maker(asked.size, model, batch, folder))
    timings = [bench_report.Timing(system) for system in systems]
    gets_hot = jax.default_backend() == "gpu"
    for number in range(asked.rounds):
        for timing in timings:
            time.sleep(asked.rest if gets_hot and timing.system.rests else 0)
            gc.collect()  # Not within the turn, whose GPU would soon wait for it.
            timing.add(timing.system.seconds_per_step(asked.steps))
            print(
                f"round {number + 1} of {asked.rounds}: {timing.system.name} "
                f"{timing.system.model} at batch {timing.system.batch}: "
                f"{1e3 * timing.seconds[-1]:.2f} ms",
                flush=True,
            )
        yield [timing.row(asked.steps) for timing in timings]


@contextlib.contextmanager
def told_if_out_of_memory(group: list[tuple], failed: list) -> Iterator[None]:
    """Ends the group with a line, not everything with a traceback, and enters it."""
    try:
        yield
    except RuntimeError as error:  # The class of JAX's and PyTorch's own errors.
        if not ("RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)):
            raise
        names = ", ".join(f"{name} at batch {batch}" for name, _, batch in group)
        print(
            f"memory does not suffice for {names} side by side: give fewer --systems "
            "or smaller --batches"
        )
        failed.append(group)


def release() -> None:
    """Gives back the memory of a group that is done."""
    gc.collect()
    bench_torch.release()


def write(rows: list[dict], asked) -> None:
    """Writes what is known so far where --out says."""
    if asked.out:
        written = asked.out.with_name(asked.out.name + ".tmp")
        written.write_text(bench_report.as_json(rows), "utf-8")
        written.replace(asked.out)


if __name__ == "__main__":
    sys.exit(main())
