"""The figures of the reports: each is declared once, as `chart` describes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcagpt.arms import ARMS, Arm
from pcagpt.factorization import FLOAT_BYTES, SMALLEST_ADDED, energy_kept
from pcagpt.losses.deciles import DECILES
from pcagpt.methods import CODES, METHODS, RIVALS
from pcagpt.report.bare_table import energy_text, error_text
from pcagpt.report.chart import Figure, Look, axis, bars, mark, panel
from pcagpt.report.recommend import compared_rows, tables_of
from pcagpt.report.row_text import full_name, row_name, table_name
from pcagpt.report.sweep import baseline_of, limit_points, own_size
from pcagpt.report.text import count, fixed, percent, plus_minus, signed, with_interval
from pcagpt.rows import AnyRow, Row, Stored

INK = "#222222"
START_SHARE = 0.08  # of the tokens; the loss axis fits the curves after it
STAR = "M0,-1L.23,-.32L.95,-.31L.38,.12L.59,.81L0,.4L-.59,.81L-.38,.12L-.95,-.31Z"
# By bits of a stored value; 0 for codes.
BITS_SHAPES = {
    **{32: "circle", 8: "square", 6: "triangle-up", 5: "triangle-down"},
    **{4: "diamond", 0: STAR},
}
BITS_DASHES = {32: [], 8: [6, 3], 6: [5, 2], 5: [3, 2], 4: [2, 2], 0: []}
BITS_TICKS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LIMIT = "Gaussian R(D), weighting of codes"
_LOSS = "loss (nats per token)"
_ADDED = axis("drawn", f"added {_LOSS}", "log"), ["Added loss", "Top-1", "KL"]
SMALLEST_ERROR = 1e-3  # Smaller relative errors are drawn here.


def curves_figure(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Draws validation loss against tokens, a panel per rank; None without curves."""
    rows = [row for row in rows if row["curve"]]
    if not rows:
        return None
    curves = {row["folder"]: np.array(row["curve"], np.float64).T for row in rows}
    axes = {
        "x": axis("tokens", "training tokens (millions)"),
        "y": axis("loss", f"validation {_LOSS}", domain=_loss_limits(curves.values())),
    }
    panels = []
    for rank in sorted({row["rank"] for row in rows if row["rank"]}) or [None]:
        points, looks = [], {}
        for row in rows:
            if row["rank"] not in (None, rank):
                continue
            arm, (tokens, losses) = ARMS[row["arm"]], curves[row["folder"]]
            shifts = {_name(arm): (0, [])}
            if arm.is_fine_tuned and row["tokens_with_baseline"]:
                after = row["tokens_with_baseline"] - row["tokens_seen"]
                shifts[f"{arm.letter}, after D's tokens"] = after, [6, 3]
            for name, (shift, dash) in shifts.items():
                looks[name] = Look(arm.colour, arm.marker, dash=dash)
                points += [
                    {"of": name, "run": row["folder"], "Arm": name}
                    | {"tokens": (t + shift) / 1e6, "loss": loss}
                    | {"Tokens": count(t + shift), "Loss": fixed(loss, 4)}
                    for t, loss in zip(tokens, losses, strict=True)
                ]
        line = {"mark": mark("line"), "encoding": {"detail": {"field": "run"}}}
        panels.append(
            panel(points, looks, axes, [line], ["Arm", "Tokens", "Loss"], size=25)
            | ({"title": f"rank {rank}"} if rank else {})
        )
    return Figure(panels)


def size_figure(models: Sequence[dict[str, Any]]) -> Figure | None:
    """Draws loss against parameters of the table and of the model; None without sizes.

    `models` come from `pcagpt.report.experiment.means_over_seeds`.
    """
    fields = {"params_embedding": "token table", "params_total": "whole model"}
    models = [m for m in models if all(m.get(f) for f in ("val_loss", *fields))]
    if not models:
        return None
    looks = {
        _name(arm): Look(arm.colour, arm.marker)
        for arm in ARMS.values()
        if any(m["letter"] == arm.letter for m in models)
    }
    points = [
        {name: m[field] / 1e6 for field, name in fields.items()}
        | {"of": _name(ARMS[m["arm"]]), "loss": m["val_loss"], "Arm": m["title"]}
        | {"low": m["val_loss"] - (m["half"] or 0)}
        | {"high": m["val_loss"] + (m["half"] or 0), "Rank": count(m["rank"])}
        | {"Loss": plus_minus(m["val_loss"], m["half"])}
        | {"Added": plus_minus(m.get("added_loss"), m["added_half"], signed)}
        | {"Table": count(m["params_embedding"]), "Model": count(m["params_total"])}
        for m in models
    ]
    layers = [
        {"mark": mark("line"), "encoding": {"detail": {"field": "of"}}},
        bars("low", "high"),
    ]
    panels = []
    for name in fields.values():
        title, kind = f"parameters of the {name} (millions)", "log"
        axes = {"x": axis(name, title, kind if name == "token table" else "linear")}
        axes["y"] = axis("loss", f"validation {_LOSS}")
        shown = ["Arm", "Rank", "Loss", "Added", "Table", "Model"]
        panels.append(panel(points, looks, axes, layers, shown))
    return Figure(panels)


def arms_decile_figure(models: Sequence[dict[str, Any]]) -> Figure | None:
    """Draws loss minus D's loss in each frequency decile, a panel per rank.

    `models` come from `pcagpt.report.experiment.with_deciles`; None without any.
    """
    axes = {"x": _decile_axis(), "y": axis("added", f"added {_LOSS}")}
    panels = []
    for rank in sorted({m["rank"] for m in models if m["rank"]}) or [None]:
        shown = [m for m in models if m["rank"] in (None, rank)]
        arms = [ARMS[m["arm"]] for m in shown]
        looks = {_name(arm): Look(arm.colour, arm.marker) for arm in arms}
        points = [
            {"of": _name(arm), "decile": decile, "added": added}
            | {"Arm": arm.title, "Rank": count(model["rank"]), "Decile": decile}
            | {"Loss": fixed(model["val_loss_by_decile"][decile - 1], 4)}
            | {"Added": signed(added, 4)}
            for model, arm in zip(shown, arms, strict=True)
            for decile, added in enumerate(model["added_loss_by_decile"], 1)
            if added is not None
        ]
        line = {"mark": mark("line"), "encoding": {"detail": {"field": "Rank"}}}
        told = ["Arm", "Rank", "Decile", "Loss", "Added"]
        panels.append(
            panel(points, looks, axes, [line], told)
            | ({"title": f"rank {rank}"} if rank else {})
        )
    return Figure(panels) if models else None


def spectrum_figure(
    singular_values: Sequence[float] | np.ndarray, ranks: Sequence[int]
) -> Figure:
    """Draws descending singular values [d] on a log scale, and the energy kept.

    The energy kept by each of `ranks` is marked.
    """
    values = np.asarray(singular_values, np.float64)
    energy = energy_kept(values)
    points = [
        {"rank": rank, "of": "", "energy": 100 * share, "value": value or None}
        | {
            "Rank": rank,
            "Energy kept": percent(share),
            "Singular value": f"{value:.4g}",
        }
        for rank, (value, share) in enumerate(zip(values, energy, strict=True), 1)
    ]
    marked = [p | {"text": f"rank {p['rank']}: {p['Energy kept']}"} for p in points]
    marked = [p for p in marked if p["rank"] in ranks]
    # Below the curve, which is concave, is room.
    side = {"expr": f"datum.rank < {len(values) / 2} ? 'left' : 'right'"}
    written = {"mark": {"type": "text", "align": side, "dy": 18}}
    written |= {"encoding": {"text": {"field": "text"}}}
    circles = {"mark": {"type": "point", "size": 90}}
    layers = [layer | {"data": {"values": marked}} for layer in (circles, written)]
    shown = ["Rank", "Singular value", "Energy kept"]
    at = {
        "x": axis("rank", "rank"),
        "y": axis("value", "singular value", "log"),
    }
    kept = at | {"y": axis("energy", "energy kept (%)", domain=[0, 104])}
    line, looks = {"mark": mark("line")}, {"": Look(INK)}
    layers = [line, *layers] if marked else [line]
    return Figure(
        [
            panel(points, looks, at, [line], shown, size=8),
            panel(points, looks, kept, layers, shown, size=8),
        ]
    )


def pareto_figure(sweep: dict[str, Any]) -> Figure:
    """Draws added loss of a sweep's tables against bytes, on log scales.

    If tables differ only in the number of bands, it shows the best. All tables of a
    rival are one line. A second axis has bits for each number of D's table.
    """
    rows, numbers = _best_bands(tables_of(sweep), _added), own_size(sweep)["params"]
    looks = {_legend(row): _look(row) for row in rows}
    if limit := _limit(sweep):
        looks[LIMIT] = Look(INK, "stroke", dash=[4, 4])
    points = [_of_row(row, numbers) for row in rows] + limit
    return Figure([_over_bytes(points, looks, _ADDED, numbers)])


def error_figure(sweep: dict[str, Any]) -> Figure:
    """Draws the relative error of a bare table's tables against bytes, on log scales.

    As `pareto_figure`, without losses.
    """
    rows = _best_bands(sweep["rows"], lambda row: row.error)
    numbers = own_size(sweep)["params"]
    points = [
        _place(row, numbers)
        | {"drawn": max(row.relative_error, SMALLEST_ERROR)}
        | {"Relative error": error_text(row.relative_error)}
        | {"Energy kept": energy_text(row.energy_kept)}
        for row in rows
    ]
    shown = axis("drawn", "relative error", "log"), ["Relative error", "Energy kept"]
    looks = {_legend(row): _look(row) for row in rows}
    return Figure([_over_bytes(points, looks, shown, numbers)])


def numbers_figure(sweep: dict[str, Any]) -> Figure | None:
    """As `pareto_figure`, against the stored numbers; None without factors."""
    rows = [row for row in _best_bands(sweep["rows"], _added) if row.is_factors]
    if not rows:
        return None
    numbers = own_size(sweep)["params"]
    points = [_of_row(row, numbers) for row in rows]
    looks = {_legend(row): _look(row) for row in rows}
    x = axis("M", "numbers stored (millions); grey: D's table", "log")
    return Figure([_over_size(points, looks, x, _ADDED, numbers)])


def _added(row: Row) -> float:
    return row.added_loss


def _best_bands(
    rows: Sequence[AnyRow], error: Callable[[AnyRow], float]
) -> list[AnyRow]:
    """The rows, without those of the same size in another number of bands."""
    best: dict[tuple, AnyRow] = {}
    for row in rows:
        key = _legend(row), row.budget, row.bits
        if key not in best or error(row) < error(best[key]):
            best[key] = row
    return list(best.values())


def _over_bytes(
    points: list[dict],
    looks: Mapping[str, Look],
    y: tuple[dict[str, Any], list[str]],
    numbers: int,
) -> dict[str, Any]:
    """As `_over_size`, against bytes and bits for each number of D's table."""
    x = axis("MB", "bytes stored (MB); grey: D's table in float32", "log")
    chart = _over_size(points, looks, x, y, FLOAT_BYTES * numbers)
    return _with_bits(chart, numbers)


def _over_size(
    points: list[dict],
    looks: Mapping[str, Look],
    x: dict[str, Any],
    y: tuple[dict[str, Any], list[str]],
    own: int,
) -> dict[str, Any]:
    """A chart against size, with a line at the size of D's own table.

    y: the axis of the field 'drawn', and what the tooltip shows of it.
    """
    own_table = {
        "data": {"values": [{x["field"]: own / 1e6}]},
        "mark": {"type": "rule", "clip": True, "strokeWidth": 2},
        "encoding": {
            "color": {"value": "#bbbbbb"},
            "y": {"value": 0},
            "y2": {"value": "height"},
        },
    }
    vertical, told = y
    layers = [own_table, {"mark": mark("line")}]
    if any("low" in point for point in points):
        layers.append(bars("low", "high"))
    shown = ["Table", "File", "Bits per number", *told]
    return panel(points, looks, {"x": x, "y": vertical}, layers, shown)


def decile_figure(sweep: dict[str, Any]) -> Figure | None:
    """Draws the added loss of each frequency decile, for tables of about one size."""
    rows, numbers = compared_rows(sweep), baseline_of(sweep)["params"]
    rows = [row for row in rows if row.added_loss_by_decile]
    if not rows:
        return None
    points, looks = [], {}
    for row in rows:
        name = f"{row_name(row.method, row.bands, row.bits)}, {row.bytes / 1e6:.3g} MB"
        looks[name] = _look(row)
        points += [
            _of_row(row, numbers)
            | {"of": name, "decile": decile, "Decile": decile}
            | {"drawn": max(loss, SMALLEST_ADDED), "Added in it": signed(loss, 4)}
            for decile, loss in enumerate(row.added_loss_by_decile, 1)
            if loss is not None
        ]
    axes = {"x": _decile_axis(), "y": axis("drawn", f"added {_LOSS}", "log")}
    shown = ["Table", "Decile", "Added in it", "Added loss", "File"]
    return Figure([panel(points, looks, axes, [{"mark": mark("line")}], shown)])


def _decile_axis() -> dict[str, Any]:
    title = "frequency decile of the predicted token (1: most frequent)"
    x = axis("decile", title)
    x["axis"] |= {"values": list(range(1, DECILES + 1)), "format": "d"}
    return x


def _name(arm: Arm) -> str:
    return f"{arm.letter} {arm.title}"


def _of_row(row: Row, numbers: int) -> dict[str, Any]:
    """What a chart and its tooltip show of a row of a sweep."""
    ends = row.added_loss_interval or 2 * [row.added_loss]
    low, drawn, high = (
        max(v, SMALLEST_ADDED) for v in (ends[0], row.added_loss, ends[1])
    )
    return {
        **_place(row, numbers),
        **{"low": low, "drawn": drawn, "high": high},
        "Added loss": with_interval(row.added_loss, row.added_loss_interval),
        "Top-1": percent(row.top1_agreement),
        "KL": fixed(row.kl, 4),
    }


def _place(row: Stored, numbers: int) -> dict[str, Any]:
    """The size of a row in a chart, and its name."""
    return {
        "of": _legend(row),
        "is_factors": row.is_factors,
        **{"MB": row.bytes / 1e6, "M": row.params / 1e6},
        "Table": full_name(row),
        "File": f"{count(row.bytes)} bytes",
        "Bits per number": fixed(8 * row.bytes / numbers, 2),
    }


def _legend(row: Stored) -> str:
    """The entry of a row in a legend; all tables of a rival have one."""
    if rival := RIVALS.get(row.method):
        return rival.title
    return table_name(row.method, "in bands" if row.bands > 1 else "", row.bits)


def _look(row: Stored) -> Look:
    """How a row is drawn; points of a single band are hollow."""
    if rival := RIVALS.get(row.method):
        return Look(rival.colour, rival.marker, dash=[8, 3, 2, 3])
    known = (METHODS | CODES).get(row.method)
    colour = known.colour if known else "#f0a6ca"  # Old sweeps have others.
    shape, dash = BITS_SHAPES.get(row.bits, "cross"), BITS_DASHES.get(row.bits, [2, 4])
    return Look(colour, shape, colour if row.bands > 1 else "white", dash)


def _limit(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of the Gaussian rate-distortion line, without a tooltip."""
    return [
        {"of": LIMIT, "MB": size / 1e6, "drawn": loss, "low": loss, "high": loss}
        for size, loss in limit_points(sweep)
    ]


def _with_bits(chart: dict[str, Any], numbers: int) -> dict[str, Any]:
    """A chart over MB with a second axis above: bits for each number of D's table."""
    megabytes = numbers / 8e6  # of one bit
    above = {
        **{"orient": "top", "title": "bits per number of D's table", "grid": False},
        "values": [bits * megabytes for bits in BITS_TICKS],
        "labelExpr": f"format(datum.value / {megabytes}, '~g')",
        "labelOverlap": True,
    }
    encoding = {"x": {"field": "MB", "type": "quantitative", "axis": above}}
    unseen = {"type": "point", "opacity": 0, "tooltip": None}
    layers = [{"layer": chart["layer"]}, {"mark": unseen, "encoding": encoding}]
    own_axes = {"resolve": {"axis": {"x": "independent"}}}
    return chart | {"layer": layers} | own_axes


def _loss_limits(curves: Iterable[np.ndarray]) -> list[float]:
    """Limits of the loss axis that cut off the high losses at the start."""
    curves = list(curves)
    start = START_SHARE * max(tokens[-1] for tokens, _ in curves)
    settled = [
        losses[min(np.searchsorted(tokens, start), len(losses) - 1)]
        for tokens, losses in curves
    ]
    lowest = min(losses.min() for _, losses in curves)
    span = max(max(settled) - lowest, 0.1)
    return [float(lowest - 0.06 * span), float(lowest + 1.06 * span)]
