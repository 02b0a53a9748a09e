"""Sharding helpers used inside computations.

They read the mesh in use (`jax.set_mesh`) and do nothing without one. A batch is split
over all axes of the mesh.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec


def device_count() -> int:
    """Number of devices that an array may be split over; 1 inside `by_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def whole(array: jax.Array) -> jax.Array:
    """The array, replicated on every device; so is its gradient."""
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
    # Without the barrier, XLA would move the cast of an array after the gathering, and
    # so gather it in the larger dtype.
    return whole(jax.lax.optimization_barrier(array))


# The gradient passes unchanged, because the transpose of `whole` would replicate it.
gathered.defvjp(lambda array: (gathered(array), None), lambda _, gradient: (gradient,))


def by_device(split: Sequence[bool], split_results: Sequence[bool]) -> Callable:
    """Decorates a function to run on each device with that device's rows of the arrays.

    XLA cannot partition kernels, and it partitions some other computations badly. The
    function takes arrays or trees of arrays and returns a tuple of such; its keyword
    arguments are static.

    Args:
      split: for each argument, whether its leading axis is split over the devices.
      split_results: for each result, whether its leading axis is split. Otherwise the
        result is a sum over rows, and the devices' sums are added up.
    """

    def place(is_split, axes):
        return PartitionSpec(axes) if is_split else PartitionSpec()

    def decorate(function):
        @functools.wraps(function)
        def on_devices(*arrays, **static):
            if device_count() == 1:
                return function(*arrays, **static)
            axes = jax.sharding.get_abstract_mesh().axis_names

            def of_own_rows(*arrays):
                results = function(*arrays, **static)
                return tuple(
                    result if is_split else jax.lax.psum(result, axes)
                    for result, is_split in zip(results, split_results, strict=True)
                )

            return jax.shard_map(
                of_own_rows,
                in_specs=tuple(place(is_split, axes) for is_split in split),
                out_specs=tuple(place(is_split, axes) for is_split in split_results),
                check_vma=False,
            )(*arrays)

        return on_devices

    return decorate
