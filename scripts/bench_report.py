"""What scripts/bench.py makes of its timings: rows, ratios, a table, JSON."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys

import bench_torch

from pcagpt.run import provenance

PEERS = ("torch", "transformers")  # held against pcagpt's step
VARIANTS = ("pcagpt-loop", "data-parallel", "fsdp")  # and these against it


class Timing:
    """One system's rounds."""

    def __init__(self, system):
        self.system, self.seconds, self.clocks = system, [], []

    def add(self, seconds: float) -> None:
        """Takes in a round's seconds a step, and the GPU's clock right after it."""
        self.seconds.append(seconds)
        self.clocks.append((gpu_state() or {}).get("clocks.sm"))

    def row(self, steps: int) -> dict:
        """What is known of the system, after rounds of so many steps."""
        system, middle = self.system, statistics.median(self.seconds)
        rate = system.tokens_per_step / middle
        peak = provenance.peak_flops(system.devices)
        flops = system.flops_per_token
        return {
            "system": system.name,
            "model": system.model,
            "batch": system.batch,
            "devices": system.devices,
            "tokens_per_second": rate,
            "ms_per_step": 1e3 * middle,
            "rounds_ms": [1e3 * s for s in self.seconds],
            "rounds_clock": self.clocks,
            "steps": steps,
            "tokens_per_step": system.tokens_per_step,
            "peak_bytes": system.peak_bytes,
            "flops_per_token": flops,
            "utilisation": flops * rate / peak if peak and flops else None,
            **system.details,
        }


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Tokens per second and device of one row over those of another.

    Of two rows that took turns the rounds are compared one by one: ratio is the median,
    least and most are the extremes.
    """
    known = {(r["system"], r["model"], r["batch"]): r for r in rows}
    found = {}
    for (system, model, batch), row in known.items():
        base = known.get((system, "D", batch))
        if model != "D" and base and system not in VARIANTS:
            found[f"{system}, batch {batch}: {model} / D"] = _ratio(row, base)
        ours = known.get(("pcagpt", model, batch))
        if ours and system in PEERS:
            name = f"{model}, batch {batch}: pcagpt / {system}"
            found[name] = _ratio(ours, row)
        elif ours and system in VARIANTS:
            name = f"{model}, batch {batch}: {system} / pcagpt"
            found[name] = _ratio(row, ours)
    return found


def _ratio(row: dict, base: dict) -> dict[str, float]:
    share = row["tokens_per_step"] / row["devices"]
    share /= base["tokens_per_step"] / base["devices"]
    pairs = zip(row["rounds_ms"], base["rounds_ms"], strict=True)
    of_rounds = [share * of_base / of_row for of_row, of_base in pairs]
    return {
        "ratio": statistics.median(of_rounds),
        "least": min(of_rounds),
        "most": max(of_rounds),
    }


def table(rows: list[dict]) -> str:
    """The rows and their ratios, for people."""
    lines = [
        f"{'system':<14}{'model':>6}{'batch':>7}{'GPUs':>6}{'ms/step':>10}"
        f"{'least to most':>20}{'tokens/s':>12}{'of peak':>9}{'peak GB':>9}"
    ]
    for r in rows:
        share = "" if r["utilisation"] is None else f"{r['utilisation']:.1%}"
        size = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        spread = f"{min(r['rounds_ms']):.2f} to {max(r['rounds_ms']):.2f}"
        lines.append(
            f"{r['system']:<14}{r['model']:>6}{r['batch']:>7}{r['devices']:>6}"
            f"{r['ms_per_step']:>10.2f}{spread:>20}{r['tokens_per_second']:>12,.0f}"
            f"{share:>9}{size:>9}"
        )
    lines += [
        f"{name}: {r['ratio']:.3f} ({r['least']:.3f} to {r['most']:.3f})"
        for name, r in ratios(rows).items()
    ]
    return "\n".join(["", *lines, ""])


def command(words: list[str]) -> str:
    """What measured this, without the file that it wrote."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    _, kept = parser.parse_known_args(words)
    return shlex.join(["python", "scripts/bench.py", *kept])


def as_json(rows: list[dict]) -> str:
    """All of it, with what the figures depend on."""
    return json.dumps(
        {
            "rows": rows,
            "ratios": ratios(rows),
            "command": command(sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": provenance.device(max(row["devices"] for row in rows)),
            "gpu": gpu_state(),
            "host": platform.machine(),
            "versions": {**provenance.versions(), **bench_torch.versions()},
            "git_commit": provenance.git_commit(),
        },
        indent=2,
    )


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and memory as the driver tells them; None without a GPU.

    Of the first GPU that CUDA_VISIBLE_DEVICES shows.
    """
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
    fields += ",memory.total"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={shown}", f"--query-gpu={fields}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values, strict=True))
