"""Writes a model with a compressed table as a run folder of its own."""

import dataclasses
import hashlib
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import coding, trees
from pcagpt.compress.candidates import Candidate, of_full_width
from pcagpt.compress.original import Original
from pcagpt.errors import UserError
from pcagpt.factorize import FactorizedTable
from pcagpt.factorize.factor_files import write_bands
from pcagpt.files import write_file
from pcagpt.model import order_constants, table_leaves
from pcagpt.rows import DEFAULTS, Recipe, Row
from pcagpt.run import checkpoint, digests, initialise
from pcagpt.run.folder import is_vacant, move_aside, read_record, write_record


def write_model(
    folder: Path, original: Original, candidate: Candidate, row: Row
) -> None:
    """Writes the model with the table of a candidate: config.json, ckpt/0, factors/.

    A coded table has its file, table.pcat with the losses of its row, in place of
    factors/; ckpt/0 holds what it decodes to.

    Every command takes the folder as a run. A folder that already holds this model
    stays as it is, because other runs may have started from it. A folder that holds
    another model is moved aside. 'compressed' in config.json tells how the table was
    made.
    """
    run, table = original.run, candidate.table
    made = _origin(original, candidate.recipe, table)
    weights = _variables_with(original, table)
    if _is_made(folder, original, made, weights):
        if candidate.coded:  # Its losses may have been measured anew.
            _write_coded(folder, original, candidate, row)
        return
    # The folder gets its name when it is complete. A killed command may have left one.
    written = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(written, ignore_errors=True)
    checkpoint.save_weights(written, weights)
    if candidate.coded is None:
        write_bands(written / "factors", table)
    else:
        _write_coded(written, original, candidate, row)
    is_banded = len(table.bands) > 1
    model = {
        "n_embd_wte": None if is_banded else table.ranks[0] or None,
        "n_embd_wte_scale_tying": True,
        "band_sizes": table.sizes if is_banded else (),
        "band_ranks": table.ranks if is_banded else (),
    }
    own = {"model": {**run.record["model"], **model}, "run_id": secrets.token_hex(8)}
    write_record(written, {**run.record, **own, "compressed": made})
    move_aside(folder)
    written.rename(folder)


def keeps_coded(folder: Path, original: Original, row: Row) -> bool:
    """Whether a folder holds the coded model of a row, undamaged.

    Encodes nothing, since this takes long. Renews the prediction in table.pcat.
    """
    path, own = folder / "table.pcat", _description(original, row)
    try:
        coded, there = coding.read(path)
    except UserError:
        return False
    # The size and the measured loss tell the table from those of other statistics.
    renewed = dataclasses.replace(there, predicted_loss=own.predicted_loss)
    if renewed != own or path.stat().st_size != row.bytes:
        return False
    table = of_full_width(coded.dense())
    made = _origin(original, row.recipe, table)
    if not _is_made(folder, original, made, _variables_with(original, table)):
        return False
    if there != own:
        coding.write(path, coded, coding.to_words(coded), own)
    return True


def _description(original: Original, row: Row) -> coding.Description:
    protocol = original.protocol
    return coding.Description(
        method=row.method,
        corpus=protocol["corpus_sha256"],
        checkpoint=protocol["checkpoint"],
        predicted_loss=row.predicted_loss,
        measured_loss=row.added_loss,
    )


def _write_coded(
    folder: Path, original: Original, candidate: Candidate, row: Row
) -> None:
    """Writes table.pcat, unless the folder has the same file."""
    path, coded = folder / "table.pcat", candidate.coded
    content = coding.to_bytes(coded.table, coded.words, _description(original, row))
    if not path.is_file() or path.read_bytes() != content:
        write_file(path, lambda file: file.write(content))


def origin_of(folder: Path) -> dict[str, Any]:
    """The origin that `write_model` recorded in a folder; {} without a record."""
    origin = (read_record(folder) or {}).get("compressed")
    return DEFAULTS | origin if origin else {}


def _origin(
    original: Original, recipe: Recipe, table: FactorizedTable
) -> dict[str, Any]:
    """What 'compressed' in config.json says of a table."""
    run = original.run
    return {
        "run": str(run.folder),
        "step": run.step,
        "fingerprint": run.fingerprint,
        **dataclasses.asdict(recipe),
        "table_sha256": _sha256(table),
    }


def _is_made(
    folder: Path, original: Original, made: dict[str, Any], weights: dict
) -> bool:
    """Whether a folder has this origin, and these weights as its newest, undamaged."""
    earlier = origin_of(folder)
    # A run may have been moved, and an older version had another fingerprint.
    moved = {**earlier, "run": made["run"], "fingerprint": made["fingerprint"]}
    if moved != made or not original.run.is_at(earlier.get("fingerprint")):
        return False
    try:
        run_dir, step = checkpoint.find(folder)
        stored = digests.arrays(checkpoint.folder_of(run_dir, step))
    except UserError:
        return False
    return stored == digests.of_arrays(weights)


def check_place(folder: Path) -> None:
    """Raises UserError if `write_model` would replace what it did not write."""
    if not is_vacant(folder) and "compressed" not in (read_record(folder) or {}):
        raise UserError(
            f"{folder} holds something other than a compressed model: use another "
            "--config.workdir, or --config.overwrite=True to move it aside"
        )


def _variables_with(original: Original, table: FactorizedTable) -> dict:
    """{'params', 'constants'} of the model with another table."""
    config = original.model.config
    params, constants = dict(original.run.variables(config)["params"]), {}
    padding = config.padded_vocab_size - len(table.order)
    leaves = table_leaves(initialise.leaves_of(table), padding)
    params |= initialise.with_mean(table.mean, params["wpe"]) | trees.unflatten(leaves)
    if len(table.bands) > 1:
        constants = order_constants(table.order)
    return {"params": params, "constants": constants}


def _sha256(table: FactorizedTable) -> str:
    """Hash of all values of a table, because the same recipe can give another table."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
