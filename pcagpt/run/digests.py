"""digests.json of a checkpoint: hashes of all files, and of all arrays of the weights.

It is written at the end of a save, and checked before Orbax opens a file. Checkpoints
of older versions have none. If digests.json is damaged, the checkpoint counts as
damaged. Delete digests.json to read the checkpoint unchecked.
"""

import hashlib
from pathlib import Path
from typing import Any

from pcagpt import trees
from pcagpt.errors import Unreadable, UserError
from pcagpt.files import check_digests, digests, read_json, sync, write_json
from pcagpt.run.weights import read_weights

FILE = "digests.json"
# Orbax writes these two after the digests; no restored value depends on them.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def seal(folder: Path) -> None:
    """Writes the digests of a complete checkpoint, and waits until all is on disk."""
    below = [path for path in folder.rglob("*") if path.name not in _UNLISTED]
    files = [str(path.relative_to(folder)) for path in below if path.is_file()]
    arrays = of_arrays(read_weights(folder))
    write_json(folder / FILE, {"files": digests(folder, files), "arrays": arrays})
    for path in (*below, folder.parent):
        sync(path)


def of_arrays(weights: dict) -> dict[str, str]:
    """{path: sha256 of type, shape and content} of nested dicts of host arrays."""
    found = {}
    for path, leaf in trees.flatten(weights).items():
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
        found[path] = digest.hexdigest()
    return found


def arrays(folder: Path) -> dict[str, str]:
    """`of_arrays` of a checkpoint's weights; UserError if they cannot be read."""
    return (_listed(folder) or {}).get("arrays") or of_arrays(read_weights(folder))


def damage(folder: Path, below: str | tuple[str, ...]) -> str | None:
    """Why files of a checkpoint whose names begin with `below` are damaged, or None.

    Raises Unreadable if the system does not let a file be read: it may be undamaged.
    """
    try:
        listed = _listed(folder)
        if listed is not None:
            check_digests(folder, listed.get("files"), below)
    except Unreadable:
        raise
    except UserError as error:
        return str(error)
    return None


def _listed(folder: Path) -> dict[str, Any] | None:
    """The content of digests.json; None in older checkpoints."""
    return read_json(folder / FILE, "delete it to read the checkpoint unchecked")
