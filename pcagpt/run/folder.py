"""What a run leaves besides checkpoints: its config and its result.

config.json   the resolved config, written before the first step
result.json   written last: its presence with status 'done' is what finished means
val_window_losses.npy   [windows, 2] float64: summed loss and targets of each window
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.config import KNOBS
from pcagpt.errors import UserError

DONE, TO_DO = "done", "to do"  # what a job's status may be

# What a run's numbers depend on; the rest of its config may change between resumes.
IDENTITY = (
    "arm", "seed", "model", "data", "train", "distill", "init", "imported_sha256"
)  # fmt: skip
# What is imported counts by its hash, so that a folder of runs can be moved.
NOT_IDENTITY = (
    "data.cache_dir",
    "init.import_wte_npy",
    "init.import_scale_matrices_npz",
    "init.import_bands",
    "init.blocks_from",
    "init.weights_from",
    "distill.teacher",
)


def read_config(run_dir: Path) -> dict | None:
    """The run's config, or None where no run has begun."""
    return _read_json(run_dir / "config.json")


def read_result(run_dir: Path) -> dict | None:
    """The result of a finished run, else None."""
    result = _read_json(run_dir / "result.json")
    return result if result and result.get("status") == "done" else None


def read_window_losses(run_dir: Path) -> np.ndarray:
    """Summed loss and number of targets of each validation window: [W, 2] float64."""
    return np.load(run_dir / "val_window_losses.npy", allow_pickle=False)


def write_config(run_dir: Path, config: dict) -> None:
    """Makes the folder and writes config.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)


def write_result(run_dir: Path, result: dict, window_losses: np.ndarray) -> None:
    """Writes the window losses and, last, result.json."""
    np.save(run_dir / "val_window_losses.npy", window_losses)
    write_json(run_dir / "result.json", result)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON in one atomic step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(strict(value), indent=2, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def strict(value: Any) -> Any:
    """The same with plain JSON values only: NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def identity(config: dict) -> dict[str, Any]:
    """{'train.steps': 5000, ...}: the fields that decide a run's numbers.

    A knob that the config lacks, because the run is older, counts at its default.
    """
    flat = {
        path: _jsonable(knob.default)
        for path, knob in KNOBS.items()
        if path.split(".")[0] in IDENTITY
    }
    for section in IDENTITY:
        value = config.get(section)
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": _jsonable(v) for name, v in value.items()}
        else:
            flat[section] = _jsonable(value)
    return {name: v for name, v in flat.items() if name not in NOT_IDENTITY}


def config_sha256(config: dict) -> str:
    """Hash of the identity of a config."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fields(run_dir: Path, config: dict) -> list[str]:
    """'name (was X, now Y)' for each field in which a run's config differs from this.

    Empty where no run has begun. Imports are compared once they have hashes.
    """
    stored = read_config(run_dir)
    if stored is None:
        return []
    if config.get("imported_sha256") is None:
        stored["imported_sha256"] = None
        if config.get("init", {}).get("import_bands"):
            bands = ("band_sizes", "band_ranks")
            stored["model"] |= {name: config["model"][name] for name in bands}
    old, new = identity(stored), identity(config)
    return [
        f"{name} (was {old.get(name)}, now {new.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{path} is damaged: delete {path.parent}, or use --config.overwrite=True"
        ) from None
