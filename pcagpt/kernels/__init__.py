"""Pallas kernels for NVIDIA GPUs; their callers also have a plain form of each in JAX.

`model.kernels` chooses the backend of Pallas. 'mosaic' is the one that stays. It has
kernels for Hopper and newer GPUs; where it has none, Triton's kernel is used as long as
JAX has that backend. A CPU interprets the kernels. That is slow, and only tests do it.
"""

import jax

from pcagpt.kernels.mosaic import launch as mosaic
from pcagpt.kernels.triton import launch as triton

CHOICES = ("mosaic", "triton", "xla")  # the fastest first
NEEDS = {
    "mosaic": "its kernels need an NVIDIA GPU, Hopper or newer",
    "triton": "its kernels need an NVIDIA GPU, Ampere or newer, and a JAX that still "
    "has this backend of Pallas",
}


def that_run_on(device: jax.Device) -> tuple[str, ...]:
    """Those of `CHOICES` that this device can run."""
    capability = getattr(device, "compute_capability", None)
    try:
        capability = float(capability)
    except (TypeError, ValueError):  # Not an NVIDIA device.
        return ("xla",)
    takes = {"mosaic": mosaic.takes, "triton": triton.takes, "xla": lambda _: True}
    return tuple(name for name in CHOICES if takes[name](capability))


def use_triton(kernels: str) -> bool:
    """Whether Triton's kernel is used where the backend `kernels` has none."""
    return kernels == "triton" or (kernels == "mosaic" and triton.is_in_jax())
