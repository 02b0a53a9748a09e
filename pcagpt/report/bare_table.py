"""errors.json -> tables and texts of the report on a table without its model."""

import math
from typing import Any

from pcagpt.factorization import FLOAT_BYTES
from pcagpt.report.sweep import full_name, methods_in, row_name
from pcagpt.report.text import NOTHING, Column, count, fixed, times


def table_view(errors: dict[str, Any]) -> dict[str, Any]:
    """The data that the template bare_table.md.j2 shows."""
    rows = sorted(errors["rows"], key=lambda row: (row.bytes, row.relative_error))
    numbers = math.prod(errors["table"])
    return {
        "errors": errors,
        "rows": rows,
        "numbers": numbers,
        "bytes": FLOAT_BYTES * numbers,
        "best": [(row, full_name(row)) for row in best_rows(rows)],
        "columns": _columns(numbers),
        "methods": methods_in(rows),
    }


def best_rows(rows: list[Any]) -> list[Any]:
    """The rows of which none that is smaller has a smaller error, by size."""
    found: list[Any] = []
    for row in sorted(rows, key=lambda row: (row.bytes, row.relative_error)):
        if not found or row.relative_error < found[-1].relative_error:
            found.append(row)
    return found


def _columns(numbers: int) -> list[Column]:
    return [
        Column(
            "Table",
            "the method, and the bits of a stored value if they are not 32",
            lambda row: row_name(row.method, row.bands, row.bits),
            "l",
        ),
        Column(
            "k",
            "the rank of factors; a file of codes has at most as many bytes as factors "
            "of this rank have values",
            lambda row: str(row.rank or NOTHING),
        ),
        Column("Bytes", "of storage: of the file, for codes", lambda r: count(r.bytes)),
        Column(
            "Bits",
            "bits of storage for each number of the table",
            lambda row: fixed(8 * row.bytes / numbers, 2),
        ),
        Column(
            "Smaller",
            "bytes of the table in float32, divided by these bytes",
            lambda row: times(FLOAT_BYTES * numbers / row.bytes),
        ),
        Column(
            "Relative error",
            "Frobenius norm of the error, divided by that of the table",
            lambda row: fixed(row.relative_error, 4),
        ),
        Column("Numbers", "stored values", lambda row: count(row.params)),
        Column("Seconds", "time to make the table", lambda row: fixed(row.seconds, 1)),
    ]
