"""Finished run folders -> the dictionary of results.json."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.json_files import strict
from pcagpt.report.compare import (
    CONFIDENCE,
    MARGIN,
    compare_arms,
    judge_claims,
    loss_interval,
    window_interval,
)
from pcagpt.report.read import read_config, read_row, read_spectrum
from pcagpt.run import provenance
from pcagpt.run.folder import read_result


def collect_results(
    workdir: Path, runs: Sequence[str], factors: str, command: str
) -> dict[str, Any]:
    """Collects all data of the report on run folders in `workdir`, as JSON values.

    `factors` is the folder in `workdir` of the factorization of D's table.

    Raises:
      UserError: a run is missing, unfinished or damaged, appears twice, or cannot be
        compared with the others.
    """
    rows = [read_row(workdir / run) for run in runs]
    if not rows:
        raise UserError(f"no runs to report on in {workdir}: name at least one")
    order = list(ARMS)
    rows.sort(key=lambda r: (r["rank"] or 0, order.index(r["arm"]), r["seed"]))
    for row, other in pairwise(rows):
        if all(row[name] == other[name] for name in ("arm", "rank", "seed")):
            raise UserError(
                f"{row['folder']} and {other['folder']} are both {row['arm']} at rank "
                f"{row['rank']}, seed {row['seed']}: report on one of them"
            )
    _check_comparable(rows)
    protocol = rows[0].get("protocol") or {}
    baselines = {row["seed"]: row for row in rows if row["arm"] == "baseline"}
    rows = [row | _against(baselines.get(row["seed"]), row) for row in rows]
    comparisons = compare_arms(rows)
    config = read_config(workdir / rows[0]["folder"])
    vocab_size = config.get("vocab_size") or config.get("model", {}).get("vocab_size")
    corpus = {"name": protocol.get("corpus"), **config.get("data", {})}
    return strict(
        {
            "command": command,
            "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
            **provenance.joined(rows),
            "corpus": corpus | {"vocab_size": vocab_size},
            "protocol": protocol,
            "confidence": CONFIDENCE,
            "margin": MARGIN,
            "rows": [{n: v for n, v in row.items() if n != "windows"} for row in rows],
            "spectrum": read_spectrum(workdir / factors),
            "comparisons": comparisons,
            "hypotheses": judge_claims(comparisons),
        }
    )


def recovered_rows(
    folder: Path, made: Mapping[str, Mapping[str, Any]], baseline: Path
) -> list[dict[str, Any]]:
    """Compares runs that continue from a compressed model, or from D, with D.

    One of the runs must be D+. `added_loss` is the loss of a run minus D's loss, and
    `less_continued` is its loss minus the loss of D+. Both have an interval over
    evaluation windows, or None.
    `rank`, `method` and `bands` describe the table that the run started from: made[run]
    is the 'compressed' of its record, {} of D's.
    """
    own = read_row(baseline)
    rows = [read_row(folder / run) for run in made]
    _check_comparable([own, *rows])
    continued = next(row for row in rows if row["arm"] == "continued")
    found = []
    for row in rows:
        table = made[row["folder"]]
        copied = ("letter", "run", "val_loss", "start_loss", "tokens_seen")
        result = {name: row[name] for name in (*copied, "learning_rate")}
        result |= provenance.joined([row])
        result |= {name: table.get(name) for name in ("rank", "method", "bands")}
        start = row["start_loss"]
        found.append(
            result
            | {
                "added_loss": row["val_loss"] - own["val_loss"],
                "added_at_start": start and start - own["val_loss"],
                "interval": window_interval(row, own).bounds,
                "less_continued": row["val_loss"] - continued["val_loss"],
                "less_continued_interval": window_interval(row, continued).bounds,
                "share_of_tokens": row["tokens_seen"] / own["tokens_seen"],
            }
        )
    return found


def _against(baseline: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row's losses minus D's last loss, with intervals, and its tokens.

    The intervals are over evaluation windows. A run that starts from D counts D's
    tokens, too. `added_loss_by_decile` is None if one of the results is older than
    the losses by decile.
    """

    def added(loss: float | None, own: float | None) -> float | None:
        return None if loss is None or own is None else loss - own

    own_loss = baseline and baseline["val_loss"]
    by_decile = [r and r.get("val_loss_by_decile") for r in (row, baseline)]
    tokens = row["tokens_seen"]
    if ARMS[row["arm"]].takes:
        tokens = tokens + baseline["tokens_seen"] if baseline else None
    paired = baseline is not None and baseline is not row
    return {
        "val_loss_interval": loss_interval(row),
        "added_loss": added(row["val_loss"], own_loss),
        "added_loss_interval": window_interval(row, baseline).bounds
        if paired
        else None,
        "added_at_start": added(row["start_loss"], own_loss),
        "added_loss_by_decile": None
        if None in by_decile
        else list(map(added, *by_decile)),
        "tokens_with_baseline": tokens,
    }


def check_runs(done: Iterable[Path], planned: Iterable[dict[str, Any]]) -> None:
    """Raises UserError if a report could not read runs, or compare them.

    done: folders of finished runs; planned: of each run that is still to do, what is
    known of its row and may differ from theirs.
    """
    rows = [read_row(folder) for folder in done]
    _check_comparable([*rows, *(row | run for row in rows[:1] for run in planned)])


def check_dtype(baseline: Path, planned: dict[str, Any]) -> None:
    """Raises UserError if a run to do would compute in another dtype than a finished D.

    `planned`: as for `check_runs`.
    """
    own = _dtype_of(read_result(baseline) or {})
    _check_dtypes(baseline.name, own, planned["folder"], _dtype_of(planned))


def _check_comparable(rows: Iterable[dict[str, Any]]) -> None:
    """Raises UserError unless all rows have one protocol and one compute dtype.

    The runs must also have been trained on the same corpus. Corpus and tokenizer count
    by hashes, because a name may be a path: their names only if a run of an earlier
    version does not know its tokens.
    """
    known = [(row["folder"], _conditions(row)) for row in rows]
    for (folder, own), (other_folder, other) in combinations(known, 2):
        by_content = None not in (own["tokens_sha256"], other["tokens_sha256"])
        for name in sorted(own.keys() | other.keys()):
            one, its = own.get(name), other.get(name)
            if by_content and name in ("corpus", "tokenizer"):
                continue
            if name.endswith(("sha256", "compute_dtype")) and None in (one, its):
                continue
            if one == its:
                continue
            if name == "compute_dtype":
                _check_dtypes(folder, one, other_folder, its)
            raise UserError(
                f"{folder} and {other_folder} were evaluated under different protocols "
                f"({name}: {one!r} and {its!r}): train both with the same data and "
                "block size"
            )


def _check_dtypes(folder: str, one: str | None, other: str, its: str | None) -> None:
    if None not in (one, its) and one != its:
        raise UserError(
            f"{folder} computes in {one}, {other} in {its}: train both with "
            f"--config.model.compute_dtype={one}; move the folder of a finished run in "
            "another dtype aside first"
        )


def _dtype_of(row: dict[str, Any]) -> str | None:
    return (row.get("resolved") or {}).get("compute_dtype")


def _conditions(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's numbers depend on besides the model and its training.

    That is the evaluation protocol, the tokens it was trained on, and the compute
    dtype.
    """
    return {
        "tokens_sha256": None,
        "trained_on_sha256": (row.get("corpus") or {}).get("train"),
        "compute_dtype": _dtype_of(row),
        **(row.get("protocol") or {}),
    }
