"""What lies in run folders → plain dictionaries, with clear errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.run.folder import strict

REQUIRED = ("run", "arm", "rank", "seed", "status", "val_loss", "tokens_seen")


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """A strict JSON object.

    Raises:
      UserError: it is missing or damaged; `mend` says how to get it.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {mend}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {mend}")
    return strict(value)


def read_row(workdir: Path, run: str) -> dict[str, Any]:
    """result.json of a finished run, with its letter and folder.

    Raises:
      UserError: the run is missing, unfinished or damaged.
    """
    path = workdir / run / "result.json"
    mend = f"finish the run {run} first (its command resumes it)"
    row = read_json(path, mend)
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: {mend}")
    if row["arm"] not in ARMS:
        known = ", ".join(ARMS)
        raise UserError(f"{path} has the arm {row['arm']!r}, which is none of {known}")
    if row["status"] != "done":
        raise UserError(f"{path} has status {row['status']!r}, not 'done': {mend}")
    train = read_config(workdir / run).get("train", {})
    curve = read_curve(workdir / run)
    return {
        "letter": ARMS[row["arm"]].letter,
        "folder": run,
        "learning_rate": train.get("learning_rate"),
        "start_loss": curve[0, 1] if len(curve) and curve[0, 0] == 0 else None,
        **row,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run."""
    return read_json(folder / "config.json", "every run writes it; run it again")


def read_corpus(folder: Path) -> dict[str, Any]:
    """The data section of a run's config, with the vocabulary's size."""
    config = read_config(folder)
    vocab_size = config.get("vocab_size") or config.get("model", {}).get("vocab_size")
    return {**config.get("data", {}), "vocab_size": vocab_size}


def read_spectrum(folder: Path) -> dict[str, Any] | None:
    """Effective rank and energy kept per rank; None without a factorization."""
    if not (folder / "metadata.json").exists():
        return None
    metadata = read_json(folder / "metadata.json", "factorize the baseline again")
    ranks = metadata.get("ranks") or {}
    return {
        "folder": folder.name,
        "method": metadata.get("method"),
        "effective_rank": metadata.get("effective_rank"),
        "energy": {k: ranks[k].get("energy_kept") for k in sorted(ranks, key=int)},
    }


def read_curve(folder: Path) -> np.ndarray:
    """Validation of metrics.jsonl by tokens; empty without one.

    Returns:
      float64 [evaluations, 2]: tokens trained on, loss.
    """
    path = folder / "metrics.jsonl"
    points = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn when a run was killed
        if entry.get("split") == "val" and entry.get("loss") is not None:
            points[entry["tokens"]] = (entry["tokens"], entry["loss"])
    return np.array(sorted(points.values()), np.float64).reshape(-1, 2)


def read_window_losses(folder: Path) -> np.ndarray | None:
    """float64 [windows, 2], (summed loss, targets) of each; None without the file."""
    path = folder / "val_window_losses.npy"
    if not path.exists():
        return None
    try:
        windows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        windows = np.empty(0)
    if windows.ndim != 2 or windows.shape[1] != 2 or not np.isfinite(windows).all():
        raise UserError(
            f"{path} is damaged: it should hold finite numbers of shape [windows, 2]; "
            "delete it to have the report without its intervals"
        )
    return windows.astype(np.float64)
