"""Sharding helpers used inside computations.

They read the mesh in use (`jax.set_mesh`), and do nothing without one. A batch is split
over all axes of the mesh.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec


def device_count() -> int:
    """Number of devices that an array may be split over: 1 inside `by_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def whole(array: jax.Array) -> jax.Array:
    """The array, replicated on every device; its gradient is replicated, too."""
    if device_count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


@jax.custom_vjp
def gathered(array: jax.Array) -> jax.Array:
    """The array, replicated on every device; its gradient may stay split.

    The devices exchange the array once, in its own dtype, however often it is used.
    """
    if device_count() == 1:
        return array
    # If the array was cast, XLA would gather it before the cast, in the larger dtype.
    return whole(jax.lax.optimization_barrier(array))


gathered.defvjp(lambda array: (gathered(array), None), lambda _, gradient: (gradient,))


def by_device(
    function: Callable, split: Sequence[bool], split_results: Sequence[bool]
) -> Callable:
    """The function, run on each device with that device's rows of the arrays.

    Args:
      function: takes arrays or trees of arrays, returns a tuple of the same.
      split: for each argument, whether its leading axis is split over the devices.
      split_results: for each result, whether its leading axis is split; otherwise the
        result is a sum over rows, and the devices' sums are added up.
    """
    if device_count() == 1:
        return function
    axes = jax.sharding.get_abstract_mesh().axis_names

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
