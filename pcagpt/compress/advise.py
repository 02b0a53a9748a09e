"""Finds the one table that fits a bound: advice.json and its model."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pcagpt.compress.candidates import Candidate
from pcagpt.compress.export import write_model
from pcagpt.compress.fit import Fit
from pcagpt.compress.original import Original
from pcagpt.compress.score import SwapScores
from pcagpt.errors import UserError
from pcagpt.factorize import FLOAT_BYTES
from pcagpt.files import read_json, strict, write_json
from pcagpt.report import advice_text
from pcagpt.run.folder import move_aside
from pcagpt.telemetry.progress import Progress

ADVISED = "advised"  # the folder of the model


def advise(
    original: Original,
    method: str,
    bands: Sequence[int],
    bits: Sequence[int],
    bounds: dict[str, float],
    heading: dict[str, Any],
    folder: Path,
    check_lock: Callable[[], None],
) -> None:
    """Finds the table that fits the bound; writes its model and advice.json.

    Args:
      original: the model.
      method: of the table.
      bands: numbers of frequency bands to choose from.
      bits: of a stored value, to choose from besides 32 for a bound on bytes.
      bounds: one of `COMPRESS_BOUNDS`.
      heading: the other fields of advice.json.
      folder: for advice.json and the model; an earlier advice is moved aside.
      check_lock: raises if the folder may not be written any more.

    Raises UserError if no table fits.
    """
    ((name, bound),) = bounds.items()
    make, shape = original.compressor, original.table_VD.shape  # Calibrates first.
    label = f"fitting {original.run.folder.name}"
    with Progress(label, Fit.TRIALS) as progress:

        def measure(candidate: Candidate) -> SwapScores:
            scores = original.measure(candidate)
            progress.update(len(fit.trials) + 1)
            return scores

        fit = Fit(make, measure, method, bands, shape)
        if name == "max_added_loss":
            chosen = fit.within_loss(bound)
        elif name == "max_params":
            chosen = fit.within_bytes(FLOAT_BYTES * bound, [32])
        else:
            chosen = fit.within_bytes(bound, [32, *bits])
    if chosen is None:
        enough = {"max_params": sum(shape), "max_bytes": FLOAT_BYTES * sum(shape)}
        hint = f" to {enough[name]} or more" if name in enough else ""
        raise UserError(f"no table fits compress.{name} = {bound}: raise it{hint}")
    if jax.process_index() == 0:
        candidate, row = chosen.candidate, chosen.row()
        # First, because writing may fail.
        print(advice_text(row, str(folder / ADVISED)), flush=True)
        origin = dataclasses.asdict(candidate.recipe)
        check_lock()
        write_model(folder / ADVISED, original, candidate.table, origin)
        trials = [trial.row() for trial in fit.trials]
        advice = heading | {"bounds": bounds, "chosen": row, "trials": trials}
        path = folder / "advice.json"
        earlier = read_json(path, "delete it") or {}
        if any(earlier.get(n) != strict(advice[n]) for n in ("protocol", "bounds")):
            move_aside(path)
        write_json(path, advice)
