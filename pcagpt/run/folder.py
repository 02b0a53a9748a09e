"""The files of a run besides its checkpoints: its record and its result.

config.json   the run's record: its settings and what it depends on; written first.
              Its 'run_id' is also in the checkpoints and in result.json; each
              checkpoint of training has a copy of the record, and must agree with it
result.json   written last: a run is finished when it is there with status 'done';
              'weights_sha256' is the hash of the weights of its last step
val_window_losses.npy   [windows, 2] float64: summed loss and targets of each window;
                        result.json has its sha256
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcagpt import process
from pcagpt.array_files import read_npy, write_npy
from pcagpt.config import check_stored
from pcagpt.errors import UserError, naming, warn_once
from pcagpt.file_hashes import is_same_place, sha256_of_file
from pcagpt.files import odd_kind, sync, unused_name
from pcagpt.json_files import check_fields, read_json, write_json
from pcagpt.rows import MeasuredOn
from pcagpt.run import checkpoint, digests, foreign, generation_files
from pcagpt.run.identity import KEPT, claims, contradiction, identity
from pcagpt.run.weights import read_updates
from pcagpt.telemetry.metrics import read_metrics

_CONFIG_REMEDY = (
    "delete it if the run was trained here (its checkpoints have a copy), or repeat "
    "the command that made it with --config.overwrite=True"
)
_RESULT_REMEDY = (
    "delete it and give the run's command again, or use --config.overwrite=True"
)
_WINDOWS_HASH = "val_window_losses_sha256"  # in result.json
WEIGHTS_HASH = "weights_sha256"  # in result.json, and in a record's 'compressed'
# {field of config.json besides the knobs: its types}
_RECORD = {
    "run_id": (str, None),
    "vocab_size": (int, None),
    "tokenizer": (str, None),
    "imported_sha256": (dict, None),
    "corpus_sha256": (str, None),
    "compressed": (dict, None),
    generation_files.FIELD: (dict[str, dict], None),
}
_RESULT = {
    "status": str | None,
    "run_id": str | None,
    "seed": int | None,
    "steps": int | None,
    "val_loss": float | None,
    "protocol": MeasuredOn | None,
    "resolved": dict[str, str] | None,
}
# Training writes one of these fields. Older versions wrote only imported_sha256.
_OURS = {"run_id", "imported_sha256"}
# Of the removal of a folder: looks at which it is gone, and seconds.
_LOOKS, _LONGEST_REMOVAL = 3, 10
LOGS = ("metrics.jsonl", "val_window_losses.npy", "result.json")  # of begun training


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """config.json, or None if no run has begun; UserError if it is damaged.

    Of a model of another program, the record of `foreign`.
    """
    if foreign.is_model(run_dir):
        return foreign.record_of(run_dir)
    path, remedy = run_dir / "config.json", _CONFIG_REMEDY
    record = read_json(path, remedy)
    if record is not None:
        check_fields(record, _RECORD, path, remedy)
        check_stored(record, f"{path} is damaged", remedy)
    return record


def _copy(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The record in a checkpoint; None if it has none that can be read."""
    with contextlib.suppress(UserError, OSError):  # A run may be deleting it.
        copy = checkpoint.read_saved_meta(run_dir, step).get("config")
        return copy if isinstance(copy, dict) else None


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json of a finished run.

    None if it is missing, unfinished, or of another run than config.json. Raises
    UserError if either is damaged.
    """
    return _result_of(run_dir, read_record(run_dir))


def _result_of(run_dir: Path, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """As `read_result`, of the run with this record; None: of any run."""
    if foreign.is_model(run_dir):
        return None
    path, remedy = run_dir / "result.json", _RESULT_REMEDY
    # Older versions wrote Infinity for a perplexity beyond floats.
    result = read_json(path, remedy, has_infinities=True)
    if result is None:
        return None
    check_fields(result, _RESULT, path, remedy)
    if result.get("status") != "done":
        return None
    record = record or result
    # Older versions give no run_id. The seed tells most of their runs apart.
    seeds = {one.get("seed") for one in (result, record) if "run_id" not in one}
    is_own = result.get("run_id") == record.get("run_id") and len(seeds - {None}) < 2
    return result if is_own else None


def read_window_losses(run_dir: Path) -> np.ndarray | None:
    """(summed loss, targets) of each validation window: float64 [windows, 2].

    None if the file does not exist, as in runs of older versions. UserError if it is
    damaged.
    """
    path = run_dir / "val_window_losses.npy"
    if not path.exists():
        return None
    remedy = "delete it to get a report without intervals"
    path_of_result = run_dir / "result.json"
    result = read_json(path_of_result, _RESULT_REMEDY, has_infinities=True) or {}
    if result.get(_WINDOWS_HASH) not in (None, sha256_of_file(path)):
        raise UserError(f"{path} was changed since it was written: {remedy}")
    windows = read_npy(path)
    if windows.ndim != 2 or windows.shape[1] != 2 or not np.isfinite(windows).all():
        raise UserError(
            f"{path} is damaged: it must hold finite numbers of shape [windows, 2]; "
            f"{remedy}"
        )
    return windows.astype(np.float64)


class Saved(NamedTuple):
    """What a checkpoint says of itself.

    record: its copy of the run's record, or None if it has none that can be read;
    updates: how many it was trained for, as `read_updates` tells.
    """

    step: int
    record: dict[str, Any] | None
    updates: int | None


@dataclasses.dataclass(frozen=True)
class FolderState:
    """What a run's folder holds, as `look` read it.

    record: config.json; stored: the same, and what only the newest checkpoint's copy
    knows of the corpus or keeps of another program's model, or this copy if config.json
    was lost; result: of a finished run; damage: why config.json or result.json cannot
    be read; record, stored and result are then None; stamps: of the weights of the
    checkpoint that `choose` chose.
    """

    folder: Path
    saved: tuple[Saved, ...]
    has_logs: bool
    record: dict[str, Any] | None = None
    stored: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    damage: UserError | None = None
    stamps: dict[str, tuple[int, ...]] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is anything that training would replace.

        A config.json that training wrote counts only after a logged update, because the
        first update may have run out of memory.
        """
        is_foreign = self.record is not None and not _OURS & self.record.keys()
        return bool(self.saved or self.has_logs or self.damage or is_foreign)

    @property
    def is_made_here(self) -> bool:
        """Whether training wrote the record and all checkpoints.

        Each checkpoint's number then equals the updates stored in it. A compressed
        model was not trained. A person's folder may hold checkpoints without an
        optimizer, or with wrong numbers.
        """
        stored = self.stored or {}
        if "compressed" in stored or not _OURS & stored.keys():
            return False
        unfinished = range(1, identity(stored, ("train",))["train.steps"])
        return all(
            # An unfinished run without its optimizer cannot go on, but it is ours.
            saved.updates == saved.step
            or (
                saved.updates is None
                and "run_id" in stored
                and saved.step in unfinished
            )
            for saved in self.saved
        )

    @property
    def stranger(self) -> str | None:
        """Why a file does not belong here: it is of another run, step or settings.

        None if all belong together. A damaged checkpoint is not judged.
        """
        own, stored = self.folder / "config.json", self.stored or {}
        fields = {"arm": "arm", "seed": "seed", "train.steps": "steps"}
        told = {name: (self.result or {}).get(of) for name, of in fields.items()}
        # Results of older versions lack some.
        told = {name: value for name, value in told.items() if value is not None}
        if changed := contradiction(told, stored):
            return f"{own} contradicts {self.folder / 'result.json'}: {changed}"
        for step, copy, updates in self.saved:
            folder = checkpoint.folder_of(self.folder, step)
            # A person may have given a trained model's checkpoint the number 0.
            if (self.result or step) and updates not in (None, step):
                return (
                    f"{folder} holds the weights after {updates} updates, not after "
                    f"{step}"
                )
            # Without a readable copy, the digests still name the run.
            run_id = copy.get("run_id") if copy else digests.owner(folder)
            if run_id and run_id != stored.get("run_id", run_id):
                return f"{folder} is a checkpoint of another run than {own}"
            if copy and (changed := contradiction(claims(copy), stored)):
                return f"{own} contradicts {folder}: {changed}"
            known = self._weights_sha256(step)
            if known and digests.of_weights(folder) not in (None, known):
                return f"{folder} holds other weights than those of {self.folder}"
        return None

    def _weights_sha256(self, step: int) -> str | None:
        """What `digests.of_weights` must be: of compressed models, of finished runs."""
        if made := (self.stored or {}).get("compressed"):
            return made.get(WEIGHTS_HASH)
        result = self.result or {}
        return result.get(WEIGHTS_HASH) if result.get("steps") == step else None

    @property
    def unproved(self) -> str | None:
        """A warning: no hash proves the content of a checkpoint. None if one does.

        Versions that wrote no `run_id` wrote no digests. A person may have deleted
        them, or copied the weights alone.
        """
        if foreign.is_model(self.folder) or "run_id" not in (self.stored or {}):
            return None
        for step, _, _ in self.saved:
            path = checkpoint.folder_of(self.folder, step) / digests.FILE
            if not (path.exists() or self._weights_sha256(step)):
                return (
                    f"{path} is missing: nothing shows whether the files beside it are "
                    "unchanged, and of this run"
                )
        return None

    @functools.cached_property
    def lack(self) -> str | None:
        """Why no checkpoint can be read; None if one can. Checks its weights' files."""
        return checkpoint.lack(self.folder)


def _completed(record: dict[str, Any], copy: dict[str, Any]) -> dict[str, Any]:
    """A record, and what only its copy knows of the corpus, or keeps as `KEPT`."""
    lost = (name for name in KEPT if record.get(name) is None and name in copy)
    record = record | {name: copy[name] for name in lost}
    parts = [one.get("corpus") or {} for one in (copy, record)]
    if not all(isinstance(part, dict) for part in parts):
        return record  # Who reads the corpus refuses this.
    known = {
        n: value for part in parts for n, value in part.items() if value is not None
    }
    return record | ({"corpus": known} if known else {})


def check_is_folder(path: Path) -> None:
    """Raises UserError if the path or its parent is there, and is no folder."""
    for place in (path.parent, path):
        kind = odd_kind(place) or ("a file" if place.exists() else "a folder")
        if kind == "a link to nothing":
            raise UserError(f"{place} is {kind}: remove it, or mount its disk")
        if kind != "a folder":
            raise UserError(
                f"{place} is {kind}, not a folder: move it away, or use another "
                "--config.workdir"
            )


def look(run_dir: Path, steps: Iterable[int] | None = None) -> FolderState:
    """Reads what a run's folder holds; `steps`: of these checkpoints only.

    Raises UserError as `check_is_folder` does, also for the folder of its checkpoints.
    """
    if not foreign.is_model(run_dir):
        check_is_folder(run_dir / checkpoint.FOLDER)
    saved = tuple(
        Saved(
            step,
            _copy(run_dir, step),
            read_updates(checkpoint.folder_of(run_dir, step)),
        )
        for step in (checkpoint.steps(run_dir) if steps is None else steps)
    )
    # Training resumes from checkpoints, never from logs.
    has_logs = not saved and any(map(_is_of_begun_run, map(run_dir.joinpath, LOGS)))
    try:
        record = read_record(run_dir)
        copy = next(filter(None, (one.record for one in reversed(saved))), None)
        stored = copy if record is None else _completed(record, copy or {})
        result = _result_of(run_dir, stored)
    except UserError as damage:
        return FolderState(run_dir, saved, has_logs, damage=damage)
    return FolderState(run_dir, saved, has_logs, record, stored, result)


@digests.persistent
def choose(path: str | Path) -> tuple[FolderState, int]:
    """What RUN or RUN/ckpt/STEP holds, and the step: the newest undamaged, or STEP.

    Raises:
      UserError: there is no checkpoint or no config.json, a checkpoint is another
        run's, config.json or result.json is damaged, or the last checkpoint of a
        finished run is damaged or missing: the one before is another model, and must
        be named.
    """
    run_dir, step = checkpoint.find(path)
    folder = checkpoint.folder_of(run_dir, step)
    with digests.present(folder):
        stamps = digests.stamps(folder)
        there = dataclasses.replace(look(run_dir, [step]), stamps=stamps)
        if there.damage:
            raise there.damage
        if there.stored is None:
            raise UserError(f"{run_dir} has no config.json: it is not a run's folder")
        if there.stranger:
            raise UserError(f"{there.stranger}: put the run's own files there")
        unproved = there.unproved
    if unproved:
        warn_once(unproved)
    last = (there.result or {}).get("steps", step)
    if last != step and Path(path) != folder:
        reason = digests.damage(checkpoint.folder_of(run_dir, last), "weights/")
        raise UserError(
            f"the last checkpoint of {run_dir}, step {last}, is damaged or incomplete "
            f"({reason or 'it is missing'}): delete {run_dir / 'result.json'} to train "
            f"the run on from step {step}, or name {folder}"
        )
    return there, step


def _is_of_begun_run(log: Path) -> bool:
    """Whether a log has more than the evaluation at step 0."""
    if not log.is_file():
        return log.exists()
    is_metrics = log.name == "metrics.jsonl"
    steps = {entry["step"] for entry in read_metrics(log)} if is_metrics else {}
    return log.stat().st_size > 0 and steps != {0}


def removed(path: Path) -> UserError:
    """The error of a command that no longer finds what it wrote."""
    return UserError(
        f"stopped, because {path} was removed or replaced while this command wrote "
        "there: if it was moved, move it back; the same command makes what is missing"
    )


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function that raises `removed` if a folder is gone, or another one.

    It counts from the first call that finds the folder. If the folder is gone, this
    error also takes the place of any other error in this context.
    """
    known: int | None = None  # It stays open, so that no other folder gets its number.

    def check() -> None:
        nonlocal known
        if known is not None:
            if not is_same_place(folder, known):
                raise removed(folder)
        elif folder.exists():
            known = os.open(folder, os.O_RDONLY)

    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        if known is not None:
            os.close(known)


def is_vacant(path: Path) -> bool:
    """Whether the path does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def move_aside(path: Path) -> None:
    """Renames a folder or file to NAME.replaced-TIME and says so; deletes nothing."""
    if is_vacant(path):
        return
    kept = path.rename(unused_name(path, "replaced"))
    process.say(f"{path} was moved to {kept.name}")


def make_room(folder: Path) -> None:
    """Makes an empty folder; moves what is there aside.

    A link stays: the lock is beside its target, where the next command looks for it.
    """
    place = folder.resolve()
    move_aside(place)
    place.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields a new folder, which takes the place of `folder` at the end.

    The caller holds the lock of the folder, or of the one above, because all callers
    write at the same place. What is there is moved aside. If it is a link, its target
    is replaced. An error removes the new folder. Raises `removed` if the new folder is
    gone.
    """
    place = folder.resolve()
    # It gets its name when it is complete. A killed command may have left one.
    written = place.with_name(f".{place.name}.partial")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        with naming(place), watching(written) as check:
            check()
            yield written
            check()
        move_aside(place)
        written.rename(place)
        sync(place.parent)
    except BaseException:
        _remove_for_good(written)
        raise


def _remove_for_good(folder: Path) -> None:
    """Removes a folder until it stays away.

    After an error, threads of tensorstore write for another moment. They make the
    folder again if it is gone.
    """
    absent, end = 0, time.monotonic() + _LONGEST_REMOVAL
    while absent < _LOOKS and time.monotonic() < end:
        absent = 0 if folder.exists() else absent + 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Makes the folder and writes config.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", record)


def write_result(
    run_dir: Path, result: dict[str, Any], window_losses: np.ndarray
) -> None:
    """Writes the window losses, then result.json."""
    path = run_dir / "val_window_losses.npy"
    write_npy(path, window_losses)
    write_json(run_dir / "result.json", result | {_WINDOWS_HASH: sha256_of_file(path)})
