"""How kernels are started: interpreted on CPUs, on the rows of each device on several.

Pallas's Triton backend runs on every NVIDIA GPU since Ampere. JAX has announced its
end: where it is missing, model.kernels=auto leaves everything in its plain form.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

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


def device_count() -> int:
    """Of the mesh in use, 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def by_device(
    function: Callable, split: Sequence[bool], split_results: Sequence[bool]
) -> Callable:
    """The function, run on each device of the mesh in use with its rows of arrays.

    Rows lie over all axes of the mesh, as those of a batch do.

    Args:
      function: of arrays, to a tuple of arrays.
      split: for each argument whether its leading axis lies over the devices.
      split_results: for each result whether it does, or is a sum over rows, which is
        then added up over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if device_count() == 1:
        return function
    axes = mesh.axis_names

    @functools.wraps(function)
    def of_own_rows(*arrays):
        return tuple(
            result if is_split else jax.lax.psum(result, axes)
            for result, is_split in zip(function(*arrays), split_results, strict=True)
        )

    def place(is_split):
        return PartitionSpec(axes) if is_split else PartitionSpec()

    return jax.shard_map(
        of_own_rows,
        in_specs=tuple(map(place, split)),
        out_specs=tuple(map(place, split_results)),
        check_vma=False,
    )
