"""The figure of a sweep: added loss against what is stored."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pcagpt.report.plots import FAINT, GREY, INK, SMALL, panels
from pcagpt.report.sweep import SMALLEST_ADDED, baseline_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Methods by colour (Okabe and Ito's, told apart in colour blindness), the rest in grey
# by their order.
COLOURS = {
    "svd": "#d55e00",
    "pca": "#c8c8c8",
    "freq": "#b0b0b0",
    "sqrt_freq": "#989898",
    "hidden": "#808080",
    "kl": "#e69f00",
    "joint": "#56b4e9",
    "fisher": "#0072b2",
    "context": "#009e73",
    "baseline": INK,
}


def pareto_figure(sweep: dict[str, Any]) -> "Figure":
    """Added loss (log scale) against parameters and against bytes, log scales."""
    figure, (left, right) = panels(2, 2, 4.6)
    own = baseline_of(sweep)
    names = _by_kind(sweep["rows"])
    for axes, field, unit, baseline in (
        (left, "params", "numbers stored (millions)", own["params"]),
        (right, "bytes", "bytes stored (MB)", own["bytes"]),
    ):
        for rows in names.values():
            if field == "params" and rows[0]["bits"] < 32:
                continue
            _draw(axes, rows, field)
        axes.axvline(baseline / 1e6, color=FAINT, lw=1, zorder=0)
        axes.annotate(
            "D",
            (baseline / 1e6, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=GREY,
        )
        _log_scales(axes)
        axes.set_xlabel(unit)
    left.set_ylabel("added loss (nats per token)")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=5,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )
    return figure


def _log_scales(axes) -> None:
    """Both axes logarithmic, with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a method in one band, or in as many as lose least, at each bit width."""
    kinds: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in rows:
        kind = (row["method"], row["bands"] > 1, row["bits"])
        best = kinds.setdefault(kind, {}).get(row["rank"])
        if best is None or row["added_loss"] < best["added_loss"]:
            kinds[kind][row["rank"]] = row
    named = {}
    for (method, in_bands, bits), best in kinds.items():
        name = "D's table" if method == "baseline" else method
        name += " in bands" if in_bands else ""
        name += f", int{bits}" if bits < 32 else ""
        named[name] = sorted(best.values(), key=lambda row: row["params"])
    return named


def _draw(axes, rows: list[dict[str, Any]], field: str) -> None:
    row = rows[0]
    in_bands = row["bands"] > 1
    style = {
        "color": COLOURS[row["method"]],
        "marker": {32: "o", 8: "s", 4: "D"}[row["bits"]],
        "ls": {32: "-", 8: "--", 4: ":"}[row["bits"]],
        "mfc": COLOURS[row["method"]] if in_bands else "white",
        "lw": 1.8 if in_bands else 1.1,
        "ms": 5,
    }
    name = "D's table" if row["method"] == "baseline" else row["method"]
    name += " in bands" if in_bands else ""
    name += f", int{row['bits']}" if row["bits"] < 32 else ""
    axes.plot(
        np.array([r[field] for r in rows]) / 1e6,
        [max(r["added_loss"], SMALLEST_ADDED) for r in rows],
        label=name,
        **style,
    )
