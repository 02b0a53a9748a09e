"""Starts kernels on GPUs and interprets them on CPUs.

Pallas's Triton backend runs on every NVIDIA GPU since Ampere. JAX has announced its
end: without it, model.kernels=auto takes the plain forms.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

LEAST_COMPUTE_CAPABILITY = 8.0  # the first with bfloat16
PROGRAMS = 264  # enough to keep a GPU busy: two for each multiprocessor of an H100


def are_available(device: jax.Device) -> bool:
    """Whether this device can run the kernels compiled."""
    capability = getattr(device, "compute_capability", None)
    try:
        is_recent = float(capability) >= LEAST_COMPUTE_CAPABILITY
    except (TypeError, ValueError):  # Not an NVIDIA device.
        return False
    return triton is not None and is_recent


def call(kernel: Callable, *, warps: int, stages: int = 1, **specs) -> Callable:
    """`pl.pallas_call` with `warps` per program and `stages` of loop pipelining."""
    if jax.default_backend() == "cpu":
        return pl.pallas_call(kernel, interpret=True, **specs)
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=parameters, **specs)


def power_of_2(count: int, at_most: int) -> int:
    """The largest power of 2 that divides `count` and is no more than `at_most` >= 1.

    Triton's arrays have sizes that are powers of 2.
    """
    return math.gcd(count, 1 << (at_most.bit_length() - 1))


def store(reference, value: jax.Array, mask: jax.Array) -> None:
    """Writes only the elements of `value` that the mask selects."""
    if jax.default_backend() == "cpu":  # Triton may be missing there.
        reference[...] = jnp.where(mask, value, reference[...])
    else:  # Reading back what is masked would race with another thread's write.
        triton.store(reference, value, mask=mask)
