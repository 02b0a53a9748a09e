"""Reads finished run folders."""

from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.factorize.factor_files import read_metadata
from pcagpt.run.folder import read_record, read_result
from pcagpt.telemetry.record import read_metrics


def read_row(folder: Path) -> dict[str, Any]:
    """Reads the result of a run; adds letter, folder, learning rate and first loss.

    Raises:
      UserError: the run is missing, unfinished, damaged or of an unknown arm.
    """
    result = read_result(folder)
    if result is None:
        raise UserError(f"{folder} is not a finished run: run its command again")
    required = ("run", "arm", "rank", "seed", "val_loss", "tokens_seen")
    missing = [name for name in required if name not in result]
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
    """Reads config.json of a run; UserError if it is missing or damaged."""
    config = read_record(folder)
    if config is None:
        raise UserError(f"{folder / 'config.json'} is missing: run its command again")
    return config


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
    losses = {
        entry["tokens"]: entry["loss"]
        for entry in read_metrics(folder / "metrics.jsonl")
        if entry["split"] == "val" and entry.get("loss") is not None
    }
    return np.array(sorted(losses.items()), np.float64).reshape(-1, 2)
