"""sweep.json -> tables and texts of the report on a compression sweep.

`sweep` is the content of sweep.json as `read_sweep` returns it.
"""

import math
from typing import Any

import numpy as np

from pcagpt.factorization import FLOAT_BYTES, SMALLEST_ADDED
from pcagpt.methods import CODES, RIVALS
from pcagpt.report.compare import INTERVAL
from pcagpt.report.text import (
    NOTHING,
    Markdown,
    count,
    fixed,
    render,
    signed,
    table,
    with_interval,
)
from pcagpt.rows import Row

SPLIT_TITLES = {"train": "training", "val": "validation", "test": "test"}
SMALL_LOSS = 0.3  # nats: predictions should be accurate up to here


def sweep_view(sweep: dict[str, Any]) -> dict[str, Any]:
    """The data that the template sweep.md.j2 shows."""
    rows = sorted(sweep["rows"], key=lambda row: (row.bytes, row.added_loss))
    return {
        "sweep": sweep,
        "split": SPLIT_TITLES[sweep["protocol"].get("split", "val")],
        "interval_name": INTERVAL,
        "baseline": baseline_of(sweep),
        "equal_size": (
            equal_size_table(sweep) if any(row.is_factors for row in rows) else None
        ),
        "recovery": recovery_table(sweep) if sweep.get("recovered") else None,
        "recovers_codes": any(
            row["method"] in CODES for row in sweep.get("recovered") or ()
        ),
        "rows": [(row_name(row.method, row.bands, row.bits), row) for row in rows],
        "accuracy": _accuracy(rows),
        "smallest_added": SMALLEST_ADDED,
        "small_loss": SMALL_LOSS,
    }


def of_rank(rank: int) -> str:
    """The name of a rank, 0 for full width."""
    return f"rank {rank}" if rank else "full width"


def advice_text(row: Row, table: tuple[int, int]) -> str:
    """Describes the choice for a table [V, D] in a few lines for the terminal."""
    bands = ", ".join(
        f"{size} tokens" + ("" if row.method in CODES else f" at {of_rank(rank)}")
        for size, rank in zip(row.band_sizes, row.band_ranks, strict=True)
    )
    bits = 8 * row.bytes / math.prod(table)
    return (
        f"{row_name(row.method, row.bands, row.bits)}: {count(row.params)} numbers in "
        f"{count(row.bytes)} bytes, {fixed(bits, 2)} bits for each of D's table\n"
        f"bands: {bands}\n"
        f"added loss: {signed(row.predicted_loss, 4)} predicted, "
        f"{with_interval(row.added_loss, row.added_loss_interval)} measured, in nats "
        f"per token (±: {INTERVAL})"
    )


def baseline_of(sweep: dict[str, Any]) -> dict[str, Any]:
    """params, bytes (as float32) and loss of the model with its own table."""
    vocab_size, width = sweep["protocol"]["table"]
    numbers = vocab_size * width
    return {
        "params": numbers,
        "bytes": FLOAT_BYTES * numbers,
        "loss": sweep["rows"][0].loss,
    }


def table_name(method: str, bands: str, bits: int = 32) -> str:
    """Joins the parts of a name that apply: 'context, 12 bands, int8'."""
    if method in RIVALS:
        return RIVALS[method].name.format(bits=bits)
    rounding = f"int{bits}" if 0 < bits < 32 else ""
    return ", ".join(filter(None, [method, bands, rounding]))


def row_name(method: str, bands: int, bits: int = 32) -> str:
    """The name of a row's table."""
    return table_name(method, f"{bands} bands" if bands > 1 else "", bits)


def equal_size_table(sweep: dict[str, Any]) -> Markdown:
    """Added loss: a row for each method and number of bands, a column for each rank."""
    rows = [row for row in sweep["rows"] if row.is_factors]
    ranks = sorted({row.rank for row in rows})
    best = {k: min(row.added_loss for row in rows if row.rank == k) for k in ranks}
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        text = with_interval(row.added_loss, row.added_loss_interval)
        cell = f"**{text}**" if row.added_loss == best[row.rank] else text
        found.setdefault(row_name(row.method, row.bands), {})[row.rank] = cell
    lines = [[n, *(cells.get(k, NOTHING) for k in ranks)] for n, cells in found.items()]
    header = ["Method", *(f"size of k={rank}" for rank in ranks)]
    return table(header, lines, "l" + "r" * len(ranks))


def recovery_table(sweep: dict[str, Any]) -> Markdown:
    """Added loss of compressed models before and after training, and of D+."""
    recovered, rows, loss = sweep["recovered"], [], baseline_of(sweep)["loss"]
    for rank in dict.fromkeys(row["rank"] for row in recovered if row["rank"]):
        measured = {
            row_name(row.method, row.bands): row
            for row in sweep["rows"]
            if row.rank == rank and (row.is_factors or row.is_codes)
        }
        runs: dict[str, list[dict[str, Any]]] = {}  # by the table they started from
        for row in recovered:
            if row["rank"] == rank:
                runs.setdefault(row_name(row["method"], row["bands"]), []).append(row)
        untrained = {name: of[0]["added_at_start"] for name, of in runs.items()}
        if "svd" in measured:
            untrained = {"svd": measured["svd"].added_loss} | untrained
        for name, added in untrained.items():
            interval = measured[name].added_loss_interval if name in measured else None
            start = {"name": name, "rank": rank, "added_loss": added}
            val_loss = None if added is None else loss + added
            rows.append(start | {"val_loss": val_loss, "interval": interval})
            for row in runs.get(name, ()):
                on = " on D's predictions" if row["letter"] == "Bd" else ""
                rows.append(row | {"name": f"{name}, trained further{on}"})
    for row in recovered:
        if row["rank"] is None:
            none = {"less_continued": None, "less_continued_interval": None}
            rows.append(row | none | {"name": "D, trained further"})
    return render("recovery.md.j2", rows=rows, interval_name=INTERVAL)


def _accuracy(rows: list[Row]) -> dict[str, Any] | None:
    """Accuracy of the predictions on float32 tables that were not used to fit them."""
    pairs = [
        (row.predicted_loss, row.added_loss)
        for row in rows
        if not row.is_anchor
        and row.bits == 32
        and row.predicted_loss is not None
        and row.added_loss >= SMALLEST_ADDED
    ]
    if len(pairs) < 3:
        return None
    ranks = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
    errors = [abs(p / a - 1) for p, a in pairs if a <= SMALL_LOSS]
    return {
        "tables": len(pairs),
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "largest_error": max(errors, default=None),
    }
