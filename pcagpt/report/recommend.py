"""Which tables a report recommends, and which of a sweep it compares with these.

`sweep` is the content of sweep.json as `read_sweep` returns it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pcagpt.methods import CODED, RIVALS
from pcagpt.rows import Row, Stored, row_of_model

SMALL_COST = 0.01  # nats: a table that adds at most this is recommended


def preference(
    limit: float, size: float, added: float, at_most: float
) -> tuple[float, ...]:
    """The sort key of a table: the first one is recommended.

    That is the smallest which surely adds at most `limit`: the upper end of its
    interval, `at_most`, does. Of tables of one size, it is the one that adds less. If
    no table is within the limit, it is the one that adds least.
    """
    return (0, size, added) if at_most <= limit else (1, added)


def recommended_row(sweep: dict[str, Any]) -> Row:
    """The recommended table, within `SMALL_COST` if one is; it can be a rival.

    Of the rows of one model, only that of its table can be; an earlier command may have
    measured it.
    """
    return _recommended(_candidates(sweep))


def recommended_model(sweep: dict[str, Any]) -> Row | None:
    """As `recommended_row`, of the tables that have a model in the sweep's folder."""
    return _recommended(row for row in _candidates(sweep) if model_of(row, sweep))


def passed_over(sweep: dict[str, Any]) -> Row | None:
    """The row that would be recommended if another one were not its model's."""
    best = recommended_row(sweep)
    row = _recommended([best, *sweep["rows"]])
    return None if row is best else row


def tables_of(sweep: dict[str, Any]) -> list[Row]:
    """The rows, and the recommended one if only an earlier command measured it."""
    rows, best = sweep["rows"], recommended_row(sweep)
    return rows if best in rows else [*rows, best]


def _candidates(sweep: dict[str, Any]) -> list[Row]:
    """The rows, but of those of one model only that of its table.

    That is the table that was written, if this is known. A sweep on another split than
    'val' has no models.
    """
    rows = sweep["rows"]
    if sweep["protocol"].get("split", "val") != "val":
        return rows
    known = [*rows, *(sweep.get("other_rows") or ())]
    found = [row for row in rows if not row.model_name]
    for name in dict.fromkeys(row.model_name for row in rows if row.model_name):
        of_name = [row for row in known if row.model_name == name]
        written = [row for row in of_name if model_of(row, sweep)]
        found.append(row_of_model(written or of_name))
    return found


def _recommended(rows: Iterable[Row]) -> Row | None:
    def key(row: Row) -> tuple[float, ...]:
        return preference(SMALL_COST, row.bytes, row.added_loss, _highest_added(row))

    return min(rows, key=key, default=None)


def is_cheap(row: Row) -> bool:
    """Whether a table surely adds at most `SMALL_COST`."""
    return _highest_added(row) <= SMALL_COST


def _highest_added(row: Row) -> float:
    """The upper end of the interval of the added loss, or the added loss itself."""
    return (row.added_loss_interval or [row.added_loss])[-1]


def rounded_row(sweep: dict[str, Any]) -> Row | None:
    """The smallest rival that surely adds no more than the recommended row.

    Or no more than SMALL_COST, if that is more. None if no rival does.
    """
    limit = max(_highest_added(recommended_row(sweep)), SMALL_COST)
    rivals = (row for row in sweep["rows"] if row.method in RIVALS)
    cheap = (row for row in rivals if _highest_added(row) <= limit)
    return min(cheap, key=lambda row: (row.bytes, row.added_loss), default=None)


def model_of(row: Row, sweep: dict[str, Any]) -> str | None:
    """The name of the folder with the model of a row, None without one."""
    models = sweep.get("models")
    if models is None:  # Older versions did not record which table each model has.
        return row.model_name
    made = models.get(row.model_name)
    return row.model_name if made == dataclasses.asdict(row.recipe) else None


def form_of(row: Stored, heading: Mapping[str, Any]) -> str:
    """The smallest form in which the model of a row is exported: `format` of a command.

    heading: of sweep.json or advice.json. 'hf-factored' holds one table for both sides,
    and not every architecture.
    """
    if row.method == CODED:
        return CODED
    is_small = row.is_codes or any(row.band_ranks)
    # Older versions did not record what holds factors.
    holds = heading.get("holds_factors") is not False
    has_side = bool(heading["protocol"].get("side"))
    return "hf-factored" if is_small and holds and not has_side else "hf"


def compared_rows(sweep: dict[str, Any]) -> list[Row]:
    """The recommended row and, of every other kind, the row nearest to its size.

    A kind is a method in one band or in several, whatever their number and the bits.
    """
    best, nearest = recommended_row(sweep), {}
    for row in sweep["rows"]:
        kind = row.method, row.bands > 1
        known = nearest.setdefault(kind, row)
        if _distance(row, best) < _distance(known, best):
            nearest[kind] = row
    nearest[best.method, best.bands > 1] = best
    return sorted(nearest.values(), key=lambda row: row.added_loss)


def _distance(row: Row, other: Row) -> tuple[float, float]:
    """How far the sizes of two tables are apart; then the added loss."""
    return abs(math.log(row.bytes / other.bytes)), row.added_loss
