"""compressed/sweep.json → its report: what each way to compress a table costs."""

from typing import Any

import numpy as np

from pcagpt.report.wording import (
    NOTHING,
    code,
    count,
    fixed,
    interval,
    percent,
    signed,
    table,
    times,
)

SMALLEST_ADDED = 1e-3  # nats: below, what is measured is mostly rounding
SMALL_LOSS = 0.3  # nats: up to here predictions are meant to hold
SWEEP_TITLE = "What compressing a token table costs, without training"


def sweep_markdown(sweep: dict[str, Any]) -> str:
    """The report as markdown."""
    baseline, rows = baseline_of(sweep), sweep["rows"]
    parts = [
        f"# {SWEEP_TITLE}",
        f"The token table of {code(sweep['run'])} ({count(baseline['params'])} "
        f"numbers, validation loss {fixed(baseline['loss'], 4)} nats per token) "
        "replaced by smaller ones, without training. Added loss is in nats per "
        f"token over {_evaluated(sweep)}.",
        _rows_left(sweep),
        "![Added loss against parameters and bytes](plots/pareto.png)",
        "*Lower left is better. Each mark is a table; lines join the best of each "
        "kind. What adds 0.001 or less, or takes loss away, is drawn at 0.001.*",
        "## Tables at equal size",
        equal_size_table(sweep),
        *_recovered(sweep),
        "## All that was tried",
        _all(rows, baseline),
        "## How it was measured",
        f"Command: {code(sweep['command'])}. Device: {sweep['device']}, commit "
        f"{code(sweep['git_commit'])}. Split {code(sweep['protocol']['split'])} of "
        f"{code(sweep['protocol']['corpus'])}, windows of "
        f"{sweep['protocol']['window']} tokens that do not overlap; calibration on "
        f"{count(sweep['protocol']['calibration_tokens'])} tokens of the training "
        "split. The best of each size is chosen on the split that is reported. "
        "Predicted: from second order in the table's error, calibrated for each method "
        "on what the tables marked ° add.",
        _accuracy(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluated(sweep: dict[str, Any]) -> str:
    tokens = sweep["protocol"].get("evaluated_tokens")
    if tokens is None:
        return "the full validation split"
    return f"the first {count(tokens)} tokens of the validation split"


def _rows_left(sweep: dict[str, Any]) -> str:
    left = sweep.get("rows_left")
    return f"The sweep is not finished: {left} tables are left." if left else ""


def advice_text(row: dict[str, Any], folder: str) -> str:
    """What was chosen, in a few lines for the terminal."""
    bands = ", ".join(
        f"{size} tokens at {'full width' if rank == 0 else f'rank {rank}'}"
        for size, rank in zip(row["band_sizes"], row["band_ranks"], strict=True)
    )
    return (
        f"{_name(row)}: {count(row['params'])} numbers, {count(row['bytes'])} bytes\n"
        f"bands: {bands}\n"
        f"added loss: {fixed(row['predicted_loss'], 4)} predicted, "
        f"{fixed(row['added_loss'], 4)} measured, in nats per token\n"
        f"model: {folder}"
    )


def baseline_of(sweep: dict[str, Any]) -> dict[str, Any]:
    """params, bytes (as float32) and loss of the model with its own table."""
    vocab_size, width = sweep["protocol"]["table"]
    parameters = vocab_size * width
    loss = sweep["rows"][0]["loss"]
    return {"params": parameters, "bytes": 4 * parameters, "loss": loss}


def _name(row: dict[str, Any]) -> str:
    bands = f", {row['bands']} bands" if row["bands"] > 1 else ""
    bits = f", int{row['bits']}" if row["bits"] < 32 else ""
    return f"{row['method']}{bands}{bits}"


def _accuracy(rows: list[dict[str, Any]]) -> str:
    """How well the tables were predicted that were not calibrated on."""
    pairs = [
        (row["predicted_loss"], row["added_loss"])
        for row in rows
        if not row["is_anchor"]
        and row["bits"] == 32
        and row["added_loss"] >= SMALLEST_ADDED
    ]
    if len(pairs) < 3:
        return ""
    small = [abs(p / a - 1) for p, a in pairs if a <= SMALL_LOSS]
    ranks = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
    correlation = np.corrcoef(*ranks)[0, 1]
    worst = f"; off by {percent(max(small))} at most" if small else ""
    return (
        f"Over the {len(pairs)} others of full precision (none in 8 or 4 bits) that "
        f"add {SMALLEST_ADDED} or more, the rank correlation of predicted and measured "
        f"is {fixed(correlation)}{worst} where the added loss is up to {SMALL_LOSS}."
    )


def equal_size_table(sweep: dict[str, Any]) -> str:
    """Added loss of each method and number of bands, a column for each rank."""
    rows = [row for row in sweep["rows"] if row["bits"] == 32]
    ranks = sorted({row["rank"] for row in rows})
    names = list(dict.fromkeys(_name(row) for row in rows))
    found = {(_name(row), row["rank"]): row["added_loss"] for row in rows}
    lowest = {
        rank: min(v for (_, r), v in found.items() if r == rank) for rank in ranks
    }
    lines = []
    for name in names:
        cells = []
        for rank in ranks:
            value = found.get((name, rank))
            text = signed(value, 4)
            cells.append(f"**{text}**" if value == lowest[rank] else text)
        lines.append([name, *cells])
    return table(
        ["Method", *(f"size of k={rank}" for rank in ranks)],
        lines,
        "l" + "r" * len(ranks),
    )


def _recovered(sweep: dict[str, Any]) -> list[str]:
    """What training on wins back, if anything was trained on."""
    if not sweep.get("recovered"):
        return []
    rate = sweep["recovered"][0]["learning_rate"]
    return [
        "## What training on wins back",
        recovery_table(sweep),
        "Added loss is the loss less D's. What was trained had a peak learning rate of "
        f"{rate:g}, and so had D+, which is D itself trained on for as long. Intervals "
        "are over evaluation windows, of one seed.",
    ]


def recovery_table(sweep: dict[str, Any]) -> str:
    """What was trained on, beside what there is without training and D trained on."""
    recovered, loss = sweep["recovered"], baseline_of(sweep)["loss"]
    continued = next(row for row in recovered if row["rank"] is None)
    lines = []
    for rank in dict.fromkeys(row["rank"] for row in recovered if row["rank"]):
        size = f"k={rank}"
        plain = [
            row
            for row in sweep["rows"]
            if (row["method"], row["rank"], row["bits"]) == ("svd", rank, 32)
        ]
        runs = [row for row in recovered if row["rank"] == rank]
        best = f"{runs[0]['method']}, {runs[0]['bands']} bands"
        untrained = [("svd", row["added_loss"]) for row in plain]
        for name, added in [*untrained, (best, runs[0]["added_at_start"])]:
            lines.append([name, size, fixed(loss + added, 4), signed(added, 4)])
        for row in runs:
            towards = " towards D's predictions" if row["letter"] == "Bd" else ""
            name = f"**{row['letter']}** {best}, trained on{towards}"
            lines.append([name, size, *_numbers(row)])
    lines.append(["**D+** D, trained on", NOTHING, *_numbers(continued)])
    header = ["Model", "Size of", "Loss", "Added", "95% interval", "Less D+"]
    header += ["95% interval", "Tokens", "of D's"]
    lines = [line + [NOTHING] * (len(header) - len(line)) for line in lines]
    return table(header, lines, "ll" + "r" * (len(header) - 2))


def _numbers(row: dict[str, Any]) -> list[str]:
    return [
        fixed(row["val_loss"], 4),
        signed(row["added_loss"], 4),
        interval(row["interval"]),
        NOTHING if row["rank"] is None else signed(row["less_continued"], 4),
        NOTHING if row["rank"] is None else interval(row["less_continued_interval"]),
        count(row["tokens_seen"]),
        percent(row["share_of_tokens"]),
    ]


def _all(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> str:
    header = ["Method", "k", "Parameters", "Bytes", "Smaller", "Added", "Predicted"]
    header += ["Input", "Head", "KL", "Top-1", "s"]
    lines = [
        [
            _name(row),
            str(row["rank"] or "–"),
            count(row["params"]),
            count(row["bytes"]),
            times(baseline["bytes"] / row["bytes"]),
            signed(row["added_loss"], 4),
            signed(row["predicted_loss"], 4) + ("°" if row["is_anchor"] else ""),
            signed(row["added_loss_input"], 4),
            signed(row["added_loss_head"], 4),
            fixed(row["kl"], 4),
            percent(row["top1_agreement"]),
            fixed(row["seconds"], 1),
        ]
        for row in sorted(rows, key=lambda row: (row["bytes"], row["added_loss"]))
    ]
    return table(header, lines, "l" + "r" * (len(header) - 1))
