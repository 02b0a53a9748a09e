"""Compares the training losses of two versions of the code, step by step.

    python scripts/compare_losses.py OLD/gpt_baseline NEW/gpt_baseline --chart x.png

Takes one or more pairs of run folders. Make each pair with the same command, once with
the old code and once with the new code. Add --config.telemetry.every=1, so that
metrics.jsonl has every step. Prints a line and draws a panel for each pair.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pcagpt.errors import UserError
from pcagpt.telemetry.metrics import read_metrics

LAST_SHARE = 0.25  # of the steps: the last ones show a change in what is learnt


def train_losses(folder: Path) -> dict[int, float]:
    """Loss of each logged training step in a run folder's metrics.jsonl.

    Ends the program if a loss is null, because it was not finite.
    """
    entries = read_metrics(folder / "metrics.jsonl")
    losses = {e["step"]: e["loss"] for e in entries if e["split"] == "train"}
    if lost := [step for step, loss in losses.items() if loss is None]:
        sys.exit(f"{folder}: the loss of step {lost[0]} is no number: train it again")
    return losses


def paired(before: Path, after: Path) -> np.ndarray:
    """Step and both losses where both runs logged them: float64 [steps, 3]."""
    old, new = train_losses(before), train_losses(after)
    steps = sorted(old.keys() & new.keys())
    return np.array([(step, old[step], new[step]) for step in steps])


def summary(pair: np.ndarray) -> str:
    """First and largest difference, mean of the last quarter, and the final losses."""
    difference = pair[:, 2] - pair[:, 1]
    last = difference[-max(1, round(LAST_SHARE * len(pair))) :]
    worst = int(np.abs(difference).argmax())
    return (
        f"{len(pair):>6}{difference[0]:>+11.5f}{difference[worst]:>+11.5f} at step "
        f"{pair[worst, 0]:<6.0f}{last.mean():>+11.5f} ± {last.std():.5f}"
        f"{pair[-1, 1]:>10.4f}{pair[-1, 2]:>9.4f}"
    )


def chart(names: list[str], pairs: list[np.ndarray]) -> Figure:
    """Both losses above their difference, one column for each pair."""
    figure = Figure(figsize=(3.6 * len(pairs) + 0.6, 4.6), layout="constrained")
    grid = figure.subplots(
        2, len(pairs), squeeze=False, sharex="col", height_ratios=(2, 1)
    )
    for name, pair, (above, below) in zip(names, pairs, grid.T, strict=True):
        step, before, after = pair.T
        above.plot(step, before, color="#d55e00", lw=2.4, label="before")
        above.plot(step, after, color="#0072b2", lw=1.0, label="after")
        above.set_title(name, loc="left", fontsize=9.5)
        below.axhline(0, color="#6b6b6b", lw=0.7)
        below.plot(step, after - before, color="#0072b2", lw=1.0)
        below.set_xlabel("step")
    grid[0, 0].set_ylabel("training loss (nats per token)")
    grid[1, 0].set_ylabel("after minus before")
    grid[0, 0].legend(frameon=False)
    return figure


def main() -> None:
    """Prints the table and writes the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="BEFORE AFTER ...")
    parser.add_argument("--names", default="", help="name of each pair, such as D,k128")
    parser.add_argument("--chart", type=Path, help="PNG or SVG file to draw")
    args = parser.parse_args()
    before, after = args.runs[::2], args.runs[1::2]
    if len(before) != len(after):
        parser.error(f"give folders in pairs, BEFORE AFTER: {len(args.runs)} is odd")
    for folder in args.runs:
        if not (folder / "metrics.jsonl").exists():
            parser.error(f"{folder} has no metrics.jsonl: give the folder of a run")
    if args.chart and not args.chart.absolute().parent.is_dir():
        parser.error(f"--chart: there is no folder {args.chart.parent}: make it first")
    if args.chart and args.chart.suffix.lower() not in (".png", ".svg"):
        parser.error(f"--chart {args.chart}: its name must end with .png or .svg")
    names = args.names.split(",") if args.names else [run.name for run in after]
    if len(names) != len(after):
        parser.error(f"--names must have one name for each pair ({len(after)})")
    try:
        pairs = [paired(*runs) for runs in zip(before, after, strict=True)]
    except (UserError, OSError) as error:
        parser.error(str(error))
    for name, pair in zip(names, pairs, strict=True):
        if not len(pair):
            parser.error(f"{name}: the runs have no logged step in common")
    width = max(map(len, names))
    print(
        f"{'':<{width}}{'steps':>6}{'first':>11}{'largest':>11}{'':<14}"
        f"{'last quarter':>17}{'before':>13}{'after':>9}"
    )
    for name, pair in zip(names, pairs, strict=True):
        print(f"{name:<{width}}{summary(pair)}")
    if args.chart:
        try:
            chart(names, pairs).savefig(args.chart, dpi=150)
        except OSError as error:
            parser.error(f"--chart {args.chart} cannot be written: {error.strerror}")
        print(f"written to {args.chart}")


if __name__ == "__main__":
    main()
