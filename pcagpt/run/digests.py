"""digests.json of a checkpoint: hashes of all files, and of all arrays of the weights.

It is written at the end of a save, and checked before Orbax opens a file. Checkpoints
of older versions have none; if one of this version has none, a warning is printed. If
digests.json is damaged, the checkpoint counts as damaged. Delete digests.json to read
the checkpoint unchecked.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pcagpt import trees
from pcagpt.errors import OF_NO_FILE, Unreadable, UserError, reason_of, unreadable
from pcagpt.file_hashes import (
    check_digests,
    digests_of,
    is_same_place,
    read_once,
    stamp_of,
)
from pcagpt.files import sync
from pcagpt.json_files import read_json, write_json
from pcagpt.run import foreign
from pcagpt.run.weights import read_weights
from pcagpt.sharding import processes

FILE = "digests.json"
_TRIES = 10  # of a read, while a run deletes its old checkpoints
# Orbax writes these two after the digests; no restored value depends on them.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Deleted(UserError):
    """A checkpoint is gone that was there before, or another one is in its place.

    The run that trains deleted it, or another command replaced the run.
    """


@contextlib.contextmanager
def present(folder: Path) -> Iterator[None]:
    """Raises Deleted, also in place of an error, if a checkpoint that is read is gone.

    The whole folder is taken away or replaced at once: what is still there and cannot
    be read is damaged. A GGUF file counts as a folder. Other programs write their files
    anew in place: an error then means nothing if they have changed.
    """
    known: int | None = None
    before = _stamps_of_others(folder)
    try:  # It stays open, so that no other folder gets its number.
        known = os.open(folder, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _gone(folder) from None
    except OSError:  # The reader meets and tells it, too.
        pass
    try:
        yield
    except Exception:
        if is_same_place(folder, known) and _stamps_of_others(folder) == before:
            raise
    else:
        if is_same_place(folder, known):
            return
    finally:
        if known is not None:
            os.close(known)
    raise _gone(folder)


def _stamps_of_others(folder: Path) -> dict[str, tuple[int, ...]]:
    """`stamps` of a model of another program; {} of a checkpoint of ours."""
    with contextlib.suppress(OSError):
        return stamps(folder) if foreign.is_model(folder) else {}
    return {}


def _gone(folder: Path) -> Deleted:
    """The error for a checkpoint that is no longer there."""
    fate, hint = "deleted", "a run that trains keeps only its last checkpoints; "
    if folder.exists() or not folder.name.isdecimal():
        fate, hint = "replaced or changed", ""
    return Deleted(
        f"{folder} was {fate} while this command used it: {hint}run the same command "
        "again"
    )


def persistent(read: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `read(path, ...)` of a run try again with the newest checkpoint if Deleted.

    A `path` that names one checkpoint is read once.
    """

    @functools.wraps(read)
    def read_again(path: str | Path, *rest: Any) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                return read(path, *rest)
            except Deleted:
                if not (left and Path(path).exists()):
                    raise

    return read_again


def seal(folder: Path, run_id: str | None = None) -> None:
    """Writes the digests of a complete checkpoint, and waits until all is on disk.

    run_id: of the run that it belongs to; None for weights that no run trained.
    """
    below = [path for path in folder.rglob("*") if path.name not in _UNLISTED]
    files = [str(path.relative_to(folder)) for path in below if path.is_file()]
    arrays = of_arrays(read_weights(folder))
    digests = {"files": digests_of(folder, files), "arrays": arrays}
    write_json(folder / FILE, digests | ({"run_id": run_id} if run_id else {}))
    for path in (*below, folder.parent):
        sync(path)


def files_of_others(folder: Path) -> list[Path]:
    """The files in a checkpoint that its digests.json does not list; [] without one."""
    try:
        listed = (read_json(folder / FILE, "") or {}).get("files")
    except UserError:
        return []
    own = {FILE, *_UNLISTED}
    return [
        path
        for path in (sorted(folder.rglob("*")) if isinstance(listed, dict) else ())
        if (path.is_file() or path.is_symlink())
        and str(path.relative_to(folder)) not in listed
        and path.name not in own
    ]


def of_arrays(weights: dict) -> dict[str, str]:
    """{path: sha256 of type, shape and content} of nested dicts of host arrays."""
    found = {}
    for path, leaf in trees.flatten(weights).items():
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
        found[path] = digest.hexdigest()
    return found


def owner(folder: Path) -> str | None:
    """The `run_id` of a checkpoint; None if it is unknown, or the file is damaged."""
    with contextlib.suppress(UserError):
        return (_stored(folder) or {}).get("run_id")
    return None


def of_weights(folder: Path) -> str | None:
    """The `summary` of a checkpoint's weights; None if they are damaged.

    Raises Unreadable as `damage` does.
    """
    try:
        return summary(arrays(folder))
    except Unreadable:
        raise
    except UserError:
        return None


def summary(found: dict[str, str]) -> str:
    """One hash of the digests of all arrays."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def arrays(folder: Path) -> dict[str, str]:
    """`of_arrays` of a checkpoint's weights; UserError if they cannot be read.

    Of a model of another architecture, the digests of its files.
    """
    if foreign.is_model(folder):
        return _of_foreign(folder)
    if known := (_stored(folder) or {}).get("arrays"):
        return known
    with reading(folder):
        return of_arrays(read_weights(folder))


@read_once
def _of_foreign(folder: Path) -> dict[str, str]:
    return foreign.file_digests(folder) or of_arrays(foreign.read_weights(folder))


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """{file: size, mtime} of a checkpoint's weights: shows a change, and reads nothing.

    No inode: some network file systems give a file a new one at times. No ctime: a
    backup with hard links changes it.
    """
    if foreign.is_model(folder):
        files = foreign.weight_files(folder)
    else:
        files = [file for file in folder.glob("weights/**/*") if file.is_file()]
    return {str(file.relative_to(folder)): stamp_of(file)[:2] for file in files}


def damage(folder: Path, below: str | tuple[str, ...]) -> str | None:
    """Why files of a checkpoint whose names begin with `below` are damaged, or None.

    Without digests, weights are read instead. Raises Unreadable if the system does not
    let a file be read: it may be undamaged.
    """
    is_of_weights = "weights/".startswith(below)
    try:
        listed = _stored(folder)
        if listed is not None:
            check_digests(folder, listed.get("files"), below)
        elif is_of_weights and folder.exists() and not foreign.is_model(folder):
            with reading(folder):
                read_weights(folder)
    except Unreadable:
        raise
    except UserError as error:
        return str(error)
    return None


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """In this context, an error that a damaged checkpoint can cause is a UserError.

    Call `damage` first. If there are digests, the files are then known to be good, and
    errors pass unchanged. Raises Unreadable as `damage` does.
    """
    try:
        yield
    except (UserError, *OF_NO_FILE):
        raise
    # Orbax and what it calls raise errors of many types.
    except Exception as error:
        if found := unreadable(error, folder):
            raise found from None
        is_of_memory = "RESOURCE_EXHAUSTED" in str(error)
        is_proved = (folder / FILE).exists()
        if is_proved or is_of_memory or processes.lost_process(error):
            raise
        raise UserError(f"{folder}: {reason_of(error)}") from None


def _stored(folder: Path) -> dict[str, Any] | None:
    """The content of digests.json; None in older checkpoints, and of others'."""
    if foreign.is_model(folder):
        return None
    return read_json(folder / FILE, "delete it to read the checkpoint unchecked")
