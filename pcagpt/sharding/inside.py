"""Which device of a mesh has what while it computes, and works on rows of its own.

The mesh is the one in use (`jax.set_mesh`); a batch lies over all of its axes.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec


def device_count() -> int:
    """Of the mesh in use; 1 where there is none, and within `by_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def whole(array: jax.Array) -> jax.Array:
    """The array, of which each device of the mesh in use has all, as of its gradient.

    Without a mesh, and within `by_device`, each has it anyway.
    """
    if device_count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


@jax.custom_vjp
def gathered(array: jax.Array) -> jax.Array:
    """`whole`, of an array that is split; XLA may split its gradient, too.

    It travels once, however often the result is used, and in the dtype that it has.
    """
    if device_count() == 1:
        return array
    # The barrier keeps XLA from gathering what the array was cast from instead.
    return whole(jax.lax.optimization_barrier(array))


gathered.defvjp(lambda array: (gathered(array), None), lambda _, gradient: (gradient,))


def by_device(
    function: Callable, split: Sequence[bool], split_results: Sequence[bool]
) -> Callable:
    """The function, run on each device with its own rows of arrays.

    Args:
      function: of arrays or trees of them, to a tuple of such.
      split: for each argument whether its leading axis lies over the devices.
      split_results: for each result whether it does, or is a sum over rows, which is
        then added up over the devices.
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
