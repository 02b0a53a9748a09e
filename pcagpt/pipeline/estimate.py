"""How much work a command has, and roughly how long it will take."""

import os

import jax

from pcagpt.run import provenance

# Share of a GPU's peak, and FLOP/s of one CPU core, that the training step reaches:
# measured with GPT-2 small on an H100, and with the demo on two cores.
SHARE_OF_PEAK, CORE_FLOPS = 0.4, 4e10


def time_of(flops: float) -> str | None:
    """'roughly 3 minutes on 1 x cpu'; None if the devices' speed is not known."""
    count = jax.device_count()
    if jax.default_backend() == "cpu":  # Its devices share the cores.
        # The cores that this process may use; macOS does not tell.
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        speed = CORE_FLOPS * cores
    else:
        speed = SHARE_OF_PEAK * (provenance.peak_flops(count) or 0)
    if not speed:
        return None
    minutes = flops / speed / 60
    if minutes < 1.5:
        amount = "a minute"
    elif minutes < 90:
        amount = f"{minutes:.0f} minutes"
    else:
        amount = f"{minutes / 60:.0f} hours"
    return f"roughly {amount} on {provenance.device(count)}"


def of_training(runs: int, flops: float) -> str:
    """'3 runs to train: roughly 4 minutes on 1 x cpu, without evaluations'."""
    line = f"{runs} {'run' if runs == 1 else 'runs'} to train"
    time = time_of(flops)
    return f"{line}: {time}, without evaluations" if time else line
