"""Measures many compressed tables of a model: sweep.json, its report, best models."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from pcagpt.compress.candidates import Recipe
from pcagpt.compress.export import write_model
from pcagpt.compress.original import Original
from pcagpt.factorize import LossRegression, SecondOrder
from pcagpt.files import read_json, strict, write_json
from pcagpt.report import SMALLEST_ADDED, SweepRow, pareto_figure, write_sweep_report
from pcagpt.telemetry.progress import Progress
from pcagpt.telemetry.record import Telemetry

REPORT_EVERY = 5  # rows
RECIPE = [field.name for field in dataclasses.fields(Recipe)]


def sweep(
    original: Original, tried: list[Recipe], heading: dict[str, Any], folder: Path
) -> None:
    """Measures every recipe; writes the rows, reports and the best model per rank.

    Rows that an earlier sweep measured under the same protocol are kept. `heading` has
    the other fields of sweep.json.
    """
    writes = jax.process_index() == 0
    earlier = read_sweep(folder)
    known: dict[Recipe, SweepRow] = {}
    if earlier.get("protocol") == strict(heading["protocol"]):
        rows = [*earlier["rows"], *earlier.get("other_rows", ())]
        known = {Recipe(**{name: row[name] for name in RECIPE}): row for row in rows}
        if "recovered" in earlier:
            heading = {**heading, "recovered": earlier["recovered"]}
    lacking = [recipe for recipe in tried if recipe not in known]
    done = len(tried) - len(lacking)
    make = original.compressor  # May calibrate, with a progress bar of its own.
    label = f"compressing {original.run.folder.name}"
    with Progress(label, len(tried), start=done) as progress:
        for number, recipe in enumerate(progress.track(lacking), 1):
            candidate = make(recipe)
            known[recipe] = candidate.row(original.measure(candidate))
            if writes:  # After every row, so that an interrupted sweep can resume.
                content = _write_sweep(folder, heading, tried, known)
                if number % REPORT_EVERY == 0:
                    write_sweep_report(folder, content)
    if not writes:
        return
    content = _write_sweep(folder, heading, tried, known)
    for rank in sorted({recipe.rank for recipe in tried} - {0}):
        of_rank = [r for r in tried if r.rank == rank and r.bits == 32]
        best = min(of_rank, key=lambda recipe: known[recipe]["added_loss"])
        table = make(best).table
        origin = dataclasses.asdict(best)
        write_model(folder / f"best_k{rank}", original, table, origin)
    tensorboard = original.settings.telemetry.tensorboard
    with Telemetry(folder, config={}, tensorboard=tensorboard) as telemetry:
        telemetry.figure("pareto", pareto_figure(content))
    print(f"report: {write_sweep_report(folder, content)}", flush=True)


def add_recovered(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Adds the results of further training to sweep.json; rewrites its report."""
    content = read_sweep(folder) | {"recovered": strict(rows)}
    write_json(folder / "sweep.json", content)
    return write_sweep_report(folder, content)


def read_sweep(folder: Path) -> dict[str, Any]:
    """Reads the sweep.json of an earlier sweep; {} if it does not exist."""
    return read_json(folder / "sweep.json", "delete it to measure again") or {}


def _write_sweep(
    folder: Path, heading: dict, tried: list[Recipe], known: dict[Recipe, SweepRow]
) -> dict[str, Any]:
    """Writes sweep.json with predictions; returns its content.

    other_rows: rows of earlier commands that are not in `tried`; rows_left: number of
    rows still to measure, absent at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [known[recipe] for recipe in tried if recipe in known]
    _predict(rows)
    others = [row for recipe, row in known.items() if recipe not in tried]
    content = {**heading, "rows": rows, "other_rows": others}
    if len(rows) < len(tried):
        content["rows_left"] = len(tried) - len(rows)
    write_json(folder / "sweep.json", content)
    return content


def _predict(rows: list[SweepRow]) -> None:
    """Fills in `predicted_loss` and `is_anchor` of every row.

    The predictions are fitted to the anchors: the smallest and the largest table of
    each method, once with a single band and once with the smallest number of several
    bands.
    """

    def second_order(row: SweepRow) -> SecondOrder:
        return SecondOrder(row["second_order_head"], row["second_order_input"])

    kinds: dict[tuple[str, bool], list[SweepRow]] = {}
    for row in rows:
        row["is_anchor"] = False
        # Smaller losses are mostly rounding errors.
        if row["bits"] == 32 and row["added_loss"] >= SMALLEST_ADDED:
            kinds.setdefault((row["method"], row["bands"] > 1), []).append(row)
    for kind in kinds.values():
        fewest = min(row["bands"] for row in kind)
        kind = [row for row in kind if row["bands"] == fewest]
        for choose in (min, max):
            choose(kind, key=lambda row: row["budget"])["is_anchor"] = True
    regression = LossRegression(
        (row["method"], second_order(row), row["added_loss"])
        for row in rows
        if row["is_anchor"]
    )
    for row in rows:
        row["predicted_loss"] = regression(row["method"], second_order(row))
