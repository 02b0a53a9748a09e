"""How much work a command has, and roughly how long it will take."""

import math
import os

import jax

from pcagpt.config.schema import ModelSettings
from pcagpt.run import provenance

# Share of a GPU's peak, and FLOP/s of one CPU core, that the training step reaches:
# measured with GPT-2 small on an H100, and with the demo on two cores.
SHARE_OF_PEAK, CORE_FLOPS = 0.4, 4e10
# The share when a model is measured in float32: SmolLM2-135M on an H200.
SHARE_WHEN_MEASURED = 0.006
# To make a smaller table, mean of all methods: for each of its numbers, and to compile.
SECONDS_PER_NUMBER, SECONDS_PER_TABLE = 0.5e-6, 2.0


def speed_of(devices: int, share_of_peak: float = SHARE_OF_PEAK) -> float | None:
    """FLOP/s of so many devices, or None if it is not known."""
    if jax.default_backend() == "cpu":  # Its devices share the cores.
        # The cores that this process may use; macOS does not tell.
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        return CORE_FLOPS * cores
    peak = provenance.peak_flops(devices)
    return peak and share_of_peak * peak


def duration(seconds: float) -> str:
    """'a minute', '12 minutes' or '2 hours'."""
    minutes = seconds / 60
    if minutes < 1.5:
        return "a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def time_of(flops: float, devices: int) -> str | None:
    """'roughly 3 minutes on 1 x cpu'; None if the devices' speed is not known."""
    speed = speed_of(devices)
    if speed is None:
        return None
    return f"roughly {duration(flops / speed)} on {provenance.device(devices)}"


def of_training(runs: int, flops: float, devices: int) -> str:
    """'3 runs to train: roughly 4 minutes on 1 x cpu, without evaluations'."""
    line = f"{runs} {'run' if runs == 1 else 'runs'} to train"
    time = time_of(flops, devices)
    return f"{line}: {time}, without evaluations" if time else line


def of_sweep(
    tables: int,
    shape: tuple[int, int],
    model: ModelSettings,
    calibration_tokens: int,
    measured_tokens: int,
    platform: str,
    devices: int,
) -> str | None:
    """'roughly 15 minutes on 1 x cpu', to make and measure tables for a model.

    It counts the blocks of another architecture as those of a GPT-2 of the same width
    and depth.

    Args:
      tables: how many.
      shape: [V, D] of the model's own table.
      model: its width and depth.
      calibration_tokens: for the statistics.
      measured_tokens: to measure each table on; 0: unknown, so the text says what a
        million tokens take.
      platform: measures the model. None is returned if it is not the one that makes
        the tables, because the speed of its devices is not known.
      devices: how many measure the model.
    """
    speed = speed_of(devices, SHARE_WHEN_MEASURED)
    if speed is None or (platform == "cpu") != (jax.default_backend() == "cpu"):
        return None
    numbers, blocks = math.prod(shape), 12 * model.n_layer * model.n_embd**2
    # Forward and backward pass; one forward pass with the heads of both tables.
    calibration = calibration_tokens * 6 * (blocks + numbers) / speed
    making = tables * (SECONDS_PER_TABLE + SECONDS_PER_NUMBER * numbers)
    per_token = tables * 2 * (blocks + 2 * numbers) / speed
    time = duration(calibration + making + measured_tokens * per_token)
    line = f"roughly {time} on {provenance.device(devices)}"
    if measured_tokens:
        return line
    return f"{line}, plus {duration(1e6 * per_token)} per million tokens of the split"


def of_tables(tables: int, shape: tuple[int, int]) -> str:
    """'roughly 3 minutes', to make tables [V, D] without measuring a loss."""
    each = SECONDS_PER_TABLE + SECONDS_PER_NUMBER * math.prod(shape)
    return f"roughly {duration(tables * each)}"
