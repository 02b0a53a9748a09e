"""Reads the arrays of one checkpoint in this process, without the others."""

import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from pcagpt.array_files import check_size
from pcagpt.errors import OF_NO_FILE, UserError
from pcagpt.files import refuse_odd
from pcagpt.run import foreign


def alone() -> ocp.options.MultiprocessingOptions:
    """Orbax options for work that this process does without the others."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )


def _local_checkpointer() -> ocp.Checkpointer:
    """A checkpointer that reads in this process alone."""
    options = alone()
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        multiprocessing_options=options,
    )


def read_weights(folder: Path) -> dict:
    """{'params', 'constants'} of a checkpoint's folder: nested dicts of host arrays.

    Nothing compares them with their digests. Damage can raise any error. UserError if
    they are larger than their files, or lack params.
    """
    if foreign.is_model(folder):
        return foreign.read_weights(folder)
    folder = folder.absolute() / "weights"
    below = [*folder.rglob("*")]
    for path in below:
        if not path.is_dir():
            refuse_odd(path)
            path.open("rb").close()  # Orbax takes what the system refuses for damage.
    with _local_checkpointer() as checkpointer:
        described = checkpointer.metadata(folder).item_metadata
        if described is None:
            raise UserError(f"{folder} lacks files, or they are damaged")
        saved = described.tree
        declared = sum(
            leaf.dtype.itemsize * math.prod(leaf.shape)
            for leaf in jax.tree.leaves(saved)
        )
        stored = sum(path.stat().st_size for path in below)
        check_size(folder, declared, stored)
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
        )
        weights = checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
    if not isinstance(weights.get("params"), dict):
        raise UserError(f"{folder} holds no params")
    return weights


def read_updates(folder: Path) -> int | None:
    """The number of updates stored in a checkpoint's folder; None with weights alone.

    If it cannot be read, the number in the folder's name; `restore_latest` judges it.
    """
    folder = folder.absolute()
    if foreign.is_model(folder):
        return None
    if not any((folder / item).is_dir() for item in ("optimizer", "meta")):
        return None
    options = {"step": ocp.RestoreArgs(restore_type=np.ndarray)}
    try:
        with _local_checkpointer() as checkpointer:
            wanted = ocp.args.PyTreeRestore(
                item={"step": 0}, restore_args=options, partial_restore=True
            )
            stored = checkpointer.restore(folder / "optimizer", args=wanted)
            return int(stored["step"])
    except OF_NO_FILE:
        raise
    # Orbax and what it calls raise errors of many types.
    except Exception:
        return int(folder.name)
