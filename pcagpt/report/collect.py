"""Finished run folders → the dictionary of results.json."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.files import strict
from pcagpt.report.compare import (
    CONFIDENCE,
    MARGIN,
    compare_arms,
    judge_claims,
    window_interval,
)
from pcagpt.report.read import read_config, read_corpus, read_row, read_spectrum


def collect_results(workdir: Path, runs: Sequence[str], command: str) -> dict[str, Any]:
    """All data of the report, as strict JSON values.

    Args:
      workdir: folder of the run folders, and of pca_factorized/ if there is one.
      runs: names of run folders in it: any of the arms, at any ranks and seeds.
      command: the command line that made them.

    Raises:
      UserError: a run is missing, unfinished or damaged, appears twice, or was
        evaluated under another protocol than the others.
    """
    workdir = Path(workdir)
    rows = [read_row(workdir / run) for run in runs]
    if not rows:
        raise UserError(f"no runs to report on in {workdir}: name at least one")
    order = list(ARMS)
    rows.sort(key=lambda r: (r["rank"] or 0, order.index(r["arm"]), r["seed"]))
    _refuse_duplicates(rows)
    protocol = _shared_protocol(rows)
    baselines = {row["seed"]: row for row in rows if row["arm"] == "baseline"}
    rows = [row | _against(baselines.get(row["seed"]), row) for row in rows]
    comparisons = compare_arms(workdir, rows)
    first = workdir / rows[0]["folder"]  # D's, if there is a D
    factors = first.name.replace(ARMS["baseline"].run_name, "pca_factorized")
    versions = [row.get("versions") or {} for row in rows]
    return strict(
        {
            "command": command,
            "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
            "git_commit": _joined(row.get("git_commit") for row in rows),
            "device": _joined(row.get("device") for row in rows),
            "versions": {
                name: _joined(found.get(name) for found in versions)
                for name in sorted(set().union(*versions))
            },
            "corpus": {"name": protocol.get("corpus"), **read_corpus(first)},
            "protocol": protocol,
            "confidence": CONFIDENCE,
            "margin": MARGIN,
            "rows": rows,
            "spectrum": read_spectrum(workdir / factors),
            "comparisons": comparisons,
            "hypotheses": judge_claims(comparisons),
        }
    )


def recovered_rows(
    folder: Path, runs: Sequence[str], baseline: Path
) -> list[dict[str, Any]]:
    """Compares runs that continue from a compressed model, or from D, with D.

    Args:
      folder: of the run folders.
      runs: their names, one of them D's further training.
      baseline: the run folder of D.

    Returns:
      For each run letter, run, rank (of the model it started from; None for D's),
      method, bands, val_loss, start_loss, added_loss, added_at_start, interval (of
      added_loss over evaluation windows, or None), less_continued (its loss minus that
      of D trained further), less_continued_interval, tokens_seen, share_of_tokens (of
      D's), learning_rate.
    """
    own = read_row(baseline)
    rows = [read_row(folder / run) for run in runs]
    _shared_protocol([own, *rows])
    continued = next(row for row in rows if row["arm"] == "continued")
    found = []
    for row in rows:
        run_dir = folder / row["folder"]
        source = Path(read_config(run_dir)["init"]["weights_from"])
        made = read_config(source).get("compressed", {})
        added = row["val_loss"] - own["val_loss"]
        less = row["val_loss"] - continued["val_loss"]
        further = folder / continued["folder"]
        copied = ("letter", "run", "val_loss", "start_loss", "tokens_seen")
        found.append(
            {name: row[name] for name in (*copied, "learning_rate")}
            | {name: made.get(name) for name in ("rank", "method", "bands")}
            | {
                "added_loss": added,
                "added_at_start": row["start_loss"] - own["val_loss"],
                "interval": window_interval(run_dir, baseline, added)[0],
                "less_continued": less,
                "less_continued_interval": window_interval(run_dir, further, less)[0],
                "share_of_tokens": row["tokens_seen"] / own["tokens_seen"],
            }
        )
    return found


def _against(baseline: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """Losses of a row minus those of D, and its tokens with D's if it starts from D."""

    def added(loss: float | None) -> float | None:
        known = baseline and None not in (loss, baseline["val_loss"])
        return loss - baseline["val_loss"] if known else None

    tokens = row["tokens_seen"]
    if ARMS[row["arm"]].takes:
        tokens = tokens + baseline["tokens_seen"] if baseline else None
    return {
        "added_loss": added(row["val_loss"]),
        "added_at_start": added(row["start_loss"]),
        "tokens_with_baseline": tokens,
    }


def _refuse_duplicates(rows: list[dict[str, Any]]) -> None:
    """Raises UserError if two rows are of the same arm, rank and seed."""
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
    """The evaluation protocol of all rows.

    Raises:
      UserError: they differ in it.
    """
    protocol = rows[0].get("protocol") or {}
    for row in rows[1:]:
        other = row.get("protocol") or {}
        for name in sorted(protocol.keys() | other.keys()):
            if protocol.get(name) != other.get(name):
                raise UserError(
                    f"{rows[0]['folder']} and {row['folder']} were evaluated under "
                    f"different protocols ({name}: {protocol.get(name)!r} and "
                    f"{other.get(name)!r}): train both with the same data and block "
                    "size"
                )
    return protocol


def _joined(values: Iterable[str | None]) -> str | None:
    """The one value, or all different ones separated by commas."""
    return ", ".join(dict.fromkeys(value for value in values if value)) or None
