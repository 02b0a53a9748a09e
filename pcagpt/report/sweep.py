"""sweep.json -> tables and texts of the report on a compression sweep.

`sweep` is the content of sweep.json as `read_sweep` returns it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcagpt.factorization import FLOAT_BYTES, SMALLEST_ADDED
from pcagpt.methods import CODES, METHODS, RIVALS
from pcagpt.report.compare import INTERVAL
from pcagpt.report.recommend import (
    SMALL_COST,
    compared_rows,
    form_of,
    is_cheap,
    passed_over,
    recommended_model,
    recommended_row,
    rounded_row,
    tables_of,
)
from pcagpt.report.row_text import full_name, row_name
from pcagpt.report.text import (
    NOTHING,
    Column,
    Markdown,
    count,
    fixed,
    percent,
    plain,
    signed,
    times,
    with_interval,
)
from pcagpt.rows import Row, Stored
from pcagpt.run import provenance

SPLIT_TITLES = {"train": "training", "val": "validation", "test": "test"}
SMALL_LOSS = 0.3  # nats: predictions should be accurate up to here


def sweep_view(sweep: dict[str, Any]) -> dict[str, Any]:
    """The data that the template sweep.md.j2 shows."""
    rows = sorted(tables_of(sweep), key=lambda row: (row.bytes, row.added_loss))
    best, compared = recommended_row(sweep), compared_rows(sweep)
    model = recommended_model(sweep)
    rounded, passed = rounded_row(sweep), passed_over(sweep)
    measured = table_columns(sweep)
    short = [column for column in measured if column.title in _SHORT]

    makers = [sweep, *(sweep.get("recovered") or ())]

    def named(row: Row) -> str:
        name = row_name(row.method, row.bands, row.bits)
        return Markdown(f"**{name}**") if row is best else name

    return {
        "sweep": sweep | provenance.joined(makers),
        "split": SPLIT_TITLES[sweep["protocol"].get("split", "val")],
        "interval_name": INTERVAL,
        "baseline": baseline_of(sweep),
        "best": best,
        "best_name": full_name(best),
        "model": model,
        "model_name": full_name(model) if model else "",
        "is_cheap": is_cheap(best),
        "form": form_of(model, sweep) if model else None,
        "can_sample": not _is_other_architecture(sweep),
        "rounded": rounded,
        "rounded_name": full_name(rounded) if rounded else "",
        "passed_over": passed,
        "passed_over_name": full_name(passed) if passed else "",
        "samples": sweep.get("samples") or (),
        "compared": compared,
        "short": [Column("Table", "bold: the table above", named, "l"), *short],
        "has_limit": bool(limit_points(sweep)),
        "sizes": equal_size_columns(sweep),
        "at_sizes": _at_sizes(sweep),
        "recovery": recovery_rows(sweep),
        "recovery_columns": RECOVERY_COLUMNS,
        "recovers_codes": any(
            row.get("method") in CODES for row in sweep.get("recovered") or ()
        ),
        "rows": rows,
        "columns": measured,
        "methods": methods_in(rows),
        "accuracy": _accuracy(rows),
        "smallest_added": SMALLEST_ADDED,
        "small_cost": SMALL_COST,
        "small_loss": SMALL_LOSS,
    }


_SHORT = ("Bytes", "Bits", "Smaller", "Added", "Top-1")


def table_columns(sweep: dict[str, Any]) -> list[Column]:
    """What the report shows of each row of a sweep."""
    named, smaller, made = stored_columns(sweep)

    def cell(row: Row) -> str:
        return signed(row.predicted_loss, 4) + ("°" if row.is_anchor else "")

    predicted = Column(
        "Predicted",
        "second-order estimate of the added loss, scaled for each method to fit the "
        "tables marked °; a method without ° uses the scale of the ° table with the "
        "smallest estimate",
        cell,
    )
    is_predicted = any(row.is_anchor for row in sweep["rows"])
    return [
        *named,
        Column(
            "Added",
            "loss with this table minus loss with D's table, in nats per token, ± "
            f"half of its {INTERVAL} over evaluation windows, each measured with both "
            "tables",
            lambda row: with_interval(row.added_loss, row.added_loss_interval),
        ),
        smaller,
        Column(
            "Top-1",
            "share of positions where the most likely token stays the same",
            lambda row: percent(row.top1_agreement),
        ),
        Column(
            "KL",
            "mean divergence of the predictions, KL(D ‖ compressed), in nats",
            lambda row: fixed(row.kl, 4),
        ),
        Column(
            "Input",
            "added loss if only the input uses the table",
            lambda row: signed(row.added_loss_input, 4),
        ),
        Column(
            "Head",
            "added loss if only the head uses the table",
            lambda row: signed(row.added_loss_head, 4),
        ),
        *([predicted] if is_predicted else []),
        *made,
    ]


def stored_columns(
    sweep: dict[str, Any],
) -> tuple[list[Column], Column, list[Column]]:
    """(its name and size, how much smaller it is, how it was made), of each row."""
    own = own_size(sweep)
    named = [
        Column(
            "Table",
            "the method, the number of frequency bands if there are several, and the "
            "bits of a stored value if they are not 32",
            lambda row: row_name(row.method, row.bands, row.bits),
            "l",
        ),
        Column(
            "k",
            "the rank of factors with one band of this size; a file of codes has at "
            "most as many bytes as factors of this rank have values",
            lambda row: str(row.rank or NOTHING),
        ),
        Column("Bytes", "of storage: of the file, for codes", lambda r: count(r.bytes)),
        Column(
            "Bits",
            "bits of storage for each number of D's table",
            lambda row: fixed(8 * row.bytes / own["params"], 2),
        ),
    ]
    smaller = Column(
        "Smaller",
        "bytes of D's table in float32, divided by these bytes",
        lambda row: times(own["bytes"] / row.bytes),
    )
    made = [
        Column("Numbers", "stored values", lambda row: count(row.params)),
        Column(
            "Memory",
            "bytes of the table on a device that computes with it",
            lambda row: count(row.memory),
        ),
        Column("Seconds", "time to make the table", lambda row: fixed(row.seconds, 1)),
    ]
    return named, smaller, made


def _is_other_architecture(sweep: dict[str, Any]) -> bool:
    """Whether transformers computes the model. Older files only name its version."""
    packages = sweep.get("versions") or {}
    return bool(sweep.get("architecture") or "transformers" in packages)


def limit_points(sweep: dict[str, Any]) -> list[tuple[int, float]]:
    """(bytes, loss) of the Gaussian rate-distortion line, about a sweep's tables."""
    sizes = [row.bytes for row in sweep["rows"]]
    return [
        (size, loss)
        for size, loss in sweep.get("gaussian_limit") or ()
        if min(sizes) / 2 <= size <= max(sizes) and loss >= SMALLEST_ADDED
    ]


def methods_in(rows: Sequence[Stored]) -> dict[str, str]:
    """What each method in a sweep does, by the name that the tables show."""
    found = {}
    for row in rows:
        if method := METHODS.get(row.method):
            found[row.method] = method.words
        elif code := CODES.get(row.method):
            found[row.method] = code.words
        elif rival := RIVALS.get(row.method):
            found[rival.title] = rival.words
        else:
            found[row.method] = "a method of an earlier version"
    return found


def own_size(sweep: dict[str, Any]) -> dict[str, int]:
    """params, and bytes as float32, of the own table."""
    vocab_size, width = sweep["protocol"]["table"]
    numbers = vocab_size * width
    return {"params": numbers, "bytes": FLOAT_BYTES * numbers}


def baseline_of(sweep: dict[str, Any]) -> dict[str, Any]:
    """params, bytes (as float32) and loss of the model with its own table."""
    return {**own_size(sweep), "loss": sweep["rows"][0].loss}


def _at_sizes(sweep: dict[str, Any]) -> list[tuple[str, dict[int, str]]]:
    """Added loss of factors: (name, {rank: text}); the best of each rank is bold."""
    rows = [row for row in sweep["rows"] if row.is_factors]
    best: dict[int, float] = {}
    for row in rows:
        best[row.rank] = min(row.added_loss, best.get(row.rank, math.inf))
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        text = with_interval(row.added_loss, row.added_loss_interval)
        cell = Markdown(f"**{text}**") if row.added_loss == best[row.rank] else text
        found.setdefault(row_name(row.method, row.bands), {})[row.rank] = cell
    return list(found.items())


def equal_size_columns(sweep: dict[str, Any]) -> list[Column]:
    """A column of `_at_sizes` for each rank."""
    ranks = sorted({row.rank for row in sweep["rows"] if row.is_factors})
    meaning = (
        "added loss of factors with as many numbers as those of this rank in a band"
    )
    return [
        Column("Method", "", lambda found: found[0], "l"),
        *(
            Column(
                f"size of k={rank}",
                meaning if rank == ranks[0] else "",
                lambda found, rank=rank: found[1].get(rank, NOTHING),
            )
            for rank in ranks
        ),
    ]


RECOVERY_COLUMNS = [
    Column(
        "",
        "",
        lambda row: Markdown(f"**{row['letter']}**" if row.get("letter") else ""),
        "l",
    ),
    Column("Model", "", lambda row: row["name"], "l"),
    Column(
        "Size of", "", lambda row: f"k={row['rank']}" if row.get("rank") else NOTHING
    ),
    Column("Loss", "in nats per token", lambda row: fixed(row["val_loss"], 4)),
    Column(
        "Added",
        f"loss minus D's loss, ± half of its {INTERVAL} over evaluation windows, of "
        "one seed",
        lambda row: with_interval(row["added_loss"], row.get("interval")),
    ),
    Column(
        "Minus D+",
        "loss minus that of D+, which is D, trained further for the same steps",
        lambda row: with_interval(
            row.get("less_continued"), row.get("less_continued_interval")
        ),
    ),
    Column(
        "Tokens", "of the further training", lambda row: count(row.get("tokens_seen"))
    ),
    Column("Share of D's tokens", "", lambda row: percent(row.get("share_of_tokens"))),
    Column("Learning rate", "the peak", lambda row: plain(row.get("learning_rate"))),
]


def recovery_rows(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Added loss of compressed models before and after training, and of D+."""
    recovered, rows = sweep.get("recovered") or (), []
    loss = baseline_of(sweep)["loss"]
    ranks = dict.fromkeys(row.get("rank") for row in recovered)
    for rank in filter(None, ranks):
        measured = {
            row_name(row.method, row.bands): row
            for row in sweep["rows"]
            if row.rank == rank and (row.is_factors or row.is_codes)
        }
        runs: dict[str, list[dict[str, Any]]] = {}  # by the table they started from
        for row in recovered:
            if row.get("rank") == rank:
                runs.setdefault(row_name(row["method"], row["bands"]), []).append(row)
        untrained = {name: of[0].get("added_at_start") for name, of in runs.items()}
        if "svd" in measured:
            untrained = {"svd": measured["svd"].added_loss} | untrained
        for name, added in untrained.items():
            interval = measured[name].added_loss_interval if name in measured else None
            start = {"name": name, "rank": rank, "added_loss": added}
            val_loss = None if added is None else loss + added
            rows.append(start | {"val_loss": val_loss, "interval": interval})
            for row in runs.get(name, ()):
                on = " on D's predictions" if row.get("letter") == "Bd" else ""
                rows.append(row | {"name": f"{name}, trained further{on}"})
    for row in recovered:
        if row.get("rank") is None:
            none = {"less_continued": None, "less_continued_interval": None}
            rows.append(row | none | {"name": "D, trained further"})
    return rows


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
