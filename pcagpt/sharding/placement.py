"""Processes, the mesh of devices, and the sharding of each array.

The mesh has two axes. Both split the batch. 'fsdp' also splits the rows of every
parameter matrix and of its optimizer moments.
"""

import contextvars
import functools
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pcagpt import trees
from pcagpt.errors import UserError

LOST_SECONDS = 40  # A process without a sign of life for so long counts as ended.
LEAVE_SECONDS = 10.0  # the longest time that ending processes wait for each other
BATCH_AXES = ("data", "fsdp")

# This pass copies all gradients into one array before their sum over devices, and back
# after it. Without the pass, XLA sums them in place.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "all-reduce-contiguous"}

# The first pattern that matches the whole path applies. The path of an optimizer state
# ends in the path of its parameter. Rows are split, not columns, because gathering rows
# needs no transpose.
PARTITION_RULES = (
    (r"(.*/)?(wte|wpe|scale_up|scale_down|kernel)", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)


def start_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes; with None, JAX asks the cluster (Slurm, ...)."""
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"distributed start failed ({error}): outside Slurm and similar clusters, "
            "give distributed.coordinator_address=HOST:PORT, .num_processes and "
            ".process_id"
        ) from None


def leave_processes() -> None:
    """Tells the other processes, which also end, that this one ends.

    Without this call, they take it for dead and end with an error of their own.
    """
    if jax.process_count() == 1:
        return
    # Without a limit, waiting for a process that got no signal takes minutes.
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)


def lost_process(error: Exception) -> str | None:
    """JAX's text about the end of another process; None for any other error."""
    if jax.process_count() == 1:
        return None
    told = re.search(r"(Gloo|NCCL|\S*[Bb]arrier|UNAVAILABLE|DEADLINE).*", str(error))
    return re.sub(r"\[\S+\.cc:\d+\] ", "", told[0]) if told else None


@functools.cache
def open_devices() -> None:
    """Starts JAX's devices; UserError if the environment asks for missing devices."""
    _check_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises either.
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS='{asked}'"
            f"{f' ({reason})' if reason else ''}: unset JAX_PLATFORMS to use the "
            "devices that exist, or install the package of that platform"
        ) from None


@functools.cache
def _check_flags(flags: str) -> None:
    """Raises UserError for XLA_FLAGS that XLA does not know."""
    if not flags:
        return
    # XLA ends the process if it does not know a flag, so another process tries them.
    script = "from jaxlib import xla_client; xla_client.CompileOptions()"
    tried = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    if tried.returncode and (told := re.search(r"\] (.*XLA_FLAGS.*)", tried.stderr)):
        raise UserError(f"XLA_FLAGS is '{flags}': {told[1]}; correct or unset it")


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of data * fsdp devices; data = -1 uses all devices.

    Raises UserError if there are too few devices. It also does so if some stay unused
    and data is -1 or there are several processes.
    """
    devices = jax.devices()
    data_is_open = data == -1
    if data_is_open:
        data = len(devices) // fsdp
    used = data * fsdp
    must_use_all = jax.process_count() > 1 or data_is_open
    if data < 1 or used > len(devices) or (must_use_all and used < len(devices)):
        raise UserError(
            f"mesh.data = {data} times mesh.fsdp = {fsdp} does not fit the "
            f"{len(devices)} devices: leave mesh.data at -1 and let mesh.fsdp divide "
            f"{len(devices)}"
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


def jit(function: Callable, mesh: Mesh) -> Callable:
    """`jax.jit` with replicated results; the mesh is set for `inside`."""
    jitted = jax.jit(function, out_shardings=replicated(mesh))

    @functools.wraps(function)
    def on_mesh(*arguments):
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    return on_mesh


def wait_for_all(name: str) -> None:
    """Waits until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# This process is the first one, and the others wait for what it decides.
_is_deciding = contextvars.ContextVar("_is_deciding", default=False)


def from_first(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first process, on every process.

    Files may change while several processes look at them, and all must do the same. If
    `decide` raises an error, every process raises it.

    Within `decide`, this function only calls its argument.
    """
    if jax.process_count() == 1 or _is_deciding.get():
        return decide()
    text, failure = b"", None
    if jax.process_index() == 0:
        before = _is_deciding.set(True)
        try:
            text = pickle.dumps({"value": decide()})
        except Exception as error:
            text, failure = pickle.dumps({"error": error}), error
        finally:
            _is_deciding.reset(before)
    text = np.frombuffer(text, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    if failure:
        raise failure
    answer = pickle.loads(np.asarray(text, np.uint8).tobytes())
    if "error" in answer:
        raise answer["error"]
    return answer["value"]
