"""Tells whether two checkpoints compute the same, wherever they were made."""

import hashlib
import json
from pathlib import Path

from pcagpt.config import KNOBS
from pcagpt.files import open_file
from pcagpt.model import BLOCK_KNOBS
from pcagpt.run import checkpoint, digests
from pcagpt.run.folder import choose

# The shapes of the arrays show these.
_SEEN_IN_ARRAYS = ("block_size", "n_layer", "n_embd", "bias")


@digests.persistent
def of(path: str | Path) -> str:
    """A hash of the weights and of the model that computes with them.

    Equal weights give equal hashes: time, device and versions do not enter. Of another
    architecture, equal files do. `path` and errors are as for `choose`.
    """
    there, step = choose(path)
    model = there.stored.get("model")
    model = model if isinstance(model, dict) else {}
    # Older versions hashed only n_head. Defaults are left out, so that old hashes stay
    # valid.
    unseen = {
        name: model[name]
        for name in BLOCK_KNOBS
        if name not in _SEEN_IN_ARRAYS
        and model.get(name, default := KNOBS[f"model.{name}"].default) != default
    }
    folder = checkpoint.folder_of(there.folder, step)
    with digests.present(folder):
        arrays = digests.arrays(folder)
    hashed = {"n_head": model.get("n_head"), **unseen, "arrays": arrays}
    text = json.dumps(hashed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def same(path: str | Path, recorded: str | None) -> bool:
    """Whether `recorded` is the fingerprint of `path`, by this or an older formula.

    Errors are as for `of`.
    """
    return recorded == _first(path) or recorded == of(path)


def _first(path: str | Path) -> str:
    """The formula of versions without digests. It hashes files that contain timings."""
    run_dir, step = checkpoint.find(path)
    digest = hashlib.sha256(f"step {step}\n".encode())
    written = checkpoint.folder_of(run_dir, step) / "weights/manifest.ocdbt"
    name = "result.json" if (run_dir / "result.json").exists() else "config.json"
    for file in [run_dir / name] + [written] * (name == "config.json"):
        if file.exists():
            with open_file(file) as content:
                digest.update(content.read())
    return digest.hexdigest()
