"""Writes a model with a compressed table as a run folder of its own."""

import dataclasses
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import coding, trees
from pcagpt.arms import FROM_RUN
from pcagpt.compression.candidates import Candidate, of_full_width
from pcagpt.compression.codes import KINDS, CodeKind, Codes
from pcagpt.compression.original import Original
from pcagpt.compression.table_files import FACTORS, factors_in, undamaged
from pcagpt.errors import UserError
from pcagpt.factorization import BandFactors, FactorizedTable
from pcagpt.factorization.factor_files import write_bands
from pcagpt.factorization.solve import centred
from pcagpt.methods import METHODS
from pcagpt.model import (
    order_constants,
    table_leaves,
    token_order,
    without_embedding,
)
from pcagpt.rows import DEFAULTS, Recipe, Row
from pcagpt.run import checkpoint, digests, fingerprint, generation_files, initialise
from pcagpt.run.folder import (
    WEIGHTS_HASH,
    choose,
    is_vacant,
    look,
    move_aside,
    replacing,
    write_record,
)
from pcagpt.run.trained import Run


def write_model(
    folder: Path, original: Original, candidate: Candidate, row: Row, overwrite: bool
) -> bool:
    """Writes the model with the table of a candidate, as a folder that is a run.

      config.json   the record; its 'compressed' tells how the table was made
      ckpt/0        the weights, with the decoded table (coded) or the codes (packed),
                and a copy of the record
      factors/      the factors; of `CODES`, the table's file is there instead

    A model of another architecture gets no ckpt/0. If the folder already holds
    this model, only lost or damaged factors/ and a lost config.json are written again.
    Another model is moved aside, unless it `stays`: then False is returned, and nothing
    is written. A changed file of a table is moved aside, too.

    Raises UserError as `Original.check_unchanged`, Unreadable if the system does not
    let the folder be read.
    """
    original.check_unchanged()
    weights, _ = _model_of(original, candidate.table, candidate.codes)
    if (
        is_of(folder, original, row)
        and _names(folder, candidate.codes or candidate.table)
        and _holds(folder, weights)
        and _tells(folder, original)
    ):
        _write_table(folder, original, candidate, row)
        _restore_record(folder)
        return True
    if stays(folder, candidate.recipe, overwrite):
        return False
    with replacing(folder) as written:
        write_new(written, original, candidate, row)
    return True


def write_new(folder: Path, original: Original, candidate: Candidate, row: Row) -> None:
    """As `write_model`, into an empty folder."""
    original.check_unchanged()
    weights, sizes = _model_of(original, candidate.table, candidate.codes)
    record = _record(folder, original, candidate, weights, sizes)
    if weights:
        checkpoint.save_weights(folder, weights, record)
    _write_table(folder, original, candidate, row)
    write_record(folder, record)


def _write_table(
    folder: Path, original: Original, candidate: Candidate, row: Row
) -> None:
    """Writes the file of codes, or lost or damaged factors/, into a model's folder."""
    if codes := candidate.codes:  # Its losses may have been measured anew.
        kind = KINDS[candidate.recipe.method]
        _write_codes(folder / kind.file, kind, codes, _description(original, row))
    elif factors_in(factors := folder / FACTORS, candidate.table.sha256) is None:
        move_aside(factors)
        write_bands(factors, candidate.table)


def _record(
    folder: Path,
    original: Original,
    candidate: Candidate,
    weights: dict,
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """The record of a new model in a folder; weights and sizes are of `_model_of`."""
    run, table = original.run, candidate.codes or candidate.table
    made = {
        "run": str(run.folder.resolve()),
        # They may be moved together.
        "run_from_here": os.path.relpath(run.folder.resolve(), folder.resolve()),
        "step": run.step,
        "fingerprint": run.fingerprint,
        **dataclasses.asdict(candidate.recipe),
        **({"side": original.side} if original.side else {}),
        "table_sha256": table.sha256,
        **({WEIGHTS_HASH: _summary(weights)} if weights else {}),
    }
    model = {**run.record["model"], "n_embd_wte_scale_tying": True, **sizes}
    own = {"model": model, "run_id": secrets.token_hex(8)}
    return {**run.record, **original.told, **own, "compressed": made}


def keeps_model(folder: Path, original: Original, row: Row) -> bool:
    """Whether a folder holds the undamaged model of a row that was measured earlier.

    Makes no table: that can take long, and another machine rounds in another way. The
    folder is judged by its own record and files instead. Writes the prediction into a
    file of `CODES`. Lost or damaged factors/ and a lost config.json are read back from
    ckpt/0. Raises Unreadable if the system does not let the folder be read.
    """
    if not is_of(folder, original, row) or not _tells(folder, original):
        return False
    keeps = _keeps_codes if row.is_codes else _keeps_factors
    if not keeps(folder, original, row):
        return False
    _restore_record(folder)
    return True


def _keeps_codes(folder: Path, original: Original, row: Row) -> bool:
    kind, own = KINDS[row.method], _description(original, row)
    path = folder / kind.file
    if (found := undamaged(lambda: kind.read(path))) is None:
        return False
    codes, there = found
    renewed = dataclasses.replace(there, predicted_loss=own.predicted_loss)
    # A packed file with more bytes at its end is read, too.
    if renewed != own or path.stat().st_size != row.bytes:
        return False
    if not _names(folder, codes):
        return False
    weights, _ = _model_of(original, of_full_width(codes.dense()), codes)
    if not _holds(folder, weights):
        return False
    if there != own:
        _write_codes(path, kind, codes, own)
    return True


def _names(folder: Path, table: FactorizedTable | Codes) -> bool:
    """Whether the record in a folder is of this table."""
    return _origin_of(folder).get("table_sha256") == table.sha256


def _write_codes(
    path: Path, kind: CodeKind, codes: Codes, description: coding.Description
) -> None:
    """Writes a file of `CODES`; moves one aside unless only its losses differ.

    A damaged or another file there may be a person's.
    """
    if path.exists():
        found = undamaged(lambda: kind.read(path))
        told = ("predicted_loss", "measured_loss")  # Perhaps on a part of the split.
        losses = {name: getattr(found[1], name) for name in told} if found else {}
        with tempfile.TemporaryDirectory() as place:
            earlier = Path(place) / kind.file
            made = dataclasses.replace(description, **losses)
            kind.write(earlier, codes, made)
            is_own = found and path.read_bytes() == earlier.read_bytes()
        if not is_own:
            move_aside(path)
    kind.write(path, codes, description)


def _keeps_factors(folder: Path, original: Original, row: Row) -> bool:
    factors = folder / FACTORS
    kept = table = factors_in(factors, _origin_of(folder).get("table_sha256"))
    if table is None and not original.run.architecture:
        try:
            table = undamaged(lambda: _read_back(folder, original, row))
        except KeyError:  # The weights have other bands.
            return False
    if table is None:
        return False
    weights, _ = _model_of(original, table, None)
    if not _holds(folder, weights):
        return False
    if not kept:
        move_aside(factors)
        write_bands(factors, table)
    return True


def _read_back(folder: Path, original: Original, row: Row) -> FactorizedTable:
    """The factors in ckpt/0, with the mean of the method.

    UserError if ckpt/0 is damaged, KeyError if it has other bands than the row.
    """
    weights = Run.open(folder).weights
    bands, embed = [], weights["params"]["embed"]
    for number, size in enumerate(row.band_sizes):
        leaves = embed[f"band_{number}"]
        bands.append(BandFactors(leaves["wte"][:size], leaves.get("scale_up")))
    order_V = token_order(weights["constants"], sum(row.band_sizes)).astype(np.int32)
    weighting = METHODS[row.method].weigh(original.table_VD, original.statistics)
    _, mean_D = centred(original.table_VD, weighting)
    return FactorizedTable(order_V, tuple(bands), mean_D)


def stays(folder: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether a model is kept, because a run started from it. Prints a line if so.

    The run could not go on from another model. With `overwrite`, none is kept.
    """
    if overwrite or not (run := _started_from(folder)):
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
    for above in model.parents[:2]:  # A folder directly below / has only one.
        for run in sorted(above.glob(name)):
            # A damaged run cannot go on.
            if undamaged(lambda run=run: _began_with(run, model)):
                return run
    return None


def _began_with(run: Path, model: Path) -> bool:
    """Whether a run started from a model as it is now; UserError if one is damaged."""
    found = look(run)
    if found.damage:
        raise found.damage
    recorded = (found.stored or {}).get("imported_sha256") or {}
    return fingerprint.same(model, recorded.get("weights_from"))


def _description(original: Original, row: Row) -> coding.Description:
    protocol = original.protocol
    return coding.Description(
        method=row.method,
        corpus=protocol["corpus_sha256"],
        checkpoint=protocol["checkpoint"],
        predicted_loss=row.predicted_loss,
        measured_loss=row.added_loss,
    )


def is_of(folder: Path, original: Original, row: Row) -> bool:
    """Whether a folder's record is of the table of a row, made from this original.

    By the same recipe, other statistics make another table: its hash decides, but rows
    of older versions have none. The run may have been moved, and an older version had
    another fingerprint.
    """
    origin, run = _origin_of(folder), original.run
    return (
        dataclasses.asdict(row.recipe).items() <= origin.items()
        and row.table_sha256 in (None, origin.get("table_sha256"))
        and origin.get("step") == run.step
        and run.is_at(origin.get("fingerprint"))
    )


def _origin_of(folder: Path) -> dict[str, Any]:
    """The origin that `write_model` recorded in a folder; {} if it cannot be read."""
    origin = (undamaged(lambda: _stored(folder)) or {}).get("compressed")
    return DEFAULTS | origin if origin else {}


def _stored(folder: Path) -> dict[str, Any]:
    """The record in a folder, or the copy in its checkpoint; UserError for damage."""
    there = look(folder)
    if there.damage:
        raise there.damage
    return there.stored or {}


def _restore_record(folder: Path) -> None:
    """Writes a lost config.json again, from the copy in the checkpoint."""
    if not (folder / "config.json").exists() and (stored := _stored(folder)):
        write_record(folder, stored)


def _tells(folder: Path, original: Original) -> bool:
    """Whether the record in a folder tells the text of the tokens, and where it ends.

    Older versions did not record it. A model that a run started from stays as it is.
    """
    stored = undamaged(lambda: _stored(folder)) or {}
    names = original.told.keys() - {"tokenizer"}  # Its file may have been moved.
    wanted = {generation_files.FIELD: original.run.record.get(generation_files.FIELD)}
    wanted |= {name: original.told[name] for name in names}
    is_told = all(stored.get(name) == of for name, of in wanted.items())
    return is_told or _started_from(folder) is not None


def _summary(weights: dict) -> str:
    return digests.summary(digests.of_arrays(weights))


def _holds(folder: Path, weights: dict) -> bool:
    """Whether a folder is a run of these weights, with all that describes them."""

    def read() -> dict[str, str]:
        _, step = choose(folder)
        return digests.arrays(checkpoint.folder_of(folder, step))

    return not weights or undamaged(read) == digests.of_arrays(weights)


def is_of_another(folder: Path, original: Original) -> bool:
    """Whether `write_model` wrote a table of another model there."""
    recorded = _origin_of(folder).get("fingerprint")
    return recorded is not None and not original.run.is_at(recorded)


def check_place(folder: Path) -> None:
    """Raises UserError if `write_model` would replace what it did not write."""
    if not is_vacant(folder) and "compressed" not in _stored(folder):
        raise UserError(
            f"{folder} holds something other than a compressed model: use another "
            "--config.workdir, or --config.overwrite=True to move it aside"
        )


def _model_of(
    original: Original, table: FactorizedTable, codes: Codes | None
) -> tuple[dict, dict[str, Any]]:
    """({'params', 'constants'} of the model with another table, its `model` knobs).

    A model of another architecture keeps its weights in its folder: {} is returned.
    """
    run = original.run
    if run.architecture:
        return {}, {}
    config = run.config(run.settings.model)
    params, constants = run.variables(config)["params"], {}
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
