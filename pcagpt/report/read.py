"""Reads finished run folders."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.errors import UserError
from pcagpt.factorization import factor_files
from pcagpt.json_files import check_fields
from pcagpt.losses.deciles import DECILES
from pcagpt.run.folder import look, read_result, read_window_losses
from pcagpt.telemetry.metrics import read_metrics

_LOGGER = logging.getLogger(__name__)
_REMEDY = "run its command again with --config.overwrite=True"
_NUMBER = (int, float, None)
# {field of result.json: its types}; None: older results lack it, or have no value.
_RESULT: dict[str, tuple] = {
    "run": (str,),
    "arm": (str,),
    "rank": (int, None),
    "seed": (int,),
    "val_loss": _NUMBER,
    "tokens_seen": (int,),
    "steps": (int, None),
    "best_val_loss": _NUMBER,
    "curve": (list, None),
    "val_loss_by_decile": (list, None),
    "perplexity": _NUMBER,
    "word_perplexity": _NUMBER,
    "bits_per_byte": _NUMBER,
    "ln_f_cosine": _NUMBER,
    "ln_f_cosine_p05": _NUMBER,
    "ln_f_cosine_d": _NUMBER,
    "params_total": _NUMBER,
    "params_embedding": _NUMBER,
    "compression_embedding": _NUMBER,
    "compression_total": _NUMBER,
    "tokens_per_second": _NUMBER,
    "seconds": _NUMBER,
    "peak_bytes": _NUMBER,
    "band_sizes": (list, None),
    "band_ranks": (list, None),
    "device": (str, None),
    "git_commit": (str, None),
    "versions": (dict[str, str], None),
    "protocol": (dict, None),
}


def read_row(folder: Path) -> dict[str, Any]:
    """Reads all that the report needs of a finished run.

    The row has the fields of result.json and, among others:
      curve: [[tokens, validation loss], ...] of each evaluation.
      windows: see `read_window_losses`.

    Raises:
      UserError: the run is missing, unfinished, damaged or of an unknown arm.
    """
    result = read_result(folder)
    if result is None:
        raise UserError(f"{folder} is not a finished run: run its command again")
    required = ("run", "arm", "rank", "seed", "val_loss", "tokens_seen")
    missing = [name for name in required if name not in result]
    if missing:
        raise UserError(
            f"{folder / 'result.json'} lacks {', '.join(missing)}: {_REMEDY}"
        )
    check_fields(result, _RESULT, folder / "result.json", _REMEDY)
    _check_deciles(result.get("val_loss_by_decile"), folder / "result.json")
    if result["arm"] not in ARMS:
        raise UserError(
            f"{folder / 'result.json'} has the arm {result['arm']!r}: it must be one "
            f"of {', '.join(ARMS)}"
        )
    curve, config = _curve(folder, result.get("curve")), read_config(folder)
    return {
        "letter": ARMS[result["arm"]].letter,
        "folder": folder.name,
        "learning_rate": config.get("train", {}).get("learning_rate"),
        "corpus": config.get("corpus"),
        "start_loss": curve[0][1] if curve and curve[0][0] == 0 else None,
        "windows": read_window_losses(folder),
        **result,
        "curve": curve,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a run, or its copy in the newest checkpoint.

    UserError if both are missing, or one is damaged.
    """
    there = look(folder)
    if there.damage:
        raise there.damage
    if there.stored is None:
        raise UserError(f"{folder / 'config.json'} is missing: run its command again")
    return there.stored


def read_spectrum(folder: Path) -> dict[str, Any] | None:
    """Effective rank and, of each rank, the energy kept or the ranks of its bands.

    None without a factorization.
    """
    metadata = factor_files.read_metadata(folder)
    if metadata is None:
        return None
    ranks = sorted(metadata["ranks"].items(), key=lambda item: int(item[0]))
    return {
        "folder": folder.name,
        "method": metadata.get("method"),
        "effective_rank": metadata.get("effective_rank"),
        **{
            name: {rank: of[field] for rank, of in ranks if of.get(field) is not None}
            for name, field in (("energy", "energy_kept"), ("bands", "band_ranks"))
        },
        "singular_values": _singular_values(folder),
    }


def _singular_values(folder: Path) -> list[float] | None:
    """Singular values of a factorization; None, with a warning, if they are damaged."""
    try:
        values = factor_files.read_spectrum(folder)
        return values.tolist()
    except UserError as error:
        _LOGGER.warning("the report has no figure of the spectrum: %s", error)
        return None


def _check_deciles(losses: list | None, path: Path) -> None:
    """Raises UserError unless there is a number or None for each decile, or no list."""
    if losses is None:
        return
    types = set(map(type, losses))
    if len(losses) != DECILES or not types <= {int, float, type(None)}:
        raise UserError(
            f"{path} is damaged ('val_loss_by_decile' holds no {DECILES} numbers): "
            f"{_REMEDY}"
        )


def _curve(folder: Path, curve: list | None) -> list[list[float]]:
    """The curve of result.json as numbers; of older versions, that of metrics.jsonl.

    The lines of metrics.jsonl have no hash. UserError if result.json is damaged.
    """
    if curve is None:
        losses = {
            entry["tokens"]: entry["loss"]
            for entry in read_metrics(folder / "metrics.jsonl")
            if entry["split"] == "val" and entry.get("loss") is not None
        }
        curve = sorted(losses.items())
    try:
        return np.array(curve, np.float64).reshape(-1, 2).tolist()
    except (TypeError, ValueError):
        raise UserError(
            f"{folder / 'result.json'} is damaged ('curve' holds no pairs of numbers): "
            f"{_REMEDY}"
        ) from None
