"""Finds the one table that fits a bound: advice.json and its model."""

from collections.abc import Sequence

import jax

from pcagpt.compression.bare_table import BareTable
from pcagpt.compression.candidates import Candidate, factor_methods, left_out
from pcagpt.compression.fit import Fit, Trial
from pcagpt.compression.original import Original
from pcagpt.compression.output import Output
from pcagpt.compression.write_model import write_model
from pcagpt.config.schema import CompressSettings
from pcagpt.errors import UserError
from pcagpt.factorization import FLOAT_BYTES
from pcagpt.json_files import read_json, strict, write_json
from pcagpt.methods import CODES, RIVALS
from pcagpt.report import advice_text
from pcagpt.rows import Row, SwapScores
from pcagpt.run.folder import move_aside, read_record
from pcagpt.telemetry.progress import Progress

ADVISED = "advised"  # the folder of the model


def advise(
    original: Original,
    methods: Sequence[str],
    options: CompressSettings,
    output: Output,
    *,
    overwrite: bool,
) -> Row | None:
    """Finds the table that fits the bound; writes its model and advice.json.

    Returns its row, or None if nothing is written: only process 0 writes.

    Args:
      original: the model.
      methods: as for `find`.
      options: as for `find`.
      output: for advice.json and the model. An earlier advice is moved aside if it has
        another protocol, bound or model.
      overwrite: if False, a model stays from which a run was trained further (see
        `stays`), and so does its advice.

    Raises UserError as `find` does.
    """
    chosen, tried = find(original, methods, options)
    if jax.process_index() > 0:
        return None
    row, place = chosen.row(), output.folder / ADVISED
    if "max_bytes" in options.bounds and chosen.candidate.note:
        print(chosen.candidate.note, flush=True)
    # First, because writing may fail.
    whose = f"{original.side} table: " if original.side else ""
    print(f"{whose}{advice_text(row, original.table_VD.shape)}", flush=True)
    output.check()
    if not write_model(place, original, chosen.candidate, row, overwrite):
        return None
    print(f"{'table' if original.run.architecture else 'model'}: {place}", flush=True)
    trials = [trial.row() for trial in tried]
    answer = {"bounds": options.bounds, "chosen": row, "trials": trials}
    # The same recipe can give another table.
    answer["model_run_id"] = read_record(place)["run_id"]
    advice = output.heading | output.made_by | answer
    path = output.folder / "advice.json"
    earlier, own = read_json(path, "delete it") or {}, strict(advice)
    if isinstance(protocol := earlier.get("protocol"), dict):
        earlier["protocol"] = original.renewed(protocol)
    # If the model was moved aside, its advice goes with it.
    if any(earlier.get(n) != own[n] for n in ("protocol", "bounds", "model_run_id")):
        move_aside(path)
    write_json(path, advice)
    return row


def methods_within(options: CompressSettings, methods: Sequence[str]) -> list[str]:
    """The methods that a search for a bound uses; UserError if none fits the bands."""
    if "max_params" in options.bounds:
        methods = factor_methods(methods)
    if not set(methods) - {*left_out(methods, options.bands), *RIVALS}:
        raise UserError(
            f"no table fits compress.bands {options.bands}: list 1 in compress.bands"
        )
    return list(methods)


def find(
    original: Original | BareTable, methods: Sequence[str], options: CompressSettings
) -> tuple[Trial, list[Trial]]:
    """(the table that fits the bound, all that were tried).

    Args:
      original: the model, or a bare table.
      methods: see `Fit`; a bound on numbers leaves out `CODES`.
      options: one of its bounds is set. Factors have one of its numbers of bands and,
        for a bound on bytes, 32 bits per value or one of its `bits`.

    Raises UserError if no table fits, or no method fits the bands.
    """
    ((name, bound),) = options.bounds.items()
    methods = methods_within(options, methods)
    make, shape = original.compressor, original.table_VD.shape  # Calibrates first.
    label, bits = f"fitting {original.label}", len(options.bits)
    with Progress(label, max(Fit.TRIALS + bits, len(CODES) + 1 + 2 * bits)) as progress:

        def measure(candidate: Candidate) -> SwapScores:
            scores = original.measure(candidate)
            progress.update(len(fit.trials) + 1)
            return scores

        fit = Fit(make, make.codes_bytes, measure, methods, options.bands, shape)
        unit = FLOAT_BYTES if name == "max_params" else 1
        every = [32] if name == "max_params" else [32, *options.bits]
        if name == "max_added_loss":
            chosen = fit.within_loss(bound, options.bits)
        else:
            # No table is larger; NumPy knows no larger integers.
            chosen = fit.within_bytes(min(int(unit * bound), 2**62), every)
    if chosen is None:
        is_low, hint = bool(fit.trials), ""
        if name != "max_added_loss":
            least = -(-fit.least_bytes(every) // unit)
            is_low, hint = least > bound, f" to {least} or more"
        remedy = f"raise it{hint}"
        if not is_low:
            remedy = f"{fit.refusal}; try other compress.methods"
        which = "no table"
        if name == "max_added_loss":  # It does not try all methods.
            which = f"none of the {len(fit.trials)} tables that were tried"
        raise UserError(f"{which} fits compress.{name} = {bound}: {remedy}")
    return chosen, fit.trials
