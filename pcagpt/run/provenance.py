"""Provenance of results: versions, commit, device and its peak speed."""

import itertools
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import pcagpt
from pcagpt.rows import Provenance

# Dense bfloat16 FLOP/s by the start of the device's name, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}

# Of sessions of earlier versions, which did not record it.
UNKNOWN = Provenance(
    device="unknown", versions={"pcagpt": "unknown"}, git_commit="unknown"
)


def summary(device_count: int, packages: tuple[str, ...] = ()) -> Provenance:
    """The provenance of a result on `device_count` devices."""
    return {
        "device": device(device_count),
        "versions": versions(packages),
        "git_commit": git_commit(),
    }


def joined(makers: Iterable[Mapping[str, Any]]) -> Provenance:
    """The provenance of what several commands made, in their order.

    Each maker may hold a `Provenance`, also a joined one, and other fields. What one
    lacks and another has is 'unknown'. Makers without provenance are left out.
    """
    fields = Provenance.__annotations__
    made_by = [maker for maker in makers if any(map(maker.get, fields))]
    versions = [maker.get("versions") or {} for maker in made_by]
    return {
        "device": distinct(maker.get("device") for maker in made_by),
        "versions": {
            name: distinct(known.get(name) for known in versions)
            for name in dict.fromkeys(itertools.chain(*versions))
        },
        "git_commit": distinct(maker.get("git_commit") for maker in made_by),
    }


def distinct(values: Iterable[str | None]) -> str | None:
    """The distinct parts of values as in 'A, B', joined; None if all are empty.

    Otherwise, an empty one is 'unknown'.
    """
    if not any(known := list(values)):
        return None
    parts = (part for value in known for part in (value or "unknown").split(", "))
    return ", ".join(dict.fromkeys(parts))


def versions(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python, pcagpt, its numerical packages and the other `packages`."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
    own = {"python": platform.python_version(), "pcagpt": pcagpt.__version__}
    return own | {name: metadata.version(name) for name in (*names, *packages)}


def git_commit() -> str | None:
    """Hash of the commit, with '-dirty' if tracked files differ; None if unknown.

    The environment variable PCAGPT_COMMIT takes precedence. It serves copies without
    git, as in a container.
    """
    if told := os.environ.get("PCAGPT_COMMIT"):
        return told
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name):
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass
    return None


def device(count: int) -> str:
    """Number and kind of devices, as in '8 x NVIDIA H100 80GB HBM3'."""
    return f"{count} x {jax.devices()[0].device_kind}"


def peak_flops(count: int) -> float | None:
    """Peak bfloat16 FLOP/s of `count` devices, or None if it is not known."""
    kind = jax.devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if re.match(rf"{name}\b", kind):
            return flops * count
    return None


def device_peak_bytes() -> int | None:
    """Peak memory of this process on its first device, in bytes; None on CPUs."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
