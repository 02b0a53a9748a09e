"""Runs kernels on GPUs and interprets them on CPUs.

Pallas's Triton backend runs on NVIDIA GPUs, Ampere or newer.
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
PROGRAMS = 264  # two for each multiprocessor of an H100 keep it busy


def is_in_jax() -> bool:
    """Whether this version of JAX has the backend."""
    return triton is not None


def takes(capability: float) -> bool:
    """Whether a GPU of this compute capability runs the kernels of this package."""
    return is_in_jax() and capability >= LEAST_COMPUTE_CAPABILITY


def has_large_shared_memory() -> bool:
    """Whether a program can use 227 KB, as on Hopper, or 99 KB, as on Ada."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return str(capability).startswith(("9.", "10."))


def call(kernel: Callable, *, warps: int, stages: int = 1, **specs) -> Callable:
    """`pl.pallas_call` with `warps` per program and `stages` of loop pipelining."""
    if jax.default_backend() == "cpu":
        return pl.pallas_call(kernel, interpret=True, **specs)
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=parameters, **specs)


def power_of_2(count: int, at_most: int) -> int:
    """The largest power of 2 that divides `count` and is at most `at_most` (>= 1).

    The sizes of Triton's arrays must be powers of 2.
    """
    return math.gcd(count, 1 << (at_most.bit_length() - 1))


def store(reference, value: jax.Array, mask: jax.Array) -> None:
    """Writes only the elements of `value` that the mask selects."""
    if jax.default_backend() == "cpu":  # Triton may be missing.
        reference[...] = jnp.where(mask, value, reference[...])
    else:  # On a GPU, reading masked elements would race with other threads' writes.
        triton.store(reference, value, mask=mask)
