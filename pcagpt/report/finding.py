"""What a report found, in a few lines for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcagpt.config.command_line import next_command
from pcagpt.report.experiment import means_over_seeds, recommended, run_of
from pcagpt.report.recommend import (
    SMALL_COST,
    form_of,
    is_cheap,
    recommended_model,
    recommended_row,
)
from pcagpt.report.row_text import full_name
from pcagpt.report.sweep import SPLIT_TITLES, baseline_of
from pcagpt.report.text import count, fixed, plus_minus, signed, times, with_interval
from pcagpt.rows import Row


def experiment_lines(results: dict[str, Any], workdir: Path) -> list[str]:
    """The loss of each arm, and a command for the recommended model."""
    models = means_over_seeds(results["rows"], results["comparisons"])
    lines = [_arm(model) for model in models]
    if best := recommended(models):
        lines.append(next_command("sample", workdir / run_of(best, results["rows"])))
    return lines


def _arm(model: dict[str, Any]) -> str:
    """'A  k=128  val loss 4.1925, +0.0591 ± 0.0020 against D, table 5.91× smaller'."""
    rank = f"k={model['rank']:g}" if model["rank"] else ""
    line = f"{model['letter']:<2} {rank:<6} val loss {fixed(model.get('val_loss'), 4)}"
    if model["letter"] == "D" or "added_loss" not in model:
        return line
    added = plus_minus(model["added_loss"], model["added_half"], signed, places=4)
    line += f", {added} against D"
    if not model["rank"]:  # D+ has a full table.
        return line
    return f"{line}, table {times(model.get('compression_embedding'))} smaller"


def sweep_lines(sweep: dict[str, Any], folder: Path, workdir: str) -> list[str]:
    """The recommended table and how to take its model away.

    folder: of the sweep; workdir: for what the next command writes.
    """
    best, model = recommended_row(sweep), recommended_model(sweep)
    split = sweep["protocol"].get("split", "val")
    side = sweep["protocol"].get("side", "")
    whose = f"{side} table: " if side else ""
    if split != "val":
        title, kind = SPLIT_TITLES[split], "adds least"
        if is_cheap(best):
            kind = f"smallest that adds at most {SMALL_COST}"
        return [
            f"{whose}nothing is chosen on the {title} split; {kind} here: "
            f"{_of(best, sweep)}"
        ]
    word = "recommended" if is_cheap(best) else "none is recommended; best"
    lines = [f"{whose}{word}: {_of(best, sweep)}"]
    if best is not model:
        serves = "" if best.model_name else "that table serves for comparison: "
        lines.append(f"{serves}no model of it is written")
    if model is None:
        return lines
    if best is not model:
        lines.append(f"of the tables with a model: {_of(model, sweep)}")
    return [*lines, how_to_take(model, folder / model.model_name, workdir, sweep)]


def _of(row: Row, sweep: dict[str, Any]) -> str:
    smaller = times(baseline_of(sweep)["bytes"] / row.bytes)
    added = with_interval(row.added_loss, row.added_loss_interval)
    return (
        f"{full_name(row)}, {count(row.bytes)} bytes ({smaller} smaller than in "
        f"float32), adds {added} nats per token"
    )


def how_to_take(row: Row, model: Path, workdir: str, heading: Mapping[str, Any]) -> str:
    """The command that exports the model of a row, or why none does.

    heading: of sweep.json or advice.json.
    """
    if heading.get("stored_as"):
        return f"its table: {model}; pcagpt exports no model that came as GGUF"
    form = form_of(row, heading)
    return next_command("export", model, format=form, workdir=workdir)
