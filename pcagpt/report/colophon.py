"""The end of the report: how it was measured, and what each run left."""

from typing import Any
from urllib.parse import quote

from pcagpt.report.wording import code, count, duration, escaped, fixed, listed, table


def provenance(results: dict[str, Any]) -> str:
    """Command, commit, device, corpus, protocol, versions and date."""
    protocol, corpus = results["protocol"], results["corpus"]
    seeds = sorted({row["seed"] for row in results["rows"]})

    def fields(values: dict[str, Any]) -> str:
        return ", ".join(
            f"{escaped(name)} {code(value)}"
            for name, value in values.items()
            if value is not None and value != ""
        )

    windows = (
        f"{count(protocol.get('tokens_predicted'))} tokens in "
        f"{count(protocol.get('windows'))} windows of "
        f"{count(protocol.get('window'))}, one every "
        f"{count(protocol.get('stride'))}, split {code(protocol.get('split'))}"
    )
    tokenizer = {
        "tokenizer": protocol.get("tokenizer"),
        "sha256": protocol.get("tokenizer_sha256"),
    }
    rows = [
        ["Command", code(results["command"])],
        ["Commit", code(results["git_commit"] or "not recorded")],
        ["Date", escaped(results["created"])],
        ["Device", escaped(results["device"] or "not recorded")],
        ["Corpus", fields(corpus)],
        ["Evaluation", windows],
        ["Tokenizer", fields(tokenizer)],
        ["Seeds", listed([str(seed) for seed in seeds])],
        ["Versions", fields(results["versions"])],
    ]
    return table(["What", "Value"], rows, "ll")


def files(results: dict[str, Any]) -> list[str]:
    """Every run, with links to what it left."""
    header = ["", "Run", "Seed", "Loss", "Time", "Files"]
    rows = []
    for row in results["rows"]:
        links = ", ".join(
            f"[{name}]({quote(row['folder'])}/{name})"
            for name in ("result.json", "config.json", "metrics.jsonl")
        )
        rows.append(
            [
                f"**{row['letter']}**",
                code(row["folder"]),
                count(row["seed"]),
                fixed(row["val_loss"], 4),
                duration(row.get("seconds")),
                links,
            ]
        )
    return [
        table(header, rows, "llrrrl"),
        "Every number above comes from [results.json](results.json), which was "
        "written from these files.",
    ]
