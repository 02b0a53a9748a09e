"""Writes the result tables of README.md from the results in checkpoints/published.

python scripts/update_readme.py
"""

import json
import re
from pathlib import Path

from pcagpt.arms import BY_LETTER
from pcagpt.report import equal_size_table, recovery_table
from pcagpt.report.wording import (
    NOTHING,
    code,
    count,
    fixed,
    percent,
    signed,
    table,
    times,
)

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "checkpoints" / "published"
PEERS = {"torch": "PyTorch", "transformers": "transformers"}  # of scripts/bench.py


def results_table(folder: Path) -> str:
    """The models of a results.json as a table over a line of its provenance."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    rows = [
        [
            f"**{row['letter']}**",
            BY_LETTER[row["letter"]].title,
            count(row["rank"]),
            fixed(row["val_loss"]),
            NOTHING if row["letter"] == "D" else signed(row["added_loss"]),
            times(row["compression_embedding"]),
            times(row["compression_total"]),
            f"{row['tokens_seen'] / 1e6:.1f} M",
            count(row["tokens_per_second"]),
        ]
        for row in results["rows"]
    ]
    header = ["", "Model", "Rank", "Loss", "Added", "Table ×", "Model ×", "Tokens"]
    seeds = len({row["seed"] for row in results["rows"]})
    says = (
        f"Validation loss in nats per token on {code(results['corpus']['name'])}, "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}; × says how many times "
        f"smaller than D's. {results['device']}, commit "
        f"{code((results['git_commit'] or 'unknown')[:12])}, by"
    )
    text = table([*header, "Tokens/s"], rows, "llrrrrrrr")
    return f"{text}\n\n{says}\n\n    {results['command']}"


def compression_tables(folder: Path) -> str:
    """The tables of a sweep.json over a line of its provenance."""
    sweep = json.loads((folder / "sweep.json").read_text("utf-8"))
    says = (
        "Added loss in nats per token on the validation split of "
        f"{code(sweep['protocol']['corpus'])}, intervals over evaluation windows, one "
        f"seed. {sweep['device']}, commit {code(sweep['git_commit'][:12])}, by"
    )
    tables = [equal_size_table(sweep), recovery_table(sweep), says]
    return "\n\n".join([*tables, f"    {sweep['command']}"])


def speed_table(folder: Path) -> str:
    """The systems of a bench.json as a table over a line of its provenance."""
    bench = json.loads((folder / "bench.json").read_text("utf-8"))
    rows = [
        [
            row["system"],
            row["model"],
            count(row["devices"]),
            count(row["batch"]),
            fixed(row["ms_per_step"], 2),
            count(row["tokens_per_second"]),
            percent(row["utilisation"]),
            NOTHING if row["peak_bytes"] is None else fixed(row["peak_bytes"] / 1e9, 1),
        ]
        for row in bench["rows"]
    ]
    header = ["System", "Model", "GPUs", "Batch of each", "ms a step", "Tokens/s"]
    text = table([*header, "Of peak", "GB of each"], rows, "llrrrrrr")
    held = [
        [name, *(fixed(ratio[part]) for part in ("ratio", "least", "most"))]
        for name, ratio in bench["ratios"].items()
    ]
    header = ["Tokens/s of a GPU, one over the other", "Median", "Least", "Most"]
    ratios = table(header, held, "lrrr")
    steps = {row["system"]: row["steps"] for row in bench["rows"]}
    decoded = steps.pop("decode", None)
    lengths = [f"{number} steps" for number in sorted(set(steps.values()))]
    lengths += [f"{decoded} tokens decoded"] if decoded else []
    peers = [
        f"{title} {bench['versions'].get(name, NOTHING)}, "
        for name, title in PEERS.items()
        if name in steps
    ]
    rounds = sorted({len(row["rounds_ms"]) for row in bench["rows"]})
    says = (
        f"Medians of {' and '.join(map(str, rounds))} rounds of "
        f"{' and '.join(lengths)}. "
        f"{bench['device']}, JAX {bench['versions']['jax']}, {''.join(peers)}commit "
        f"{code((bench['git_commit'] or 'unknown')[:12])}, by"
    )
    return "\n\n".join([text, ratios, says, f"    {bench['command']}"])


TABLES = {
    "results.json": results_table,
    "sweep.json": compression_tables,
    "bench.json": speed_table,
}


def updated(readme: str) -> str:
    """The text with every block of results written anew."""

    def block(found: re.Match) -> str:
        folder = PUBLISHED / found[1]
        written = next(name for name in TABLES if (folder / name).exists())
        made = TABLES[written](folder)
        return f"<!-- results of {found[1]} -->\n{made}\n<!-- end -->"

    pattern = r"<!-- results of (\w+) -->\n.*?<!-- end -->"
    return re.sub(pattern, block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text("utf-8")), encoding="utf-8")
