"""Reads finished run folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.factorize.files import read_metadata
from pcagpt.run import folder as run_folder

REQUIRED = ("run", "arm", "rank", "seed", "val_loss", "tokens_seen")


def read_row(folder: Path) -> dict[str, Any]:
    """The result of a finished run, with its letter, folder and learning rate.

    Raises:
      UserError: the run is missing, unfinished, damaged or of an unknown arm.
    """
    result = run_folder.read_result(folder)
    if result is None:
        raise UserError(f"{folder} is not a finished run: run its command again")
    missing = [name for name in REQUIRED if name not in result]
    if missing:
        raise UserError(f"{folder / 'result.json'} lacks {', '.join(missing)}")
    if result["arm"] not in ARMS:
        raise UserError(
            f"{folder / 'result.json'} has the arm {result['arm']!r}: it must be one "
            f"of {', '.join(ARMS)}"
        )
    curve = read_curve(folder)
    return {
        "letter": ARMS[result["arm"]].letter,
        "folder": folder.name,
        "learning_rate": read_config(folder).get("train", {}).get("learning_rate"),
        "start_loss": curve[0, 1] if len(curve) and curve[0, 0] == 0 else None,
        **result,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
      UserError: there is none, or it is damaged.
    """
    config = run_folder.read_record(folder)
    if config is None:
        raise UserError(f"{folder / 'config.json'} is missing: run its command again")
    return config


def read_corpus(folder: Path) -> dict[str, Any]:
    """The data section of a run's config, and the vocabulary size."""
    config = read_config(folder)
    vocab_size = config.get("vocab_size") or config.get("model", {}).get("vocab_size")
    return {**config.get("data", {}), "vocab_size": vocab_size}


def read_spectrum(folder: Path) -> dict[str, Any] | None:
    """Effective rank and energy kept by each rank; None without a factorization."""
    metadata = read_metadata(folder)
    if metadata is None:
        return None
    ranks = metadata.get("ranks") or {}
    return {
        "folder": folder.name,
        "method": metadata.get("method"),
        "effective_rank": metadata.get("effective_rank"),
        "energy": {k: ranks[k].get("energy_kept") for k in sorted(ranks, key=int)},
    }


def read_curve(folder: Path) -> np.ndarray:
    """(tokens, validation loss) of each evaluation: float64 [evaluations, 2]."""
    path = folder / "metrics.jsonl"
    losses = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # A killed run can leave half a line.
        if entry.get("split") == "val" and entry.get("loss") is not None:
            losses[entry["tokens"]] = entry["loss"]
    return np.array(sorted(losses.items()), np.float64).reshape(-1, 2)


def read_window_losses(folder: Path) -> np.ndarray | None:
    """(summed loss, targets) of each window: float64 [windows, 2]; None without them.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "val_window_losses.npy"
    if not path.exists():
        return None
    windows = run_folder.read_window_losses(folder)
    if windows.ndim != 2 or windows.shape[1] != 2 or not np.isfinite(windows).all():
        raise UserError(
            f"{path} is damaged: it must hold finite numbers of shape [windows, 2]; "
            "delete it to get a report without intervals"
        )
    return windows.astype(np.float64)
