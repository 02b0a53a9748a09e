"""The task 'compress' on a .npy file: a table without its model, so without a loss.

WORKDIR/compressed_table/ gets errors.json, with one row per table, and its report. A
search for a bound writes the table itself into advised/, and advice.json.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import coding
from pcagpt.compression.advise import ADVISED, find
from pcagpt.compression.bare_table import (
    FREE,
    BareTable,
    check_needs_no_text,
    relative_error,
    write_table,
)
from pcagpt.compression.candidates import Candidate, recipes
from pcagpt.compression.output import Output
from pcagpt.config import Settings, methods_of
from pcagpt.config.effort import GPU
from pcagpt.config.schema import override
from pcagpt.errors import UserError
from pcagpt.factorization import BudgetTooSmall, factor_files
from pcagpt.files import check_fields, read_json, strict, write_json
from pcagpt.methods import CODES
from pcagpt.pipeline.execute import check_workdir, say
from pcagpt.report import best_rows, full_name, write_table_report
from pcagpt.rows import REMEDY, ErrorRow, Recipe, in_bands
from pcagpt.run import lock, provenance
from pcagpt.run.folder import check_link, move_aside
from pcagpt.sharding import processes
from pcagpt.telemetry.progress import Progress

FOLDER = "compressed_table"  # in a workdir
_FOR_MORE = (
    "no loss was measured: for losses, and for methods that use statistics, give the "
    "model instead of its table"
)


def compress_table(settings: Settings, command: str) -> None:
    """Makes smaller tables, or the best one for a bound of `settings.compress`.

    All processes must call this; the first does the work.

    Raises UserError for a damaged table, a method that needs the model, and a bound
    that no table fits.
    """
    check_workdir(settings.workdir)
    folder, source = Path(settings.workdir) / FOLDER, Path(settings.model_path)
    table_VD = _table(settings)
    heading = {
        "command": command,
        "source": str(source),
        **provenance.summary(1),
        "table": list(table_VD.shape),
        # What the rows depend on.
        "sha256_of_table": factor_files.sha256(source),
        "codes": coding.CODES_VERSION,
    }
    work = _fit if settings.compress.bounds else _sweep
    with lock.held(folder, meanwhile=lambda: check_link(folder)) as check_lock:
        output = Output(folder, heading, check_lock)
        lines = processes.from_first(lambda: work(settings, table_VD, output))
    say(*lines, _FOR_MORE)


def preview_table(settings: Settings) -> list[str]:
    """What `compress_table` would do, in lines; raises UserError as it would."""
    shape = _table(settings).shape
    lines = [f"compress {settings.model_path}, a table {shape} without its model"]
    if settings.compress.bounds:
        return [*lines, "a search for one table"]
    return [*lines, f"{len(_recipes(settings, shape))} tables to make"]


def _table(settings: Settings) -> np.ndarray:
    """The table [V, D], checked; UserError also for methods that need the model."""
    check_needs_no_text(_methods(settings))
    table_VD = factor_files.read_table(settings.model_path)
    factor_files.check_rows_differ(table_VD, settings.model_path)
    return table_VD


def _methods(settings: Settings) -> list[str]:
    return methods_of(settings.compress.methods or ",".join((*FREE, *CODES)))


def _recipes(settings: Settings, shape: tuple[int, ...]) -> list[Recipe]:
    """The recipes of a sweep, in one band, because no token is known to be frequent."""
    ranks, (size, width) = settings.ranks or GPU.ranks, shape
    possible = [rank for rank in ranks if rank <= min(shape)]
    if not possible:
        raise UserError(
            f"ranks is {ranks}: the table of {settings.model_path} is {shape}, its "
            f"rank is at most {min(shape)}"
        )
    return recipes(
        size, width, _methods(settings), possible, (1,), settings.compress.bits
    )


def _sweep(settings: Settings, table_VD: np.ndarray, output: Output) -> list[str]:
    """Makes every table that is not in errors.json yet; returns the last lines."""
    path = output.folder / "errors.json"
    tried, rows = _recipes(settings, table_VD.shape), _known(path, output.heading)
    lacking = [recipe for recipe in tried if recipe not in rows]
    make, done = BareTable(table_VD).compressor, len(tried) - len(lacking)
    label = f"compressing {Path(settings.model_path).name}"
    with Progress(label, len(tried), start=done) as progress:
        for recipe in progress.track(lacking):
            try:
                candidate = make(recipe)
            except BudgetTooSmall as error:
                say(f"left out: rank {recipe.rank}, {in_bands(recipe)}: {error}")
                continue
            rows[recipe] = _row(candidate, table_VD)
            _write(path, output, {"rows": list(rows.values())})
    if not rows:
        raise UserError("no table fits: raise ranks")
    _write(path, output, {"rows": list(rows.values())})
    content = output.heading | {"rows": list(rows.values())}
    report = write_table_report(output.folder, content)
    errors = [row.relative_error for row in rows.values()]
    smallest = best_rows(list(rows.values()))[0].bytes
    bound = override("compress.max_bytes", smallest)
    return [
        f"{len(rows)} tables, relative errors from {min(errors):.4f} to "
        f"{max(errors):.4f}: {report}",
        f"write the best one of a size: add {bound}",
    ]


def _known(path: Path, heading: dict[str, Any]) -> dict[Recipe, ErrorRow]:
    """The rows of an earlier sweep of this table; moves that of another one aside."""
    earlier = read_json(path, REMEDY) or {}
    if any(earlier.get(name) != heading[name] for name in ("sha256_of_table", "codes")):
        move_aside(path)
        return {}
    check_fields(earlier, {"rows": (list,)}, path, REMEDY)
    rows = [
        ErrorRow.of(row, f"{path}: row {number}")
        for number, row in enumerate(earlier["rows"])
    ]
    return {row.recipe: row for row in rows}


def _row(candidate: Candidate, own_VD: np.ndarray) -> ErrorRow:
    return ErrorRow(
        **dataclasses.asdict(candidate.recipe),
        params=candidate.table.parameters,
        bytes=candidate.bytes,
        relative_error=relative_error(candidate.dense, own_VD),
        seconds=candidate.seconds,
    )


def _fit(settings: Settings, table_VD: np.ndarray, output: Output) -> list[str]:
    """Writes the table of the smallest error within a bound; returns the last lines."""
    options = settings.replace({"compress.bands": (1,)}).compress
    chosen, _ = find(BareTable(table_VD), _methods(settings), options)
    candidate, place = chosen.candidate, output.folder / ADVISED
    row = _row(candidate, table_VD)
    table_sha256 = (candidate.codes or candidate.table).sha256
    found = {"bounds": options.bounds, "table_sha256": table_sha256}
    lines = [
        f"{full_name(row)}: {row.params:,} numbers in {row.bytes:,} bytes, relative "
        f"error {row.relative_error:.4f}",
        f"table: {place}",
    ]
    path = place / "advice.json"
    earlier = read_json(path, REMEDY) or {}
    if all(earlier.get(name) == value for name, value in strict(found).items()):
        return lines
    written = place.with_name(f".{place.name}.partial")
    shutil.rmtree(written, ignore_errors=True)  # A killed command may have left it.
    write_table(written, candidate)
    _write(written / path.name, output, found | {"chosen": row})
    move_aside(place)
    written.rename(place)
    return lines


def _write(path: Path, output: Output, content: dict[str, Any]) -> None:
    output.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, output.heading | content)
