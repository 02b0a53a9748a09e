"""The files of a run besides its checkpoints: its record and its result.

config.json   the run's record: its settings and what it depends on; written first
result.json   written last; a run is finished if its status is 'done'
val_window_losses.npy   [windows, 2] float64: summed loss and targets of each window
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.config import KNOBS
from pcagpt.errors import UserError
from pcagpt.files import read_json, read_npy, strict, write_json, write_npy
from pcagpt.run.build import DEVICE_KNOBS

# The sections that determine a run's numbers. Other knobs may change when it resumes.
IDENTITY = (
    "arm", "seed", "model", "data", "train", "distill", "init", "imported_sha256"
)  # fmt: skip
# The hash of an import's content counts, not its path, so a folder of runs can move.
NOT_IDENTITY = (
    "data.cache_dir",
    "init.import_wte_npy",
    "init.import_scale_matrices_npz",
    "init.import_bands",
    "init.blocks_from",
    "init.weights_from",
    "distill.teacher",
    *(f"model.{name}" for name in DEVICE_KNOBS),
)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """config.json, or None if no run has begun."""
    return read_json(run_dir / "config.json", _remedy(run_dir))


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json of a finished run; None if it is missing or unfinished."""
    result = read_json(run_dir / "result.json", _remedy(run_dir))
    return result if result and result.get("status") == "done" else None


def _remedy(run_dir: Path) -> str:
    return f"delete {run_dir}, or use --config.overwrite=True"


def read_window_losses(run_dir: Path) -> np.ndarray | None:
    """(summed loss, targets) of each validation window: float64 [windows, 2].

    None if the file does not exist, as in runs of older versions. UserError if it is
    damaged.
    """
    path = run_dir / "val_window_losses.npy"
    if not path.exists():
        return None
    windows = read_npy(path)
    if windows.ndim != 2 or windows.shape[1] != 2 or not np.isfinite(windows).all():
        raise UserError(
            f"{path} is damaged: it must hold finite numbers of shape [windows, 2]; "
            "delete it to get a report without intervals"
        )
    return windows.astype(np.float64)


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Makes the folder and writes config.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", record)


def write_result(
    run_dir: Path, result: dict[str, Any], window_losses: np.ndarray
) -> None:
    """Writes the window losses, then result.json."""
    write_npy(run_dir / "val_window_losses.npy", window_losses)
    write_json(run_dir / "result.json", result)


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """{'train.steps': 5000, ...}: the fields that determine a run's numbers.

    A knob that is newer than the record has its default.
    """
    found = {
        path: knob.default
        for path, knob in KNOBS.items()
        if path.split(".")[0] in IDENTITY
    }
    for section in IDENTITY:
        value = record.get(section)
        if isinstance(value, dict):
            found |= {f"{section}.{name}": entry for name, entry in value.items()}
        else:
            found[section] = value
    return strict({name: v for name, v in found.items() if name not in NOT_IDENTITY})


def config_sha256(record: dict[str, Any]) -> str:
    """Hash of a record's identity."""
    text = json.dumps(identity(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fields(run_dir: Path, record: dict[str, Any]) -> list[str]:
    """'train.steps (was 5000, now 6000)' for each difference from the stored record.

    Empty if no run has begun. If `record` has no `imported_sha256`, its imports do not
    exist yet, and the fields that depend on them are not compared.
    """
    stored = read_record(run_dir)
    if stored is None:
        return []
    if record.get("imported_sha256") is None:
        stored["imported_sha256"] = None
        if record.get("init", {}).get("import_bands"):
            bands = ("band_sizes", "band_ranks")
            stored["model"] |= {name: record["model"][name] for name in bands}
    old, new = identity(stored), identity(record)
    return [
        f"{name} (was {old.get(name)}, now {new.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
