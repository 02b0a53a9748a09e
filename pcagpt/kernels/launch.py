"""How kernels are started, and interpreted on CPUs.

Pallas's Triton backend runs on every NVIDIA GPU since Ampere. JAX has announced its
end: where it is missing, model.kernels=auto leaves everything in its plain form.
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
PROGRAMS = 264  # that keep a GPU busy: two for each multiprocessor of an H100


def are_available(device: jax.Device) -> bool:
    """Whether this device runs the kernels, and not by interpreting them."""
    capability = getattr(device, "compute_capability", None)
    try:
        is_recent = float(capability) >= LEAST_COMPUTE_CAPABILITY
    except (TypeError, ValueError):  # Not NVIDIA's.
        return False
    return triton is not None and is_recent


def call(kernel: Callable, *, warps: int, stages: int = 1, **specs) -> Callable:
    """`pl.pallas_call` with so many warps a program and stages a pipelined loop."""
    if jax.default_backend() == "cpu":
        return pl.pallas_call(kernel, interpret=True, **specs)
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=parameters, **specs)


def power_of_2(count: int, at_most: int) -> int:
    """The largest that divides a count and is not above a bound of at least 1."""
    return math.gcd(count, 1 << (at_most.bit_length() - 1))


def store(reference, value: jax.Array, mask: jax.Array) -> None:
    """Writes the elements of the mask alone."""
    if jax.default_backend() == "cpu":  # Where Triton may be missing.
        reference[...] = jnp.where(mask, value, reference[...])
    else:  # No thread writes what another may have written.
        triton.store(reference, value, mask=mask)
