"""The mesh of devices, and the sharding of each array.

The mesh has two axes. Both split the batch. 'fsdp' also splits the rows of every
parameter matrix and of its optimizer moments.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pcagpt import trees
from pcagpt.errors import UserError

BATCH_AXES = ("data", "fsdp")

# Switched off:
# - A pass that copies all gradients into one array before their sum over devices, and
#   back afterwards. Without it, XLA sums them in place.
# - Searches for faster kernels, which made steps no faster and take up to 80 s.
COMPILER_OPTIONS = {
    "xla_disable_hlo_passes": "all-reduce-contiguous",
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}

# The first pattern that matches the whole path applies. The path of an optimizer state
# ends in the path of its parameter. Rows are split, not columns, because gathering rows
# needs no transpose.
PARTITION_RULES = (
    (r"(.*/)?(wte|wpe|scale_up|scale_down|kernel)", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of data * fsdp devices; data = -1 uses all devices.

    Raises UserError if there are too few devices, or if some would stay unused although
    data is -1 or there are several processes.
    """
    devices, asked = jax.devices(), data
    data_is_open = data == -1
    if data_is_open:
        data = len(devices) // fsdp
    used = data * fsdp
    must_use_all = jax.process_count() > 1 or data_is_open
    if data < 1 or used > len(devices) or (must_use_all and used < len(devices)):
        count = len(devices)
        there = "one device: leave both out"
        if count > 1:
            there = f"{count} devices: leave mesh.data at -1 and let mesh.fsdp divide "
            there += f"{count}"
        raise UserError(
            f"mesh.data = {asked} with mesh.fsdp = {fsdp} does not fit the {there}"
        )
    # With Explicit axes, a lookup of rows by sharded token ids raises an error.
    return jax.make_mesh(
        (data, fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[:used],
    )


def check_divisible(name: str, size: int, mesh: Mesh) -> None:
    """Raises UserError if a batch of that size cannot be split over the mesh."""
    if size % mesh.size:
        raise UserError(
            f"{name} = {size} cannot be split over {mesh.size} devices: make it a "
            f"multiple of {mesh.size}"
        )


def check_splits(n_embd: int, mesh: Mesh) -> None:
    """Raises UserError if 'fsdp' cannot split matrices with n_embd rows evenly."""
    if n_embd % mesh.shape["fsdp"]:
        raise UserError(
            f"mesh.fsdp = {mesh.shape['fsdp']} does not divide model.n_embd = "
            f"{n_embd}: every device would hold whole matrices"
        )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (array or ShapeDtypeStruct) by its path.

    A matrix is replicated if 'fsdp' does not divide its number of rows, as in some
    bands.
    """

    def place(leaf, spec):
        fits = leaf.ndim == 2 and leaf.shape[0] % mesh.shape["fsdp"] == 0
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    return jax.tree.map(place, tree, trees.label(tree, PARTITION_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def part_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits axis 1 of [parts, batch, ...] over all devices."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def put_batch(batch: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a host array on the devices; every process must give the same array."""
    return jax.make_array_from_callback(
        batch.shape, sharding, lambda index: batch[index]
    )


def map_batches(
    function: Callable, batches: Iterable[Sequence[np.ndarray]], mesh: Mesh
) -> Iterator[tuple[Sequence[np.ndarray], Any]]:
    """Yields (batch, function(*batch) as host arrays) for batches of host arrays.

    The function gets each array of a batch split over the mesh. Its results are fetched
    one batch late, so that the devices never wait for the host.
    """
    sharding = batch_sharding(mesh)
    started = (
        (batch, function(*(put_batch(array, sharding) for array in batch)))
        for batch in batches
    )
    # `pairwise` starts the next batch before it gives this one.
    for (batch, result), _ in itertools.pairwise(itertools.chain(started, [None])):
        yield batch, jax.tree.map(np.asarray, result)


def jit(function: Callable, mesh: Mesh) -> Callable:
    """`jax.jit` with replicated results; the mesh is set for `inside`."""
    jitted = jax.jit(
        function, out_shardings=replicated(mesh), compiler_options=COMPILER_OPTIONS
    )

    @functools.wraps(function)
    def on_mesh(*arguments):
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    return on_mesh
