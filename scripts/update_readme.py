"""Writes the results that README.md and other pages show, from checkpoints/published.

    python scripts/update_readme.py

A page has comments `<!-- KIND of FOLDER -->` and `<!-- end -->`. This script makes the
text between them from the files of the folder; `KINDS` says how.
"""

import json
import re
from itertools import chain
from pathlib import Path

from readme_parts import PARTS

from pcagpt.arms import ARMS
from pcagpt.methods import CODED
from pcagpt.report.experiment import means_over_seeds
from pcagpt.report.row_text import row_name
from pcagpt.report.sweep import sweep_view
from pcagpt.report.text import (
    NOTHING,
    code,
    count,
    fixed,
    percent,
    plus_minus,
    signed,
    table,
    table_of,
    times,
    with_interval,
)
from pcagpt.rows import read_sweep
from pcagpt.run.folder import read_record, read_result

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "checkpoints" / "published"
PAGES = (
    "README.md",
    "checkpoints/README.md",
    "checkpoints/published/RESULTS.md",
    "checkpoints/published/SPEED.md",
    "configs/README.md",
    "pcagpt/compression/README.md",
    "pcagpt/export/README.md",
    "scripts/README.md",
    "tests/README.md",
)
PEERS = {"torch": "PyTorch", "transformers": "transformers"}  # of scripts/bench.py


def short(commit: str | None) -> str:
    """Commits by 12 letters of each hash; '-dirty' stays: the tree had changes."""
    parts = [one.split("-") for one in (commit or "unknown").split(", ")]
    return ", ".join(code("-".join([sha[:12], *dirty])) for sha, *dirty in parts)


def results_table(folder: Path) -> str:
    """The models of a results.json as a table, with a line of provenance."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    rows = [
        [
            f"**{model['letter']}**",
            model["title"],
            count(model["rank"]),
            plus_minus(model["val_loss"], model["half"]),
            NOTHING
            if model["letter"] == "D"
            else plus_minus(model["added_loss"], model["added_half"], signed),
            times(model["compression_embedding"]),
            times(model["compression_total"]),
            f"{model['tokens_seen'] / 1e6:.1f} M",
            count(model["tokens_per_second"]),
        ]
        for model in means_over_seeds(results["rows"], results["comparisons"])
    ]
    header = ["", "Model", "Rank", "Loss", "Added", "Table ×", "Model ×", "Tokens"]
    seeds = len({row["seed"] for row in results["rows"]})
    says = (
        f"Validation loss in nats per token on {code(results['corpus']['name'])}, "
        "± half of its 95% interval over "
        f"{'evaluation windows, one seed' if seeds == 1 else f'{seeds} seeds'}. The "
        "columns with × divide D's parameters by the model's. "
        f"{results['device']}, commit "
        f"{short(results['git_commit'])}, by"
    )
    text = table([*header, "Tokens/s"], rows, "llrrrrrrr")
    return f"{text}\n\n{says}\n\n    {results['command']}"


def compression_tables(folder: Path) -> str:
    """The tables of a sweep.json, with a line of provenance."""
    sweep = read_sweep(folder / "sweep.json")
    says = (
        "Added loss in nats per token on the validation split of "
        f"{code(sweep['protocol']['corpus'])}, intervals over evaluation windows, one "
        f"seed. {sweep['device']}, commit {short(sweep['git_commit'])}, by"
    )
    view = sweep_view(sweep)
    parts = [table_of(view["at_sizes"], view["sizes"])]
    if view["recovery"]:
        parts.append(table_of(view["recovery"], view["recovery_columns"]))
    return "\n\n".join([*parts, says, f"    {sweep['command']}"])


def codes_table(folder: Path) -> str:
    """Tables of few bytes on the validation and the test split of two sweep.json."""
    own, other = (read_sweep(folder / name / "sweep.json") for name in ("val", "test"))
    tested = {row.recipe: row for row in other["rows"]}
    pairs = [(row, tested[row.recipe]) for row in own["rows"] if row.recipe in tested]
    vocab_size, width = own["protocol"]["table"]
    rows = [
        [
            row_name(row.method, row.bands, row.bits),
            count(row.bytes),
            fixed(8 * row.bytes / (vocab_size * width), 2),
            count(row.memory),
            with_interval(row.added_loss, row.added_loss_interval),
            with_interval(same.added_loss, same.added_loss_interval),
        ]
        for row, same in sorted(pairs, key=lambda pair: pair[0].bytes)
    ]
    header = ["Table", "Bytes", "Bits", "Memory", "Added, validation", "Added, test"]
    commit = short(other["git_commit"])
    says = (
        "Added loss in nats per token, ± half of its 95% interval over evaluation "
        f"windows, one seed. {other['device']}, commit {commit}, by"
    )
    commands = "\n".join(f"    {sweep['command']}" for sweep in (own, other))
    parts = [table(header, rows, "lrrrrr"), says, commands]
    if (folder / "further").is_dir():
        parts.append(further_table(folder / "further"))
    return "\n\n".join(parts)


def further_table(folder: Path) -> str:
    """D and models with its coded table, each trained further."""
    sweep = read_sweep(folder / "sweep.json")
    coded = {f"best_coded_k{r.rank}": r for r in sweep["rows"] if r.method == CODED}
    rows, results = [], []
    for path in sorted(folder.glob("*/result.json")):
        result, record = read_result(path.parent), read_record(path.parent)
        source = coded.get(Path(record["init"]["weights_from"]).name)
        size = f"coded table of {count(source.bytes)} bytes" if source else "D"
        start = [ARMS[result["arm"]].letter, size, fixed(result["curve"][0][1], 4)]
        rows.append([*start, fixed(result["val_loss"], 4)])
        results.append(result)
    device, commit = results[0]["device"], short(results[0]["git_commit"])
    says = (
        f"Validation loss of another D, of {count(sweep['step'])} steps "
        f"({fixed(sweep['rows'][0].loss, 4)} nats), and of models trained further for "
        f"{count(results[0]['steps'])} steps, without intervals. Bd learns D's "
        f"predictions. {device}, commit {commit}, by `compress.recover_ranks`:"
    )
    return f"{says}\n\n{table(['', 'From', 'Start', 'End'], rows, 'llrr')}"


def speed_table(folder: Path) -> str:
    """The systems of a bench.json as a table, with a line of provenance."""
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
            gigabytes(row),
        ]
        for row in bench["rows"]
    ]
    header = ["System", "Model", "GPUs", "Batch per GPU", "ms per step", "Tokens/s"]
    text = table([*header, "Of peak", "GB per GPU"], rows, "llrrrrrr")
    held = [
        [name, *(fixed(ratio[part]) for part in ("ratio", "least", "most"))]
        for name, ratio in bench["ratios"].items()
    ]
    header = ["Ratio of tokens/s per GPU", "Median", "Least", "Most"]
    ratios = table(header, held, "lrrr")
    return "\n\n".join([text, ratios, measured([bench])])


def scaling_table(folder: Path) -> str:
    """The N_gpus.json files of a folder side by side, with a line of provenance."""
    benches = {
        int(path.stem.removesuffix("_gpus")): json.loads(path.read_text("utf-8"))
        for path in folder.glob("*_gpus.json")
    }
    benches = dict(sorted(benches.items()))
    header = ["System", "Model", "Batch per GPU"]
    for gpus in benches:
        header += [f"{gpus} GPUs: tokens/s", "Efficiency", "GB per GPU"]
    known = [cells_by_system(bench, gpus) for gpus, bench in benches.items()]
    rows = []
    for system in dict.fromkeys(chain(*known)):
        cells = [cells.get(system, 3 * [NOTHING]) for cells in known]
        rows.append([*map(str, system), *chain(*cells)])
    text = table(header, rows, "llr" + len(benches) * "rrr")
    return f"{text}\n\n{measured(list(benches.values()))}"


def cells_by_system(bench: dict, gpus: int) -> dict[tuple, list[str]]:
    """(system, model, batch) → tokens/s, parallel efficiency, GB per GPU.

    The efficiency is the speed divided by that of equally many independent GPUs.
    """
    cells = {}
    for row in bench["rows"]:
        system, model, batch = row["system"], row["model"], row["batch"]
        rate, share = count(row["tokens_per_second"]), NOTHING
        if row["devices"] < gpus:
            rate += f" on {row['devices']}"
        held = bench["ratios"].get(f"{model}, batch {batch}: {system} / pcagpt")
        if held:
            ratio, least, most = (fixed(held[k]) for k in ("ratio", "least", "most"))
            share = f"{ratio} ({least} to {most})"
        cells[system, model, batch] = [rate, share, gigabytes(row)]
    return cells


def gigabytes(row: dict) -> str:
    """Peak memory of one GPU."""
    return NOTHING if row["peak_bytes"] is None else fixed(row["peak_bytes"] / 1e9, 1)


def measured(benches: list[dict]) -> str:
    """A text about how benches were measured; equal parts appear once."""
    rows = [row for bench in benches for row in bench["rows"]]
    systems = {row["system"]: row["steps"] for row in rows}
    decoded = {n for name, n in systems.items() if name.startswith("decode")}
    steps = {n for name, n in systems.items() if not name.startswith("decode")}
    lengths = [f"{number} steps" for number in sorted(steps)]
    lengths += [f"{number} tokens decoded" for number in sorted(decoded)]
    rounds = map(str, sorted({len(row["rounds_ms"]) for row in rows}))
    versions = [
        f"{title} {bench['versions'].get(name, NOTHING)}"
        for name, title in {"jax": "JAX", **PEERS}.items()
        for bench in benches
        if name == "jax" or any(name in system.split("-") for system in systems)
    ]
    devices = [bench["device"] for bench in benches]
    commits = [short(bench["git_commit"]) for bench in benches]
    commands = [f"    {bench['command']}" for bench in benches]
    says = (
        f"Medians of {' and '.join(rounds)} rounds of {' and '.join(lengths)}. "
        f"{joined(devices, ' and ')}, {joined(versions, ', ')}, "
        f"commit {joined(commits, ' and ')}, by"
    )
    return says + "\n\n" + joined(commands, "\n")


def joined(texts: list[str], between: str) -> str:
    """The distinct texts with `between` between them."""
    return between.join(dict.fromkeys(texts))


TABLES = {
    "results.json": results_table,
    "sweep.json": compression_tables,
    "*/sweep.json": codes_table,
    "bench.json": speed_table,
    "*_gpus.json": scaling_table,
}


def results(folder: Path) -> str:
    """The tables of a folder, whatever its command wrote."""
    return next(of for name, of in TABLES.items() if any(folder.glob(name)))(folder)


KINDS = PARTS | {"results": results}


def updated(page: str) -> str:
    """The text of a page with every block written again."""

    def block(found: re.Match) -> str:
        kind, name = found[1], found[2]
        text = KINDS[kind](PUBLISHED if name == "all" else PUBLISHED / name)
        lines = [f"<!-- {kind} of {name} -->", *filter(None, [text]), "<!-- end -->"]
        return "\n".join(lines)

    pattern = r"<!-- (\w+) of ([\w./-]+) -->\n.*?<!-- end -->"
    return re.sub(pattern, block, page, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / name
        page.write_text(updated(page.read_text("utf-8")), encoding="utf-8")
