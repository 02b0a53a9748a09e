"""What was measured on a model, for its model card."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcagpt.errors import UserError, warn_once
from pcagpt.export.source import RunSource, Source
from pcagpt.json_files import check_fields, read_json
from pcagpt.rows import DEFAULTS, REMEDY, MeasuredOn, Row, read_sweep
from pcagpt.run.folder import read_result


def measured(source: Source, workdir: str) -> list[dict[str, Any]]:
    """{'corpus', 'split', 'tokens', 'window', 'loss', 'added', 'interval'} of each.

    'added' and 'interval' are None unless it compares the table with the original's.
    'is_first': True if only the first tokens are predicted, otherwise absent.
    'corpus' also tells corpora of one name apart, by the hash of their tokens, and
    compute dtypes. A sweep and an evaluation of the same tokens in windows of one
    length and one dtype are one entry; those of older versions, which lack hash or
    dtype, are told by their loss. A file that cannot be read is left out, with a
    warning.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for protocol, numbers in (*_evaluations(source, workdir), *_sweep(source)):
        known = {"corpus": None, "split": "val"} | protocol
        if None in (known["corpus"], known["split"]):  # Nobody knows what it was.
            continue
        names = ("corpus", "split", "window")
        names += ("tokens_predicted", "tokens_sha256", "compute_dtype")
        key = _same_text(tuple(known.get(name) for name in names), numbers, found)
        cut = {"is_first": True} if known.get("evaluated_tokens") else {}
        found[key] = numbers | cut | found.get(key, {})
    others = Counter(text[:2] for text in {(*key[:2], key[4]) for key in found})
    dtypes = Counter(key[:5] for key in found)
    return [
        {
            "corpus": corpus
            + f", tokens {(sha256 or 'unknown')[:8]}" * (others[corpus, split] > 1)
            + f", in {dtype or 'an unknown dtype'}" * (dtypes[key[:5]] > 1),
            "split": split,
            "tokens": count,
            "window": window,
            **{"added": None, "interval": None},
            **numbers,
        }
        for key, numbers in found.items()
        for corpus, split, window, count, sha256, dtype in [key]
    ]


def _same_text(key: tuple, numbers: dict, found: dict[tuple, dict]) -> tuple:
    """The key of the same measurement, if one of the two lacks a part, or the key."""
    for other, at in found.items():
        losses = numbers["loss"], at["loss"]
        is_alike = key[:3] == other[:3] and None not in losses
        is_alike &= all(
            one == its or None in (one, its)
            for one, its in zip(key[3:], other[3:], strict=True)
        )
        # Hardly any other text has the same mean loss to so many digits.
        if is_alike and math.isclose(*losses, rel_tol=1e-5):
            return other
    return key


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """A UserError in this context becomes a warning."""
    try:
        yield
    except UserError as error:
        warn_once(f"left out of the model card: {error}")


def _evaluations(source: Source, workdir: str) -> Iterator[tuple[dict, dict]]:
    """(protocol, {'loss'}) of each evaluation of this checkpoint."""
    if not isinstance(source, RunSource):
        return
    run, files = source.run, []
    result = None
    with _warned():
        result = read_result(run.folder)
    if result and result.get("steps") == run.step:
        dtype = {"compute_dtype": (result.get("resolved") or {}).get("compute_dtype")}
        protocol = result.get("protocol") and dtype | result["protocol"]
        files.append(result | {"loss": result.get("val_loss"), "protocol": protocol})
    for path in sorted(run.results_in(workdir).glob("evaluation_*.json")):
        with _warned():
            found = read_json(path, REMEDY) or {}
            fields = {"protocol": MeasuredOn | None, "loss": float | None}
            check_fields(found, fields, path, REMEDY)
            protocol = found.get("protocol") or {}
            tokens = protocol.get("tokens_predicted")
            # Older versions say it only in the name that `evaluate` gave the file.
            ending = rf"_{protocol.get('split')}_first{tokens}_step\d+(_\w{{8}})?"
            if re.search(f"{ending}$", path.stem):
                protocol["evaluated_tokens"] = tokens
            files.append(found)
    for one in files:
        protocol = one.get("protocol")
        # Evaluations of older versions do not say which weights they are of.
        is_of_run = one.get("step", run.step) == run.step and (
            "fingerprint" not in one or run.is_at(one["fingerprint"])
        )
        if protocol and is_of_run:
            yield protocol, {"loss": one.get("loss")}


def _sweep(source: Source) -> Iterator[tuple[dict, dict]]:
    """(protocol, numbers) of a compressed table, from the sweep or advice beside it."""
    if not (made := source.record.get("compressed")):
        return
    folder = Path(source.folder).resolve().parent
    for read in (_rows_of_sweep, _row_of_advice):
        with _warned():
            protocol, rows = read(folder)
            if protocol.get("checkpoint") != made.get("fingerprint"):
                continue
            # Files of older versions do not say which tokens they are of.
            cut = {"tokens_predicted": protocol.get("evaluated_tokens")}
            for row in rows:
                # The same recipe makes another table from other statistics.
                known = {None, made.get("table_sha256")}
                is_same = vars(row.recipe).items() <= (DEFAULTS | made).items()
                if is_same and row.table_sha256 in known:
                    numbers = {
                        "loss": row.loss + row.added_loss,
                        "added": row.added_loss,
                        "interval": row.added_loss_interval,
                    }
                    yield cut | protocol, numbers


def _rows_of_sweep(folder: Path) -> tuple[dict, list[Row]]:
    sweep = read_sweep(folder / "sweep.json")
    rows = sweep.get("rows", []) + sweep.get("other_rows", [])
    return sweep.get("protocol", {}) | (sweep.get("measured_on") or {}), rows


def _row_of_advice(folder: Path) -> tuple[dict, list[Row]]:
    path = folder / "advice.json"
    advice = read_json(path, REMEDY) or {}
    fields = dict.fromkeys(("protocol", "measured_on"), MeasuredOn | None)
    check_fields(advice, fields, path, REMEDY)
    rows = [Row.of(advice["chosen"], path)] if "chosen" in advice else []
    return (advice.get("protocol") or {}) | (advice.get("measured_on") or {}), rows
