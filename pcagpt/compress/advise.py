"""Finds the one table that fits a bound: advice.json and its model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from pcagpt.compress.candidates import FLOAT_BYTES, Candidate
from pcagpt.compress.export import write_model
from pcagpt.compress.fit import Fit
from pcagpt.compress.original import Original
from pcagpt.compress.score import SwapScores
from pcagpt.errors import UserError
from pcagpt.files import write_json
from pcagpt.report import advice_text
from pcagpt.telemetry.progress import Progress


def advise(
    original: Original,
    method: str,
    bounds: dict[str, float],
    heading: dict[str, Any],
    folder: Path,
) -> None:
    """Finds the table that fits the bound; writes its model and advice.json.

    `bounds` holds one of `COMPRESS_BOUNDS`; `heading` has the other fields of
    advice.json. Raises UserError if no table fits.
    """
    ((name, bound),) = bounds.items()
    compress = original.settings.compress
    make, shape = original.compressor, original.table_VD.shape  # May calibrate.
    label = f"fitting {original.run.folder.name}"
    with Progress(label, Fit.TRIALS) as progress:

        def measure(candidate: Candidate) -> SwapScores:
            scores = original.measure(candidate)
            progress.update(len(fit.trials) + 1)
            return scores

        fit = Fit(make, measure, method, compress.bands, shape)
        if name == "max_added_loss":
            chosen = fit.within_loss(bound)
        elif name == "max_params":
            chosen = fit.within_bytes(FLOAT_BYTES * bound, [32])
        else:
            chosen = fit.within_bytes(bound, [32, *compress.bits])
    if chosen is None:
        enough = {"max_params": sum(shape), "max_bytes": FLOAT_BYTES * sum(shape)}
        hint = f" to {enough[name]} or more" if name in enough else ""
        raise UserError(f"no table fits compress.{name} = {bound}: raise it{hint}")
    if jax.process_index() == 0:
        candidate, row = chosen.candidate, chosen.row()
        origin = dataclasses.asdict(candidate.recipe)
        write_model(folder / "advised", original, candidate.table, origin)
        trials = [trial.row() for trial in fit.trials]
        advice = {"bounds": bounds, "chosen": row, "trials": trials}
        write_json(folder / "advice.json", heading | advice)
        print(advice_text(row, str(folder / "advised")), flush=True)
