"""Draws README's chart: added loss against bits per number, of two models.

    python scripts/readme_chart.py

Writes checkpoints/published/bits.png from the sweeps of `MODELS`.
"""

from pathlib import Path
from typing import Any

from pcagpt.factorization import SMALLEST_ADDED
from pcagpt.methods import CODES, METHODS, RIVALS
from pcagpt.report.chart import Figure, Look, axis, bars, mark, panel
from pcagpt.report.sweep import baseline_of
from pcagpt.rows import Row, read_sweep

PUBLISHED = Path(__file__).parent.parent / "checkpoints" / "published"
# {folder: (name of the model, dashes of its lines)}
MODELS = {
    "smollm2_135m/val": ("SmolLM2-135M", ()),
    "gpt2_small_table/val": ("GPT-2 small, 6,000 steps", (5, 3)),
}
SHAPES = {  # {method: its mark}
    **{"coded": "circle", "packed": "square", "context": "diamond"},
    **{"gptq": "triangle-up", "svd": "triangle-down"},
}


def figure(published: Path) -> Figure:
    """The chart; a line has the best tables of a method, by size."""
    points, looks = [], {}
    sweeps = {
        model: read_sweep(published / folder / "sweep.json")
        for folder, model in MODELS.items()
    }
    for method, shape in SHAPES.items():
        colour = (METHODS | CODES | RIVALS)[method].colour
        for (model, dash), sweep in sweeps.items():
            rows = [row for row in sweep["rows"] if row.method == method]
            name = f"{'GPTQ' if method == 'gptq' else method}, {model}"
            if rows:
                looks[name] = Look(colour, shape, "white" if dash else colour, dash)
            numbers = baseline_of(sweep)["params"]
            points += [_point(row, numbers) | {"of": name} for row in _best(rows)]
    axes = {
        "x": axis("bits", "bits of the file for each number of the table", "log"),
        "y": axis(
            "drawn", "added loss (nats per token; less than 0.001: at 0.001)", "log"
        ),
    }
    layers = [{"mark": mark("line")}, bars("low", "high")]
    return Figure([panel(points, looks, axes, layers, ["Added loss"])])


def _best(rows: list[Row]) -> list[Row]:
    """The rows that no other beats; one that is up to 2% larger also counts."""
    return [
        row
        for row in rows
        if all(
            row.added_loss <= other.added_loss or 1.02 * row.bytes < other.bytes
            for other in rows
            if other is not row
        )
    ]


def _point(row: Row, numbers: int) -> dict[str, Any]:
    low, high = row.added_loss_interval
    ends = {"low": low, "drawn": row.added_loss, "high": high}
    return {
        "bits": 8 * row.bytes / numbers,
        "Added loss": row.added_loss,
        **{name: max(loss, SMALLEST_ADDED) for name, loss in ends.items()},
    }


if __name__ == "__main__":
    (PUBLISHED / "bits.png").write_bytes(figure(PUBLISHED).png())
