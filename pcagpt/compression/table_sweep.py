"""Compresses a table without its model: many tables, or the one that fits a bound.

A sweep writes errors.json with an `ErrorRow` per table, a report, and the best table of
each kind and rank. A search writes advised/ with its table and advice.json.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pcagpt.compression.advise import ADVISED, find
from pcagpt.compression.bare_table import BareTable
from pcagpt.compression.output import Output
from pcagpt.compression.sweep import measure_each, models_of, resume, write_sweep
from pcagpt.compression.table_files import ADVICE, holds_table, replace_table
from pcagpt.config.schema import CompressSettings
from pcagpt.json_files import read_json, strict
from pcagpt.report import table_text, write_table_report
from pcagpt.rows import REMEDY, ErrorRow, Recipe


def sweep_table(
    table: BareTable, tried: list[Recipe], output: Output
) -> dict[str, Any]:
    """Makes the table of every recipe; writes the rows, report and the best tables.

    Keeps the rows that an earlier sweep measured under the same protocol, and the best
    tables, if they still are. Moves others aside. Returns the content of errors.json.

    Raises UserError if all recipes are left out, because no table fits.
    """
    heading, measured = resume(table, output, ErrorRow)
    output, known = dataclasses.replace(output, heading=heading), set(measured)

    def write(tried: list[Recipe]) -> dict[str, Any]:
        return write_sweep(output, tried, measured, known)

    def report(content: dict[str, Any]) -> Any:
        return write_table_report(output.folder, content)

    tried = measure_each(table, tried, measured, table.row, write, report, table_text)
    every = models_of(output.folder, list(measured))
    for place in sorted(models_of(output.folder, tried)):
        best = min(every[place], key=lambda recipe: measured[recipe].error)
        if not holds_table(place, best.method, measured[best].table_sha256):
            candidate = table.compressor(best)
            # Another machine may have made the row: it rounds in another way.
            measured[best] = table.row(candidate)
            known.discard(best)
            output.check()
            replace_table(place, candidate, table.origin)
    content = write(tried)
    print(f"report: {report(content)}", flush=True)
    return content


def advise_table(
    table: BareTable,
    methods: Sequence[str],
    options: CompressSettings,
    output: Output,
) -> None:
    """Finds the table that fits the bound; writes it into advised/, with advice.json.

    A table for another bound is moved aside. Raises UserError as `find` does.
    """
    chosen, tried = find(table, methods, options)
    candidate, place = chosen.candidate, output.folder / ADVISED
    row = table.row(candidate)
    if "max_bytes" in options.bounds and candidate.note:
        print(candidate.note, flush=True)
    print(f"{table_text(row, table.table_VD.shape)}\ntable: {place}", flush=True)
    # The row of rounded factors has no hash.
    own = {"bounds": options.bounds, "written_sha256": candidate.sha256}
    own["protocol"] = output.heading["protocol"]
    earlier = read_json(place / ADVICE, REMEDY) or {}
    is_same = all(earlier.get(name) == value for name, value in strict(own).items())
    if is_same and holds_table(place, row.method, candidate.sha256):
        return
    output.check()
    trials = [table.row(trial.candidate) for trial in tried]
    advice = output.heading | output.made_by | own | {"chosen": row, "trials": trials}
    replace_table(place, candidate, table.origin, advice)
