"""The figures of the reports, as matplotlib Figure objects.

The first figure imports matplotlib, so that training starts without it. pyplot is not
used: it would keep every figure in memory.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.factorization import SMALLEST_ADDED, energy_kept
from pcagpt.methods import CODES, METHODS, RIVALS
from pcagpt.report.sweep import baseline_of, table_name
from pcagpt.report.text import percent
from pcagpt.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#222222"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 160,
    "font.size": 9,
    "grid.color": "#e2e2e2",
}
START_SHARE = 0.08  # of the tokens; the loss axis fits the curves after it
# By bits of a stored value; 0 for codes.
BITS_MARKERS = {32: "o", 8: "s", 6: "h", 5: "p", 4: "D", 0: "*"}
BITS_LINES = {32: "-", 8: "--", 6: (0, (5, 1)), 5: (0, (3, 1)), 4: ":", 0: "-"}


def curves_figure(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Draws validation loss against tokens, a panel per rank; None without curves."""
    rows = [row for row in rows if row["curve"]]
    if not rows:
        return None
    curves = {row["folder"]: np.array(row["curve"], np.float64).T for row in rows}
    ranks = sorted({row["rank"] for row in rows if row["rank"]}) or [None]
    columns = min(len(ranks), 3)
    lines = -(-len(ranks) // columns)
    figure, grid = _panels(lines, columns, 0.7 + 3.3 * lines)
    limits = _loss_limits(list(curves.values()))
    for place, (rank, axes) in enumerate(zip(ranks, grid, strict=False)):
        for row in rows:
            if row["rank"] not in (None, rank):
                continue
            arm, (tokens, losses) = ARMS[row["arm"]], curves[row["folder"]]
            style = {"color": arm.colour, "marker": arm.marker, "markevery": [-1]}
            name = f"{arm.letter} {arm.title}"
            axes.plot(tokens / 1e6, losses, label=name, **style)
            if arm.is_fine_tuned and row["tokens_with_baseline"]:
                after = row["tokens_with_baseline"] - row["tokens_seen"]
                style |= {"ls": "--", "lw": 1, "label": "fine-tuned, after D's tokens"}
                axes.plot((tokens + after) / 1e6, losses, **style)
        axes.set(xlabel="training tokens (millions)", ylim=limits)
        axes.set_xlim(left=0)
        if place % columns == 0:
            axes.set_ylabel("validation loss (nats per token)")
        if rank:
            axes.set_title(f"rank {rank}", loc="left", fontsize="medium")
    for axes in grid[len(ranks) :]:
        axes.remove()
    _add_legend(figure)
    return figure


def size_figure(models: Sequence[dict[str, Any]]) -> "Figure | None":
    """Draws loss against parameters of the table and of the model; None without sizes.

    `models` come from `pcagpt.report.experiment.means_over_seeds`.
    """
    fields = {"params_embedding": "token table", "params_total": "whole model"}
    models = [m for m in models if all(m.get(f) for f in ("val_loss", *fields))]
    if not models:
        return None
    figure, grid = _panels(1, 2, 3.7)
    for axes, (field, name) in zip(grid, fields.items(), strict=True):
        for arm in ARMS.values():
            points = [m for m in models if m["letter"] == arm.letter]
            axes.plot(
                [m[field] / 1e6 for m in points],
                [m["val_loss"] for m in points],
                color=arm.colour,
                marker=arm.marker,
                label=f"{arm.letter} {arm.title}" if points else None,
            )
        axes.set_xlabel(f"parameters of the {name} (millions)")
    grid[0].set_xscale("log")
    _use_plain_ticks(grid[0].xaxis)
    sizes = {m["rank"]: m["params_embedding"] / 1e6 for m in models if m["rank"]}
    top = grid[0].secondary_xaxis("top")
    top.set_xticks(list(sizes.values()), [f"k={rank}" for rank in sizes])
    top.set_xticks([], minor=True)
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    grid[0].set_ylabel("validation loss (nats per token)")
    _add_legend(figure)
    return figure


def spectrum_figure(
    singular_values: Sequence[float] | np.ndarray, ranks: Sequence[int]
) -> "Figure":
    """Draws descending singular values [d] on a log scale, and the energy kept.

    The energy kept by each of `ranks` is marked.
    """
    values = np.asarray(singular_values, np.float64)
    index = np.arange(1, len(values) + 1)
    energy = energy_kept(values)
    figure, (left, right) = _panels(1, 2, 3.3, sharey=False)
    positive = values > 0  # A log scale cannot show zeros.
    left.semilogy(index[positive], values[positive], color=INK)
    left.set(xlabel="index of the singular value", ylabel="singular value")
    right.plot(index, 100 * energy, color=INK)
    right.set(xlabel="rank", ylabel="energy kept (%)", ylim=(0, 104))
    for rank in sorted(rank for rank in ranks if 1 <= rank <= len(values)):
        share = energy[rank - 1]
        right.plot(rank, 100 * share, "o", label=f"rank {rank}: {percent(share)}")
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="lower right", frameon=False)
    return figure


def pareto_figure(sweep: dict[str, Any]) -> "Figure":
    """Draws added loss of a sweep's tables against numbers and bytes, on log scales.

    Of tables in several bands that differ only in their number, it shows only the best.
    All tables of a rival are one line.
    """
    best: dict[tuple, dict[tuple, Row]] = {}
    for row in sweep["rows"]:
        bits = None if row.method in RIVALS else row.bits
        of_kind = best.setdefault((row.method, row.bands > 1, bits), {})
        known = of_kind.setdefault((row.budget, row.bits), row)
        if row.added_loss < known.added_loss:
            of_kind[row.budget, row.bits] = row
    figure, grid = _panels(1, 2, 4.6)
    units = {"params": "numbers stored (millions)", "bytes": "bytes stored (MB)"}
    for axes, (field, unit) in zip(grid, units.items(), strict=True):
        for (method, in_bands, bits), of_kind in best.items():
            if field == "params" and bits != 32:
                continue  # Bits do not change the number of values.
            rows = sorted(of_kind.values(), key=lambda row: row.bytes)
            style = _style(method, in_bands, bits)
            sizes = [getattr(row, field) / 1e6 for row in rows]
            ends = [row.added_loss_interval or 2 * [row.added_loss] for row in rows]
            bars = np.maximum(ends, SMALLEST_ADDED).T
            axes.vlines(sizes, *bars, color=style["color"])
            axes.plot(
                sizes,
                [max(row.added_loss, SMALLEST_ADDED) for row in rows],
                **style,
            )
        axes.axvline(
            baseline_of(sweep)[field] / 1e6, color="#bbbbbb", label="D's table, float32"
        )
        axes.set(xscale="log", yscale="log", xlabel=unit)
        _use_plain_ticks(axes.xaxis)
        _use_plain_ticks(axes.yaxis)
    _add_limit(grid[1], sweep)
    grid[0].set_ylabel("added loss (nats per token)")
    _add_legend(figure)
    return figure


def _style(method: str, in_bands: bool, bits: int | None) -> dict[str, str]:
    """How `pareto_figure` draws tables of one kind; bits None: those of a rival."""
    if rival := RIVALS.get(method):
        style = {"color": rival.colour, "marker": rival.marker, "ls": "-."}
        return style | {"label": rival.title}
    colours = {name: known.colour for name, known in (METHODS | CODES).items()}
    colour = colours.get(method, "#f0a6ca")  # Old sweeps have others.
    return {
        "color": colour,
        "marker": BITS_MARKERS.get(bits, "X"),
        "ls": BITS_LINES.get(bits, "-."),
        "markerfacecolor": colour if in_bands else "white",
        "label": table_name(method, "in bands" if in_bands else "", bits),
    }


def _add_limit(axes: "Axes", sweep: dict[str, Any]) -> None:
    """Draws the Gaussian rate-distortion line over the bytes of a sweep's tables."""
    sizes = [row.bytes for row in sweep["rows"]]
    line = [
        (size / 1e6, loss)
        for size, loss in sweep.get("gaussian_limit") or ()
        if min(sizes) / 2 <= size <= max(sizes) and loss >= SMALLEST_ADDED
    ]
    if line:
        label = "Gaussian R(D), weighting of codes"
        axes.plot(*zip(*line, strict=True), color=INK, ls="--", lw=1, label=label)


def _panels(
    rows: int, columns: int, height: float, sharey: bool = True
) -> "tuple[Figure, list[Axes]]":
    """Makes a figure with rows × columns panels; height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure((10, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    return figure, list(grid.flat)


def _add_legend(figure: "Figure") -> None:
    """Adds one legend above all panels, with each label once."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    place = {"loc": "outside upper left", "ncols": 4, "frameon": False}
    figure.legend(entries.values(), entries.keys(), **place)


def _loss_limits(curves: list[np.ndarray]) -> tuple[float, float]:
    """Limits of the loss axis that cut off the high losses at the start."""
    start = START_SHARE * max(tokens[-1] for tokens, _ in curves)
    settled = [
        losses[min(np.searchsorted(tokens, start), len(losses) - 1)]
        for tokens, losses in curves
    ]
    lowest = min(losses.min() for _, losses in curves)
    span = max(max(settled) - lowest, 0.1)
    return lowest - 0.06 * span, lowest + 1.06 * span


def _use_plain_ticks(axis: "Axis") -> None:
    """Labels a log scale with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
