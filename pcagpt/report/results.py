"""Finished run folders → the dictionary that results.json holds."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pcagpt.arms import ARMS, BY_LETTER
from pcagpt.errors import UserError
from pcagpt.report.answers import (
    CONFIDENCE,
    EQUIVALENCE_MARGIN,
    compare_arms,
    judge_hypotheses,
    window_interval,
)
from pcagpt.report.folders import read_config, read_corpus, read_row, read_spectrum
from pcagpt.run.folder import strict

TABLE_ORDER = ("D", "D+", "A", "B", "Bd", "C", "E", "F", "G")


def collect_results(workdir: Path, runs: Sequence[str], command: str) -> dict[str, Any]:
    """Everything the report says, from finished runs, as strict JSON values.

    Args:
      workdir: folder of the run folders, and of pca_factorized/ where there is one.
      runs: names of run folders in it: any of the arms, at any ranks and seeds.
      command: the command line that made them.

    Raises:
      UserError: a run is missing, unfinished, damaged, there twice, or evaluated
        under another protocol than the others.
    """
    workdir = Path(workdir)
    rows = [read_row(workdir, run) for run in runs]
    if not rows:
        raise UserError(f"no runs to report on in {workdir}: name at least one")
    rows.sort(key=_table_order)
    _refuse_duplicates(rows)
    protocol = _shared_protocol(rows)
    baselines = {row["seed"]: row for row in rows if row["letter"] == "D"}
    rows = [_beside_baseline(row, baselines.get(row["seed"])) for row in rows]
    comparisons = compare_arms(workdir, rows)
    first = workdir / rows[0]["folder"]  # D's, if there is a D
    return strict(
        {
            "command": command,
            "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
            "git_commit": _joined(row.get("git_commit") for row in rows),
            "device": _joined(row.get("device") for row in rows),
            "versions": _joined_versions(rows),
            "corpus": {"name": protocol.get("corpus"), **read_corpus(first)},
            "protocol": protocol,
            "confidence": CONFIDENCE,
            "margin": EQUIVALENCE_MARGIN,
            "rows": rows,
            "spectrum": read_spectrum(workdir / _factor_folder(first.name)),
            "comparisons": comparisons,
            "hypotheses": judge_hypotheses(comparisons),
        }
    )


def recovered_rows(
    folder: Path, runs: Sequence[str], baseline: Path
) -> list[dict[str, Any]]:
    """Runs that went on from a compressed model, or from D, held against D.

    Args:
      folder: of the run folders and of the models that they went on from.
      runs: their names.
      baseline: the folder of D.

    Returns:
      For each run letter, run, rank (of its model's size; None of D), method, bands,
      val_loss, start_loss, added_loss, added_at_start, less_continued (its loss less
      that of D trained on, the run of rank None), interval and less_continued_interval
      (over evaluation windows, or None), tokens_seen, share_of_tokens (of D's),
      learning_rate.
    """
    own = read_row(baseline.parent, baseline.name)
    rows = [read_row(folder, run) for run in runs]
    _shared_protocol([own, *rows])
    continued, found = next(row for row in rows if row["letter"] == "D+"), []
    for row in rows:
        source = Path(read_config(folder / row["folder"])["init"]["weights_from"])
        made = read_config(source).get("compressed", {})
        effect = row["val_loss"] - own["val_loss"]
        bounds, *_ = window_interval(folder / row["folder"], baseline, effect)
        found.append(
            {
                "letter": row["letter"],
                "run": row["run"],
                "rank": made.get("rank"),
                "method": made.get("method"),
                "bands": made.get("bands"),
                "val_loss": row["val_loss"],
                "start_loss": row["start_loss"],
                "added_loss": effect,
                "added_at_start": row["start_loss"] - own["val_loss"],
                "interval": bounds,
                "less_continued": row["val_loss"] - continued["val_loss"],
                "less_continued_interval": window_interval(
                    folder / row["folder"],
                    folder / continued["folder"],
                    row["val_loss"] - continued["val_loss"],
                )[0],
                "tokens_seen": row["tokens_seen"],
                "share_of_tokens": row["tokens_seen"] / own["tokens_seen"],
                "learning_rate": row["learning_rate"],
            }
        )
    return found


def _table_order(row: dict[str, Any]) -> tuple:
    """D, then rank by rank A, B, C and the others; seeds in order."""
    return row["rank"] or 0, TABLE_ORDER.index(row["letter"]), row["seed"]


def _beside_baseline(
    row: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    """The row with its added loss, and its tokens with those of the D it builds on."""
    added, tokens = None, row["tokens_seen"]
    if baseline and None not in (row["val_loss"], baseline["val_loss"]):
        added = row["val_loss"] - baseline["val_loss"]
    if BY_LETTER[row["letter"]].takes:  # as of D's table
        tokens = tokens + baseline["tokens_seen"] if baseline else None
    at_start = None
    if baseline and None not in (row["start_loss"], baseline["val_loss"]):
        at_start = row["start_loss"] - baseline["val_loss"]
    return {
        **row,
        "added_loss": added,
        "added_at_start": at_start,
        "tokens_with_baseline": tokens,
    }


def _refuse_duplicates(rows: list[dict[str, Any]]) -> None:
    """One run for each (arm, rank, seed), or it is unclear which one is meant."""
    seen = {}
    for row in rows:
        key = (row["arm"], row["rank"], row["seed"])
        if key in seen:
            raise UserError(
                f"{seen[key]} and {row['folder']} are both {row['arm']} at rank "
                f"{row['rank']}, seed {row['seed']}: report on one of them"
            )
        seen[key] = row["folder"]


def _shared_protocol(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation protocol, which compared runs must have in common."""
    protocol = rows[0].get("protocol") or {}
    for row in rows[1:]:
        other = row.get("protocol") or {}
        for name in sorted(protocol.keys() | other.keys()):
            if protocol.get(name) != other.get(name):
                raise UserError(
                    f"{rows[0]['folder']} and {row['folder']} were evaluated under "
                    f"different protocols ({name}: {protocol.get(name)!r} and "
                    f"{other.get(name)!r}): their losses cannot be compared; train "
                    "both with the same data and block size"
                )
    return protocol


def _joined(values: Iterable[str | None]) -> str | None:
    """What the runs agree on; all of it, in order, where they do not."""
    return ", ".join(dict.fromkeys(value for value in values if value)) or None


def _joined_versions(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    """Package → version, over all runs."""
    versions = [row.get("versions") or {} for row in rows]
    names = sorted({name for found in versions for name in found})
    return {name: _joined(found.get(name) for found in versions) for name in names}


def _factor_folder(baseline: str) -> str:
    """The folder of the factors of a baseline, of the same seed."""
    return baseline.replace(ARMS["baseline"].run_name, "pca_factorized")
