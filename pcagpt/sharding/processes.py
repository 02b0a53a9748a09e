"""The processes of one command: their start, their end, and what they agree on."""

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

from pcagpt.errors import Interrupted, UserError

LOST_SECONDS = 40  # A process without a sign of life for so long counts as ended.
LEAVE_SECONDS = 10.0  # the longest time that ending processes wait for each other


def start(
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


def leave() -> None:
    """Tells the other processes, which are also ending, that this one ends on purpose.

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


def wait_for_all(name: str) -> None:
    """Waits until every process has called this with the same name.

    All processes must call this.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# This process is the first one, and the others wait for what it decides.
_is_deciding = contextvars.ContextVar("_is_deciding", default=False)


def from_first(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first process, on every process.

    All processes must call this, and every function that calls it. Files may change
    while several processes look at them, and all must do the same. If `decide` raises
    an error, every process raises it.

    Only the first process runs `decide`. Within `decide`, a further call runs its own
    argument directly.
    """
    if jax.process_count() == 1 or _is_deciding.get():
        return decide()
    text, failure = b"", None
    if jax.process_index() == 0:
        before = _is_deciding.set(True)
        try:
            text = pickle.dumps({"value": decide()})
        except (Exception, Interrupted) as error:
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
