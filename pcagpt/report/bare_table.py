"""errors.json -> what the report on a table without its model shows, and the terminal.

`errors` is the content of errors.json with `ErrorRow`s.
"""

from pathlib import Path
from typing import Any

from pcagpt.config.command_line import next_command
from pcagpt.methods import FREE, METHODS
from pcagpt.report.row_text import full_name, size_text
from pcagpt.report.sweep import methods_in, own_size, stored_columns
from pcagpt.report.text import Column, count, fixed, times
from pcagpt.rows import ErrorRow


def table_view(errors: dict[str, Any]) -> dict[str, Any]:
    """The data that the template bare_table.md.j2 shows."""
    named, smaller, made = stored_columns(errors)
    measured = [
        Column(
            "Relative error",
            "‖table − D‖ / ‖D‖ in Frobenius norm",
            lambda row: error_text(row.relative_error),
        ),
        Column(
            "Energy kept",
            "1 minus the squared relative error; of svd, the share of the squared "
            "singular values",
            lambda row: energy_text(row.energy_kept),
        ),
    ]
    if has_estimates(errors):
        meaning = (
            "second-order estimate of the added loss from the statistics, in nats per "
            "token; not measured"
        )
        cell = Column("Estimate", meaning, lambda row: error_text(row.estimated_loss))
        measured.append(cell)
    return {
        "errors": errors,
        "own": own_size(errors),
        "has_estimates": has_estimates(errors),
        "rows": sorted(errors["rows"], key=lambda row: (row.bytes, row.error)),
        "columns": [*named, smaller, *measured, *made],
        "best": [(full_name(row), row, errors_text(row)) for row in best_rows(errors)],
        "for_bound": _next(errors).partition(": ")[2],
        "methods": methods_in(errors["rows"]),
        "written": sorted({row.model_name for row in errors["rows"]} - {None}),
    }


def has_estimates(errors: dict[str, Any]) -> bool:
    """Whether the statistics of the model were known."""
    return errors["protocol"]["statistics_sha256"] is not None


def best_rows(errors: dict[str, Any]) -> list[ErrorRow]:
    """The rows by bytes. No row with as few bytes has a smaller error.

    Without those that are no smaller than the own table, unless all are.
    """
    own, best = own_size(errors)["bytes"], []
    rows = sorted(errors["rows"], key=lambda row: (row.bytes, row.error))
    for row in [row for row in rows if row.bytes < own] or rows:
        if not best or row.error < best[-1].error:
            best.append(row)
    return best


def table_lines(errors: dict[str, Any], folder: Path, workdir: str) -> list[str]:
    """The best tables, where they are, and a command for one of another size.

    folder: of the sweep; workdir: for what the next command writes.
    """
    own = own_size(errors)["bytes"]
    what = "the estimate" if has_estimates(errors) else "relative error"
    rows = [
        f"  {full_name(row)}: {count(row.bytes)} bytes ({times(own / row.bytes)} "
        f"smaller than in float32), {errors_text(row)}"
        for row in best_rows(errors)
    ]
    return [
        f"best for their bytes, by {what}:",
        *rows,
        f"the best of each kind and rank, none rounded: {folder / 'best_*'}",
        _next(errors, workdir=workdir),
    ]


def _next(errors: dict[str, Any], **knobs: str) -> str:
    """A command for a table of a tenth of the bytes, or as few as one here has."""
    bound = max(own_size(errors)["bytes"] // 10, best_rows(errors)[0].bytes)
    asked = {**knobs, "compress.max_bytes": bound}
    return next_command("compress", Path(errors["source"]), **asked)


def table_text(row: ErrorRow, table: tuple[int, int]) -> str:
    """Describes the choice for a table [V, D] in a few lines for the terminal."""
    return f"{size_text(row, table)}\n{errors_text(row)}"


def lacking_line(statistics: Path | None, is_checked: bool) -> str:
    """What was not measured of a bare table, and what that needs.

    `statistics` is where those of the model would have to be, None if they are there.
    `is_checked`: whether they are known to be of this table.
    """
    loss = "not measured: loss, which needs the model itself as model_path"
    if statistics is None:
        unknown = "not checked: whether the statistics are of this table's model"
        return loss if is_checked else f"{loss}; {unknown}"
    needing = ", ".join(name for name in METHODS if name not in FREE)
    return f"{loss}; not tried: {needing}, which need its statistics as {statistics}"


def error_text(value: float) -> str:
    """0.031234 → '0.03123': errors differ by orders of magnitude."""
    return f"{value:.4g}"


def energy_text(value: float) -> str:
    """0.99995 → '100.00%'."""
    return f"{fixed(100 * value, 2)}%"


def errors_text(row: ErrorRow) -> str:
    """'relative error 0.0312, energy kept 99.9%', and the estimate if there is one."""
    text = (
        f"relative error {error_text(row.relative_error)}, energy kept "
        f"{energy_text(row.energy_kept)}"
    )
    if row.estimated_loss is None:
        return text
    estimate = error_text(row.estimated_loss)
    return f"{text}, added loss {estimate} nats per token by a second-order estimate"
