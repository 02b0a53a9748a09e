"""Writes a model with a compressed table as a run folder of its own."""

import contextlib
import dataclasses
import hashlib
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import coding, trees
from pcagpt.arms import FROM_RUN
from pcagpt.compress.candidates import Candidate, of_full_width
from pcagpt.compress.codes import KINDS, Codes
from pcagpt.compress.original import Original
from pcagpt.errors import Unreadable, UserError
from pcagpt.factorize import FactorizedTable
from pcagpt.factorize.factor_files import read_bands, write_bands
from pcagpt.model import order_constants, table_leaves, without_embedding
from pcagpt.rows import DEFAULTS, Recipe, Row
from pcagpt.run import checkpoint, digests, fingerprint, initialise
from pcagpt.run.folder import (
    is_vacant,
    look,
    move_aside,
    read_record,
    write_record,
)


def write_model(
    folder: Path, original: Original, candidate: Candidate, row: Row
) -> None:
    """Writes the model with the table of a candidate: config.json, ckpt/0, factors/.

    In place of factors/, a table of `CODES` has its file with the losses of its row.
    ckpt/0 holds what a coded table decodes to, and the arrays of a packed table.

    Every command takes the folder as a run. A folder that already holds this model
    stays as it is, because other runs may have started from it; only lost or damaged
    factors/ are written again. A folder that holds another model is moved aside.
    'compressed' in config.json tells how the table was made. Raises UserError if the
    folder of the original now holds another run.
    """
    run, recipe, codes = original.run, candidate.recipe, candidate.codes
    run.check_unchanged()
    made = _origin(original, recipe, candidate.table)
    weights, sizes = _model_of(original, candidate.table, codes)
    is_made = _is_made(folder, original, made, weights)
    # The folder gets its name when it is complete. A killed command may have left one.
    written = folder if is_made else folder.with_name(f".{folder.name}.partial")
    if not is_made:
        shutil.rmtree(written, ignore_errors=True)
        checkpoint.save_weights(written, weights)
    if codes:  # Its losses may have been measured anew.
        kind = KINDS[recipe.method]
        kind.write(written / kind.file, codes, _description(original, row))
    elif not _holds(factors := written / "factors", made["table_sha256"]):
        move_aside(factors)
        write_bands(factors, candidate.table)
    if is_made:
        return
    model = {**run.record["model"], "n_embd_wte_scale_tying": True, **sizes}
    own = {"model": model, "run_id": secrets.token_hex(8)}
    write_record(written, {**run.record, **own, "compressed": made})
    move_aside(folder)
    written.rename(folder)


def keeps_codes(folder: Path, original: Original, row: Row) -> bool:
    """Whether a folder holds the model of a row of `CODES`, undamaged.

    Makes no table, since this takes long. Renews the prediction in the file.
    """
    kind, own = KINDS[row.method], _description(original, row)
    path = folder / kind.file
    try:
        codes, there = kind.read(path)
    except UserError:
        return False
    # The size and the measured loss tell the table from those of other statistics.
    renewed = dataclasses.replace(there, predicted_loss=own.predicted_loss)
    if renewed != own or path.stat().st_size != row.bytes:
        return False
    table = of_full_width(codes.dense())
    weights, _ = _model_of(original, table, codes)
    if not _is_made(folder, original, _origin(original, row.recipe, table), weights):
        return False
    if there != own:
        kind.write(path, codes, own)
    return True


def stays(folder: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether a model is kept, because a run started from it. Prints a line if so.

    The run could not go on from another model. A model of the same recipe is not
    replaced by another one. With `overwrite`, none is kept.
    """
    if overwrite or is_of(folder, recipe) or not (run := _started_from(folder)):
        return False
    print(
        f"{folder} stays, because {run} started from it; another table (method "
        f"{recipe.method}, bands {recipe.bands}) was chosen: --config.overwrite=True "
        "moves the old model aside",
        flush=True,
    )
    return True


def _started_from(model: Path) -> Path | None:
    """A run beside or one folder above that was started from a model as it is now."""
    name = FROM_RUN.format(arm="*", source=model.name)
    for run in [*sorted(model.parent.glob(name)), *sorted(model.parents[1].glob(name))]:
        with contextlib.suppress(UserError):  # Damaged: no run can start or go on.
            recorded = (look(run).stored or {}).get("imported_sha256") or {}
            if fingerprint.same(model, recorded.get("weights_from")):
                return run
    return None


def _description(original: Original, row: Row) -> coding.Description:
    protocol = original.protocol
    return coding.Description(
        method=row.method,
        corpus=protocol["corpus_sha256"],
        checkpoint=protocol["checkpoint"],
        predicted_loss=row.predicted_loss,
        measured_loss=row.added_loss,
    )


def is_of(folder: Path, recipe: Recipe) -> bool:
    """Whether `write_model` wrote a table of this recipe there."""
    return dataclasses.asdict(recipe).items() <= _origin_of(folder).items()


def _origin_of(folder: Path) -> dict[str, Any]:
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
    earlier = _origin_of(folder)
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


def _holds(factors: Path, table_sha256: str) -> bool:
    """Whether a folder holds the factors of this table, undamaged."""
    try:
        return _sha256(read_bands(factors)) == table_sha256
    except Unreadable:
        raise
    except UserError:
        return False


def check_place(folder: Path) -> None:
    """Raises UserError if `write_model` would replace what it did not write."""
    if not is_vacant(folder) and "compressed" not in (read_record(folder) or {}):
        raise UserError(
            f"{folder} holds something other than a compressed model: use another "
            "--config.workdir, or --config.overwrite=True to move it aside"
        )


def _model_of(
    original: Original, table: FactorizedTable, codes: Codes | None
) -> tuple[dict, dict[str, Any]]:
    """({'params', 'constants'} of the model with another table, its `model` knobs)."""
    config = original.model.config
    params, constants = original.run.variables(config)["params"], {}
    sizes = {"n_embd_wte": None, "band_sizes": (), "band_ranks": ()}
    if codes and codes.constants:
        sizes |= {"band_sizes": codes.sizes, "band_ranks": codes.ranks}
        sizes["band_blocks"] = codes.blocks
        weights = {"params": without_embedding(params), "constants": codes.constants}
        return weights, sizes
    padding = config.padded_vocab_size - len(table.order)
    leaves = trees.unflatten(table_leaves(initialise.leaves_of(table), padding))
    params = params | initialise.with_mean(table.mean, params["wpe"]) | leaves
    if len(table.bands) > 1:
        constants = order_constants(table.order)
        sizes |= {"band_sizes": table.sizes, "band_ranks": table.ranks}
    else:
        sizes["n_embd_wte"] = table.ranks[0] or None
    return {"params": params, "constants": constants}, sizes


def _sha256(table: FactorizedTable) -> str:
    """Hash of all values of a table, because the same recipe can give another table."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
