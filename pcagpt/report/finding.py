"""What a report found, in a few lines for the terminal."""

from pathlib import Path
from typing import Any

from pcagpt.config.command_line import next_command
from pcagpt.report.experiment import means_over_seeds, recommended, run_of
from pcagpt.report.sweep import baseline_of, full_name, recommended_row, recommends
from pcagpt.report.text import count, fixed, signed, times, with_interval


def experiment_lines(results: dict[str, Any], workdir: Path) -> list[str]:
    """The loss of each arm, and a command for the recommended model."""
    models = means_over_seeds(results["rows"], results["comparisons"])
    lines = [_arm(model) for model in models]
    if best := recommended(models):
        lines.append(next_command("sample", workdir / run_of(best, results["rows"])))
    return lines


def _arm(model: dict[str, Any]) -> str:
    """'A  k=128  val loss 4.1925, +0.0591 ± 0.0020 against D, table 5.91x smaller'."""
    rank = f"k={model['rank']:g}" if model["rank"] else ""
    line = f"{model['letter']:<2} {rank:<6} val loss {fixed(model.get('val_loss'), 4)}"
    if model["letter"] == "D" or "added_loss" not in model:
        return line
    half = model["added_half"]
    added = signed(model["added_loss"], 4) + (f" ± {fixed(half, 4)}" if half else "")
    smaller = times(model.get("compression_embedding"))
    return f"{line}, {added} against D, table {smaller} smaller"


def sweep_lines(sweep: dict[str, Any], folder: Path) -> list[str]:
    """The recommended table and a command for its model, if it has one."""
    best = recommended_row(sweep)
    smaller = times(baseline_of(sweep)["bytes"] / best.bytes)
    added = with_interval(best.added_loss, best.added_loss_interval)
    word = "recommended" if recommends(sweep) else "none is recommended; nearest"
    lines = [
        f"{word}: {full_name(best)}, {count(best.bytes)} bytes ({smaller} smaller "
        f"than in float32), adds {added} nats per token"
    ]
    name = best.model_name
    if name and (folder / name).is_dir():
        lines.append(next_command("export", folder / name))
    return lines
