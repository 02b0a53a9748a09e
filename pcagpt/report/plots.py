"""The report's figures: matplotlib Figure objects, drawn without pyplot.

matplotlib is imported when the first figure is made: whoever only trains or reads
results does not wait for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcagpt.arms import BY_LETTER
from pcagpt.report.folders import read_curve
from pcagpt.report.wording import fixed, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart in every common colour blindness; markers and
# labels do so in black and white.
COLOURS = {
    "D": "#3a3a3a",
    "D+": "#8c8c8c",
    "A": "#0072b2",
    "B": "#d55e00",
    "Bd": "#f0a500",
    "C": "#009e73",
    "E": "#cc79a7",
    "F": "#a88c00",
    "G": "#56b4e9",
}
MARKERS = {
    "D": "s",
    "D+": "P",
    "A": "o",
    "B": "D",
    "Bd": "d",
    "C": "^",
    "E": "v",
    "F": "<",
    "G": ">",
}
INK, GREY, FAINT = "#222222", "#6b6b6b", "#e2e2e2"
WIDTH = 10.0  # inches
SMALL, NORMAL = 8.5, 9.5  # points
START_SHARE = 0.08  # of the tokens; what lies above the losses by then is cut off


def curves_figure(workdir: Path, rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Validation loss against tokens, a panel for each rank; None without curves.

    Args:
      workdir: folder of the run folders, whose metrics.jsonl is drawn.
      rows: the rows of results.json.
    """
    curves = {row["folder"]: read_curve(Path(workdir) / row["folder"]) for row in rows}
    rows = [row for row in rows if len(curves[row["folder"]])]
    if not rows:
        return None
    arrays = {row["folder"]: curves[row["folder"]].T for row in rows}
    ranks = sorted({row["rank"] for row in rows if row["rank"]}) or [None]
    columns = min(len(ranks), 3)
    height = 4.2 if len(ranks) == 1 else 3.5 * -(-len(ranks) // columns) + 0.3
    figure, grid = panels(len(ranks), columns, height)
    size, unit = _unit(max(_in_all(row) for row in rows))
    several_seeds = len({row["seed"] for row in rows}) > 1
    for place, (rank, axes) in enumerate(zip(ranks, grid, strict=True)):
        ends = {}
        for row in (row for row in rows if row["rank"] in (None, rank)):
            letter = row["letter"]
            tokens, losses = arrays[row["folder"]]
            line = {"color": COLOURS[letter], "alpha": 0.6 if several_seeds else 1}
            axes.plot(tokens / size, losses, lw=1.8, **line)
            axes.plot(
                tokens[-1] / size, losses[-1], MARKERS[letter], ms=4, **line, zorder=3
            )
            ends.setdefault(letter, []).append(losses[-1])
            if _in_all(row) > row["tokens_seen"]:
                moved = (tokens + _in_all(row) - row["tokens_seen"]) / size
                axes.plot(moved, losses, lw=1.2, ls=(0, (3, 2)), **line)
                axes.plot(moved[-1], losses[-1], MARKERS[letter], ms=4, **line)
        axes.set_xlabel(f"tokens trained on ({unit})" if unit else "tokens trained on")
        axes.set_xlim(0, 1.02 * max(_in_all(row) for row in rows) / size)
        if len(ranks) > 1:
            axes.set_title(f"rank {rank}", loc="left", fontsize=NORMAL, color=INK)
        if place % columns == 0:
            axes.set_ylabel("validation loss (nats per token)")
        axes.set_ylim(*_loss_range(list(arrays.values())))
        means = {letter: float(np.mean(losses)) for letter, losses in ends.items()}
        _label_margin(
            axes, [(f"{k} {fixed(v)}", v, COLOURS[k]) for k, v in means.items()]
        )
    fine_tuned = any(BY_LETTER[row["letter"]].is_fine_tuned for row in rows)
    _legend(figure, rows, dashed=fine_tuned)
    return figure


def spectrum_figure(
    singular_values: Sequence[float] | np.ndarray, ranks: Sequence[int]
) -> "Figure":
    """Singular values on a log scale, and the share of energy that each rank keeps.

    Args:
      singular_values: float [d], descending, of the token table.
      ranks: the ranks to mark.
    """
    values = np.asarray(singular_values, np.float64)
    index = np.arange(1, len(values) + 1)
    energy = np.cumsum(values**2) / np.sum(values**2)
    ranks = [rank for rank in sorted(ranks) if 1 <= rank <= len(values)]
    figure, (left, right) = panels(2, 2, 3.5, sharey=False)
    positive = values > 0  # a log scale has no place for the others
    left.semilogy(index[positive], values[positive], color=INK, lw=1.6)
    left.set_xlabel("index of the singular value")
    left.set_ylabel("singular value")
    right.plot(index, 100 * energy, color=INK, lw=1.6)
    right.set_xlabel("rank")
    right.set_ylabel("energy kept (%)")
    right.set_ylim(0, 104)
    for axes in (left, right):
        axes.set_xlim(0, len(values) * 1.02)
        for rank in ranks:
            axes.axvline(rank, color=COLOURS["A"], lw=0.8, ls=(0, (2, 2)), zorder=1)
    kept = {rank: 100 * energy[rank - 1] for rank in ranks}
    right.plot(list(kept), list(kept.values()), "o", ms=4.5, color=COLOURS["A"])
    labels = [
        (f"rank {rank}: {percent(share / 100)}", share, COLOURS["A"])
        for rank, share in kept.items()
    ]
    _label_margin(right, labels)
    return figure


def parameters_figure(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Loss against the parameters of the table and of the model; None without sizes."""
    fields = {"params_embedding": "token table", "params_total": "whole model"}
    rows = [
        row
        for row in rows
        if row["val_loss"] is not None and all(row.get(field) for field in fields)
    ]
    if not rows:
        return None
    figure, grid = panels(2, 2, 3.7)
    for axes, (field, name) in zip(grid, fields.items(), strict=True):
        size, unit = _unit(max(row[field] for row in rows))
        for letter in dict.fromkeys(row["letter"] for row in rows):
            arm = [row for row in rows if row["letter"] == letter]
            style = {"color": COLOURS[letter], "marker": MARKERS[letter]}
            for row in arm:
                axes.plot(row[field] / size, row["val_loss"], ms=6, alpha=0.85, **style)
            ranks = sorted({row["rank"] for row in arm if row["rank"]})
            centres = [
                np.mean(
                    [
                        (r[field] / size, r["val_loss"])
                        for r in arm
                        if r["rank"] == rank
                    ],
                    axis=0,
                )
                for rank in ranks
            ]
            if len(ranks) > 1:
                axes.plot(*np.transpose(centres), lw=1.2, color=COLOURS[letter])
        axes.margins(0.1, 0.1)
        axes.set_xlabel(f"parameters of the {name}" + (f" ({unit})" if unit else ""))
        _label_ranks(axes, [(row["rank"], row[field] / size) for row in rows])
    grid[0].set_ylabel("validation loss (nats per token)")
    _legend(figure, rows, markers=True)
    return figure


def _in_all(row: dict[str, Any]) -> float:
    """Tokens along the line of the plot: what is fine-tuned comes after its D."""
    after = BY_LETTER[row["letter"]].is_fine_tuned
    return (row["tokens_with_baseline"] if after else None) or row["tokens_seen"]


def _unit(largest: float) -> tuple[float, str]:
    """A divisor for an axis, and its name."""
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= size:
            return size, name
    return 1, ""


def _loss_range(curves: list[np.ndarray]) -> tuple[float, float]:
    """Limits that show where the arms differ rather than where all of them begin."""
    start = START_SHARE * max(tokens[-1] for tokens, _ in curves)
    settled = [
        losses[min(np.searchsorted(tokens, start), len(losses) - 1)]
        for tokens, losses in curves
    ]
    lowest = min(losses.min() for _, losses in curves)
    span = max(max(settled) - lowest, 0.1)
    return lowest - 0.06 * span, lowest + 1.06 * span


def panels(
    count: int, columns: int, height: float, sharey: bool = True
) -> "tuple[Figure, list[Axes]]":
    """A figure with styled panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), dpi=160, layout="constrained", facecolor="white")
    lines = -(-count // columns)
    grid = list(figure.subplots(lines, columns, sharey=sharey, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(axis="y", color=FAINT, lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL, length=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(size=NORMAL, color=INK)
    return figure, grid[:count]


def _label_margin(axes: "Axes", labels: list[tuple[str, float, str]]) -> None:
    """(text, height, colour) beside the right edge, apart where they would collide."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[1])
    heights = spread_apart([height for _, height, _ in labels], 0.06 * (high - low))
    for (text, _, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=SMALL,
            color=colour,
            annotation_clip=False,
        )


def _label_ranks(axes: "Axes", places: list[tuple[int | None, float]]) -> None:
    """Names of the ranks above the panel, over their mean places along its x axis."""
    ranks = sorted({rank for rank, _ in places if rank})
    means = [np.mean([x for other, x in places if other == rank]) for rank in ranks]
    low, high = axes.get_xlim()
    for rank, mean, x in zip(
        ranks, means, spread_apart(means, 0.11 * (high - low)), strict=True
    ):
        axes.axvline(mean, color=FAINT, lw=0.7, zorder=0)
        axes.annotate(
            f"k={rank}",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=GREY,
        )


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as possible (squared) to be `gap` apart."""
    # Less i × gap they need only ascend: isotonic regression by pooling neighbours.
    pools: list[list[float]] = []
    for place, height in enumerate(heights):
        pools.append([height - place * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [np.mean(pool) for pool in pools for _ in pool]
    return [float(height + place * gap) for place, height in enumerate(level)]


def _legend(
    figure: "Figure",
    rows: Sequence[dict[str, Any]],
    markers: bool = False,
    dashed: bool = False,
) -> None:
    """The arms in one line above the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[letter],
            marker=MARKERS[letter],
            ms=5,
            lw=0 if markers else 1.8,
            label=f"{letter} {BY_LETTER[letter].title}",
        )
        for letter in dict.fromkeys(row["letter"] for row in rows)
    ]
    if dashed:
        style = {"color": COLOURS["B"], "lw": 1.2, "ls": (0, (3, 2))}
        handles.append(Line2D([], [], label="after D's tokens", **style))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.6,
    )
