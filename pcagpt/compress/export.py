"""Writes a model with a compressed table as a run folder of its own."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import trees
from pcagpt.compress.original import Original
from pcagpt.factorize import FactorizedTable
from pcagpt.factorize.factor_files import write_bands
from pcagpt.run import checkpoint, initialise
from pcagpt.run.folder import read_record, write_record


def write_model(
    folder: Path, original: Original, table: FactorizedTable, origin: dict[str, Any]
) -> None:
    """Writes the model with another table: config.json, ckpt/0 and factors/.

    Every command takes the folder as a run. A folder that already holds this model
    stays unchanged, because other runs may have started from it. `origin` describes how
    the table was made: JSON values for 'compressed' in config.json.
    """
    run = original.run
    made = {
        "run": str(run.folder),
        "step": run.step,
        "fingerprint": run.fingerprint,
        **origin,
        "table_sha256": _sha256(table),
    }
    earlier = (read_record(folder) or {}).get("compressed") or {}
    if {**earlier, "run": made["run"]} == made:  # The run may have moved.
        return
    (folder / "config.json").unlink(missing_ok=True)  # It is written last.
    checkpoint.save_weights(folder, _variables_with(original, table))
    write_bands(folder / "factors", table)
    is_banded = len(table.bands) > 1
    model = {
        "n_embd_wte": None if is_banded else table.ranks[0] or None,
        "n_embd_wte_scale_tying": True,
        "band_sizes": table.sizes if is_banded else (),
        "band_ranks": table.ranks if is_banded else (),
    }
    model = {**run.record["model"], **model}
    write_record(folder, {**run.record, "model": model, "compressed": made})


def _variables_with(original: Original, table: FactorizedTable) -> dict:
    """{'params', 'constants'} of the model with another table."""
    config = original.model.config
    params, constants = dict(original.run.variables(config)["params"]), {}
    padding = config.padded_vocab_size - len(table.order)
    leaves = initialise.table_parameters(table, params["wpe"], padding)
    params |= trees.unflatten(leaves)
    if len(table.bands) > 1:
        constants = initialise.position_constants(table.order)
    return {"params": params, "constants": constants}


def _sha256(table: FactorizedTable) -> str:
    """Hash of all values of a table, because the same recipe can give another table."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
