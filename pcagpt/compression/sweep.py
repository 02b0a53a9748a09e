"""Measures many compressed tables of a model: sweep.json, its report, best models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pcagpt.compression.bare_table import BareTable
from pcagpt.compression.candidates import Candidate
from pcagpt.compression.original import Original
from pcagpt.compression.output import Output
from pcagpt.compression.write_model import is_of, keeps_model, stays, write_model
from pcagpt.errors import UserError
from pcagpt.factorization import (
    SMALLEST_ADDED,
    BudgetTooSmall,
    LossRegression,
    SecondOrder,
)
from pcagpt.json_files import strict, write_json
from pcagpt.report import advice_text, write_sweep_report
from pcagpt.rows import (
    AnyRow,
    Provenance,
    Recipe,
    Row,
    in_bands,
    read_sweep,
    row_of_model,
)
from pcagpt.run import provenance
from pcagpt.run.folder import move_aside, removed
from pcagpt.sharding import processes
from pcagpt.telemetry.progress import Progress

Models = dict[Path, list[Recipe]]  # {folder: its recipes}
REPORT_EVERY = 5  # rows


def models_of(folder: Path, tried: list[Recipe]) -> Models:
    """The models that a sweep writes."""
    found: Models = {}
    for recipe in tried:
        if recipe.model_name:
            found.setdefault(folder / recipe.model_name, []).append(recipe)
    return found


def sweep(
    original: Original,
    tried: list[Recipe],
    output: Output,
    *,
    overwrite: bool,
) -> Models:
    """Measures every recipe; writes the rows, reports and the best models.

    Keeps the rows that an earlier sweep measured under the same protocol; moves a sweep
    under another protocol aside. A best model that a run started from stays, unless
    `overwrite` is set. Leaves out recipes that no table fits; UserError if all are.
    Only what was measured on the validation split chooses models. Returns them.
    """
    folder, writes = output.folder, jax.process_index() == 0
    heading, measured = processes.from_first(lambda: resume(original, output))
    output = dataclasses.replace(output, heading=heading)
    known = set(measured)
    if "gaussian_limit" not in output.heading:
        limit = {"gaussian_limit": original.compressor.gaussian_limit()}
        output = dataclasses.replace(output, heading=output.heading | limit)
    # An interrupted sweep has no more models than the earlier one.
    heading = {"models": {}} | output.heading
    output = dataclasses.replace(output, heading=heading)

    def measure(candidate: Candidate) -> Row:
        return candidate.row(original.measure(candidate))

    def write(tried: list[Recipe]) -> dict[str, Any]:
        return write_sweep(output, tried, measured, known, _predicted)

    def report(content: dict[str, Any]) -> Path:
        return write_sweep_report(folder, content)

    tried = measure_each(original, tried, measured, measure, write, report, advice_text)
    chosen = models_of(folder, tried) if original.split == "val" else {}
    if not writes:
        return chosen
    # Those in the report now have predictions.
    measured |= {row.recipe: row for row in write(tried)["rows"]}
    every = models_of(folder, list(measured))
    for place in sorted(chosen):
        _write_best(original, place, every[place], measured, known, overwrite)
    content = write(tried)
    content["models"] = {
        place.name: dataclasses.asdict(recipe)
        for place in chosen
        for recipe in every[place]
        if is_of(place, original, measured[recipe])
    }
    write_json(folder / output.file, content)
    print(f"report: {report(content)}", flush=True)
    return chosen


def resume(
    original: Original | BareTable, output: Output, kind: type[AnyRow] = Row
) -> tuple[dict[str, Any], dict[Recipe, AnyRow]]:
    """The rows of an earlier sweep under the same protocol; moves another one aside.

    The heading then also has its provenance, R(D) line, models and results of further
    training. Codes of another version are measured again.
    """
    path, heading = output.folder / output.file, output.heading
    earlier, own = read_sweep(path, kind), strict(heading["protocol"])
    if not earlier or original.renewed(earlier["protocol"]) != own:
        move_aside(path)
        return heading, {}
    has_same_codes = earlier["protocol"].get("codes") == own["codes"]
    rows = earlier["rows"] + earlier["other_rows"]
    measured = {r.recipe: r for r in rows if has_same_codes or not r.is_codes}
    names = (
        "recovered",
        "samples",
        "samples_of",
        *(Provenance.__annotations__ if measured else []),
        *(["gaussian_limit", "models"] if has_same_codes else []),
    )
    kept = [name for name in names if earlier.get(name)]
    heading = heading | {name: earlier[name] for name in kept}
    return heading, measured


def measure_each(
    original: Original | BareTable,
    tried: list[Recipe],
    measured: dict[Recipe, AnyRow],
    measure: Callable[[Candidate], AnyRow],
    write: Callable[[list[Recipe]], dict[str, Any]],
    report: Callable[[dict[str, Any]], Any],
    text: Callable[[AnyRow, tuple[int, int]], str],
) -> list[Recipe]:
    """Makes the tables that `measured` lacks, and adds their rows to it.

    Leaves out recipes that no table fits; UserError if all are. Returns the others.

    Args:
      original: the table.
      tried: the recipes of the sweep.
      measured: rows that are known.
      measure: the row of a candidate.
      write: writes the sweep after each row, on the first process; returns its content.
      report: writes the report of this content.
      text: describes a row for a table [V, D], in case that it cannot be written.
    """
    lacking = [recipe for recipe in tried if recipe not in measured]
    done, writes = len(tried) - len(lacking), jax.process_index() == 0
    make = original.compressor  # May calibrate, with a progress bar of its own.
    label = f"compressing {original.label}"
    with Progress(label, len(tried), start=done) as progress:
        for number, recipe in enumerate(progress.track(lacking), 1):
            try:
                candidate = make(recipe)
            except BudgetTooSmall as error:
                tried = [other for other in tried if other != recipe]
                too_small = f"rank {recipe.rank}, {in_bands(recipe)}: {error}"
                if not tried:
                    raise UserError(
                        f"{too_small}; raise ranks, or add another method to "
                        "compress.methods"
                    ) from None
                if writes:
                    print(f"left out: {too_small}", flush=True)
                continue
            measured[recipe] = measure(candidate)
            if writes and candidate.note:
                print(f"rank {recipe.rank}, {candidate.note}", flush=True)
            if writes:  # After every row: an interrupted sweep resumes here.
                try:
                    content = write(tried)
                except (OSError, UserError):
                    row = text(measured[recipe], original.table_VD.shape)
                    print(f"not saved:\n{row}", flush=True)
                    raise
                if number % REPORT_EVERY == 0:
                    report(content)
    return tried


def _write_best(
    original: Original,
    place: Path,
    recipes: list[Recipe],
    measured: dict[Recipe, Row],
    known: set[Recipe],
    overwrite: bool,
) -> None:
    """Writes the model of least added loss, unless the one there `stays`.

    Tables of earlier sweeps count, too.

    In a tie, it keeps the one already there. If an earlier sweep wrote this model and
    it is undamaged, it is not made again. A row in `measured` gets the hash of the
    table that is written: another machine may have made the row, which rounds in
    another way. `known` then lacks its recipe.
    """
    rows = [measured[recipe] for recipe in recipes]
    # Runs may have started from the one there.
    row = row_of_model(rows, lambda row: is_of(place, original, row))
    best = row.recipe
    if best in known and keeps_model(place, original, row):
        return
    if is_of(place, original, row) or not stays(place, best, overwrite):
        candidate = original.compressor(best)
        stored = candidate.stored | {"seconds": row.seconds}
        row = dataclasses.replace(row, **stored)
        if write_model(place, original, candidate, row, overwrite):
            if row != measured[best]:
                known.discard(best)
            measured[best] = row


def add_recovered(output: Output, rows: list[dict[str, Any]]) -> Path:
    """Adds the results of further training to sweep.json; rewrites its report.

    Those of other runs stay if they were compared with the same D+. Otherwise they are
    left out, and a line says so.
    """
    output.check()
    path = output.folder / "sweep.json"
    if not (content := read_sweep(path)):
        raise removed(path)
    recovered = {row["run"]: row for row in content.get("recovered") or ()}
    new = {row["run"]: row for row in strict(rows)}
    (continued,) = (row for row in new.values() if row["rank"] is None)
    known = recovered.get(continued["run"], continued)
    if any(known[key] != continued[key] for key in ("val_loss", "tokens_seen")):
        if others := sorted(recovered.keys() - new.keys()):
            print(
                f"left out of the report: {', '.join(others)}, compared with another "
                "D+; recover the same ranks again to compare them with this one",
                flush=True,
            )
        recovered = {}
    recovered |= new
    content["recovered"] = list(recovered.values())
    write_json(path, content)
    return write_sweep_report(output.folder, content)


def set_samples(output: Output, samples: dict[str, Any]) -> None:
    """Gives sweep.json the result of `pipeline.samples`; rewrites its report."""
    output.check()
    path = output.folder / "sweep.json"
    if not (content := read_sweep(path)):
        raise removed(path)
    for name in ("samples", "samples_of"):
        content.pop(name, None)
    if samples:
        content |= samples | provenance.joined((content, output.made_by))
    write_json(path, content)
    write_sweep_report(output.folder, content)


def write_sweep(
    output: Output,
    tried: list[Recipe],
    measured: dict[Recipe, AnyRow],
    known: set[Recipe],
    complete: Callable[[list[AnyRow]], list[AnyRow]] = list,
) -> dict[str, Any]:
    """Writes the JSON file of a sweep; returns its content.

    `known` are the recipes of rows that earlier commands measured; `complete` gets the
    rows of `tried`, and returns those to write. other_rows: rows of earlier commands
    that are not in `tried`; rows_left: number of rows still to measure, absent at the
    end.
    """
    output.check()
    output.folder.mkdir(parents=True, exist_ok=True)
    output.check()  # From now on, it notices if the folder is moved away.
    rows = complete([measured[recipe] for recipe in tried if recipe in measured])
    others = [row for recipe, row in measured.items() if recipe not in tried]
    makers = [output.heading]
    if measured.keys() - known:
        makers.append(output.made_by)
    made_by = provenance.joined(makers)
    content = {**output.heading, **made_by, "rows": rows, "other_rows": others}
    if len(rows) < len(tried):
        content["rows_left"] = len(tried) - len(rows)
    write_json(output.folder / output.file, content)
    return content


def _predicted(rows: list[Row]) -> list[Row]:
    """The rows with `predicted_loss` and `is_anchor`.

    The predictions are fitted to the anchors: the smallest and the largest table of
    each method that makes factors, once with a single band and once with the smallest
    number of several bands. No table of `CODES` is an anchor.
    """

    def second_order(row: Row) -> SecondOrder:
        return SecondOrder(row.second_order_head, row.second_order_input)

    kinds: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        # Smaller losses are mostly rounding and predict nothing.
        if row.is_factors and row.added_loss >= SMALLEST_ADDED:
            kinds.setdefault((row.method, row.bands > 1), []).append(row)
    anchors = []
    for kind in kinds.values():
        fewest = min(row.bands for row in kind)
        kind = [row for row in kind if row.bands == fewest]
        anchors += [choose(kind, key=lambda row: row.budget) for choose in (min, max)]
    regression = LossRegression(
        (row.method, second_order(row), row.added_loss)
        for row in rows
        if row in anchors
    )
    return [
        dataclasses.replace(
            row,
            predicted_loss=regression(row.method, second_order(row)),
            is_anchor=row in anchors,
        )
        for row in rows
    ]
