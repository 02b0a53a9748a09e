"""Orbax checkpoints of a run: saved in the background, restored whole or weights only.

A checkpoint has three items: `weights` (params and constants), `optimizer` (its state
and the number of updates done) and `meta` (JSON). Its number is the updates done.
digests.json lists the content of every file and of every array of the weights. It is
checked before Orbax opens a file. Checkpoints of older versions have none.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pcagpt import trees
from pcagpt.errors import Unreadable, UserError, unreadable
from pcagpt.files import (
    LARGEST,
    check_digests,
    check_size,
    check_values,
    digests,
    read_json,
    strict,
    sync,
    write_json,
)
from pcagpt.sharding import placement

FOLDER = "ckpt"
ITEMS = ("weights", "optimizer", "meta")
DIGESTS = "digests.json"
# Orbax writes these two after the digests; no restored value depends on them.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the names of saves that are not complete
_LOGGER = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder; a context manager.

    Keeps the last `keep_last` and the one with the lowest validation loss.
    """

    def __init__(self, run_dir: Path, keep_last: int):
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep_last),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["val_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._folder = (run_dir / FOLDER).absolute()
        self._saving = 0  # the step that is written in the background
        if jax.process_index() == 0:
            # Orbax's own clean-up can remove what it is just saving.
            for unfinished in self._folder.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(unfinished, ignore_errors=True)
            _remove_damaged_notes(run_dir)
        placement.wait_for_all(str(self._folder))
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda m: m["val_loss"],
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=lambda: _seal(self._folder, self._saving)
                ),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Number of updates that the newest checkpoint has done."""
        return self._manager.latest_step()

    def save(
        self, step: int, items: dict, meta: dict, val_loss: float | None = None
    ) -> None:
        """Starts writing a checkpoint. After the return, the arrays may be donated.

        Args:
          step: number of updates done.
          items: {'weights', 'optimizer'}: trees of arrays.
          meta: JSON values.
          val_loss: None if it was not measured at this step.
        """
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.wait_until_finished()  # `_saving` belongs to one save at a time.
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(strict(meta))),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def wait(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()
        sync(self._folder)

    def restore_latest(self, template: dict) -> tuple[dict, dict] | None:
        """The newest undamaged checkpoint, or None if the run has no checkpoint.

        If it finds one, it reports and deletes the newer ones, which are damaged.

        Args:
          template: items as for `save`, as `jax.ShapeDtypeStruct` with the shardings to
            restore onto.

        Returns:
          (items, meta).

        Raises:
          UserError: every checkpoint is damaged, or the system does not let one be
            read.
        """
        arrays = {n: ocp.args.StandardRestore(tree) for n, tree in template.items()}
        wanted = ocp.args.Composite(**arrays, meta=ocp.args.JsonRestore())
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                # One process reads all files, the others follow its judgement.
                if not placement.from_first(lambda at=step: not self._damage(at)):
                    raise UserError(self._damage(step))
                restored = self._manager.restore(step, args=wanted)
                if not _is_sane({name: restored[name] for name in template}):
                    raise UserError("it holds values that are not finite, or absurd")
            # Orbax and what it calls raise errors of many types.
            except Exception as error:
                # It may be undamaged.
                if "RESOURCE_EXHAUSTED" in str(error) or placement.lost_process(error):
                    raise
                if found := unreadable(error):
                    raise found from None
                reason = str(error).strip().split("\n")[0][:200]
                damaged.append((step, reason))
                continue
            for later, reason in damaged:
                _LOGGER.warning(
                    "checkpoint %s is damaged (%s): "
                    "falling back to the one before, step %d",
                    self._folder / str(later),
                    reason,
                    step,
                )
                self._manager.delete(later)
            return {name: restored[name] for name in template}, restored.meta
        if damaged:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged ({damaged[0][1]}): "
                f"delete {self._folder.parent} to train the run again"
            )
        return None

    def _damage(self, step: int) -> str | None:
        """Why a checkpoint is damaged, as far as this process knows."""
        if jax.process_index() > 0:
            return "the first process found it damaged"
        return _damage(self._folder / str(step), tuple(f"{name}/" for name in ITEMS))


def steps(run_dir: Path) -> list[int]:
    """Numbers of the finished checkpoints of a run, ascending."""
    folder = run_dir / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def find(path: str | Path) -> tuple[Path, int]:
    """RUN, RUN/ckpt or RUN/ckpt/STEP -> (run folder, step).

    Without a step, it is the newest one. Raises UserError if there is no checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}: give the folder of a run, such as "
            "checkpoints/gpt_baseline, or train it first"
        )
    run_dir, step = _parts(path)
    if step is not None:
        return run_dir, step
    found = steps(run_dir)
    if not found:
        raise UserError(
            f"{run_dir} holds no finished checkpoint: give the folder of a trained run"
        )
    damage: dict[int, str] = {}
    for step in reversed(found):
        reason = _damage(run_dir / FOLDER / str(step), "weights/")
        if reason is None:
            for later in damage:
                _warn(f"{damage[later]}: falling back to the one before, step {step}")
            return run_dir, step
        damage[step] = reason
    raise UserError(
        f"no checkpoint in {run_dir / FOLDER} can be read ({damage[found[-1]]}): train "
        "the run again with --config.overwrite=True"
    )


def exists(path: str | Path) -> bool:
    """Whether `find` would find a checkpoint, damaged or not."""
    run_dir, step = _parts(Path(path))
    found = steps(run_dir)
    return bool(found) if step is None else step in found


def _parts(path: Path) -> tuple[Path, int | None]:
    """Run folder and step that a path names."""
    if path.name.isdigit() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    return path.parent if path.name == FOLDER else path, None


@functools.lru_cache
def _warn(message: str) -> None:
    """Logs a warning once: a command looks for its runs many times."""
    _LOGGER.warning(message)


def read_meta(run_dir: Path, step: int) -> dict[str, Any]:
    """The item 'meta' of a checkpoint: {'history', 'config'}.

    Raises UserError if it is missing or damaged.
    """
    folder = run_dir / FOLDER / str(step)
    damage = _damage(folder, "meta/")
    meta = None
    if not damage:
        remedy = "name another step beside it"
        meta = read_json(folder / "meta/metadata", remedy, has_infinities=True)
    if meta is None:
        reason = damage or "it has no meta/metadata, so that it was not trained here"
        raise UserError(f"checkpoint {folder} cannot be read: {reason}")
    return meta


def updates_done(run_dir: Path, step: int) -> int | None:
    """The number of updates stored in a checkpoint; None if it has only weights.

    A damaged checkpoint counts as what its name says.
    """
    folder = (run_dir / FOLDER / str(step)).absolute()
    if not any((folder / item).is_dir() for item in ("optimizer", "meta")):
        return None
    options = {"step": ocp.RestoreArgs(restore_type=np.ndarray)}
    try:
        with _local_checkpointer() as checkpointer:
            wanted = ocp.args.PyTreeRestore(
                item={"step": 0}, restore_args=options, partial_restore=True
            )
            stored = checkpointer.restore(folder / "optimizer", args=wanted)
            return int(stored["step"])
    # Orbax and what it calls raise errors of many types.
    except Exception:
        return step


def fingerprint(path: str | Path) -> str:
    """A hash of the weights and of the number of heads: what a run computes with.

    Equal weights give equal hashes: time, device and versions do not enter. `path` and
    errors are as for `find`. A finished run with a damaged last checkpoint is refused,
    because the checkpoint before is another model.
    """
    run_dir, step = find(path)
    named_step = Path(path).name == str(step)
    result = read_json(run_dir / "result.json", "delete it", has_infinities=True)
    last = (result or {}).get("steps", step)
    if last != step and not named_step:
        raise UserError(
            f"the last checkpoint of {run_dir}, step {last}, is damaged: delete "
            f"{run_dir / 'result.json'} to train the run on from step {step}, or name "
            f"{run_dir / FOLDER / str(step)}"
        )
    record = read_json(run_dir / "config.json", f"delete {run_dir}")
    if record is None:  # It is lost; training gave each checkpoint a copy.
        with contextlib.suppress(UserError):
            record = read_meta(run_dir, step).get("config")
    model = (record or {}).get("model")
    heads = model.get("n_head") if isinstance(model, dict) else None
    listed = _digests(run_dir / FOLDER / str(step)) or {}
    arrays = listed.get("arrays") or _digests_of_arrays(run_dir / FOLDER / str(step))
    text = json.dumps({"n_head": heads, "arrays": arrays}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def same(path: str | Path, recorded: str | None) -> bool:
    """Whether `recorded` is the `fingerprint` of `path`, by this or an older formula.

    Errors are as for `fingerprint`.
    """
    return recorded == _first_fingerprint(path) or recorded == fingerprint(path)


def _first_fingerprint(path: str | Path) -> str:
    """The formula before digests, over files with timings in them."""
    run_dir, step = find(path)
    digest = hashlib.sha256(f"step {step}\n".encode())
    written = f"{FOLDER}/{step}/weights/manifest.ocdbt"
    finished = (run_dir / "result.json").exists()
    for name in ("result.json",) if finished else ("config.json", written):
        if (run_dir / name).exists():
            digest.update((run_dir / name).read_bytes())
    return digest.hexdigest()


def _seal(folder: Path, step: int) -> None:
    """Writes digests.json of a checkpoint, which may not have its final name yet.

    Only the first process writes: all of them would write the same file.
    """
    if jax.process_index() > 0:
        return
    written = folder / f"{step}{_UNFINISHED}"
    written = written if written.exists() else folder / str(step)
    below = [path for path in written.rglob("*") if path.name not in _UNLISTED]
    files = [str(path.relative_to(written)) for path in below if path.is_file()]
    arrays = _digests_of_arrays(written)
    write_json(written / DIGESTS, {"files": digests(written, files), "arrays": arrays})
    for path in below:
        sync(path)
    sync(folder)


def _digests(folder: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's digests.json; None in older checkpoints."""
    return read_json(folder / DIGESTS, "name another step beside it")


def _remove_damaged_notes(run_dir: Path) -> None:
    """Removes notes that Orbax reads of every checkpoint and cannot do without if bad.

    The validation loss only tells which checkpoint is the best.
    """
    for step in steps(run_dir):
        folder = run_dir / FOLDER / str(step)
        for path in (folder / "_CHECKPOINT_METADATA", folder / "metrics"):
            file = path / "metrics" if path.name == "metrics" else path
            damage = _damage(folder, "metrics/") if file.exists() else None
            try:
                if damage and file != path:
                    raise UserError(damage)
                read_json(file, "it is left out")
            except Unreadable:
                raise
            except UserError as error:
                _LOGGER.warning("%s", error)
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _damage(folder: Path, below: str | tuple[str, ...]) -> str | None:
    """Why files of a checkpoint whose names begin with `below` are damaged, or None."""
    stamps = tuple(
        (str(path), found.st_size, found.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if (found := path.stat())
    )
    return _damage_at(folder, below, stamps)


@functools.lru_cache(maxsize=64)
def _damage_at(folder: Path, below: str | tuple[str, ...], _: tuple) -> str | None:
    """`_damage`, so that files are hashed once while their sizes and times stay."""
    try:
        listed = _digests(folder)
        if listed is not None:
            check_digests(folder, listed.get("files"), below)
    except Unreadable:
        raise
    except UserError as error:
        return str(error)
    return None


def _digests_of_arrays(folder: Path) -> dict[str, str]:
    """{path: sha256 of type, shape and content} of the weights in a checkpoint."""
    found = {}
    for path, leaf in trees.flatten(_read_weights(folder)).items():
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
        found[path] = digest.hexdigest()
    return found


@jax.jit
def _is_sane(items: dict) -> jax.Array:
    """Whether all values are finite, and those of weights no larger than LARGEST."""
    return jnp.all(
        jnp.stack(
            [
                jnp.all(jnp.abs(leaf) <= (LARGEST if name == "weights" else jnp.inf))
                for name, item in items.items()
                for leaf in jax.tree.leaves(item)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ]
        )
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax options for work that this process does without the others."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )


def _local_checkpointer() -> ocp.Checkpointer:
    """A checkpointer that reads in this process alone."""
    alone = _alone()
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        multiprocessing_options=alone,
    )


def save_weights(run_dir: Path, variables: dict) -> None:
    """Writes host arrays as checkpoint 0, the first in a folder; one process calls it.

    FileExistsError if the folder has checkpoints.
    """
    folder = (run_dir / FOLDER).absolute()
    folder.mkdir(parents=True)  # One of several processes: Orbax does not make it.
    options = ocp.CheckpointManagerOptions(
        create=False, multiprocessing_options=_alone()
    )
    with ocp.CheckpointManager(
        folder, options=options, item_names=("weights",)
    ) as manager:
        manager.save(
            0, args=ocp.args.Composite(weights=ocp.args.StandardSave(variables))
        )
        manager.wait_until_finished()
    _seal(folder, 0)


def load_weights(path: str | Path) -> tuple[dict, dict, int]:
    """(params, constants, step) of RUN or RUN/ckpt/STEP: nested dicts of host arrays.

    RUN stands for its newest checkpoint that is not damaged.

    Raises UserError if the checkpoint is missing or damaged, or holds values that are
    not finite, or absurd.
    """
    run_dir, step = find(path)
    folder = (run_dir / FOLDER / str(step)).absolute()
    try:
        damage = _damage(folder, "weights/")
        if damage:
            raise UserError(damage)
        weights = _read_weights(folder)
        for name, leaf in trees.flatten(weights).items():
            check_values(leaf, name)
    except UserError as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({error}): name another step beside "
            "it, or train the run again with --config.overwrite=True"
        ) from None
    return weights["params"], weights.get("constants") or {}, step


def _read_weights(folder: Path) -> dict:
    """{'params', 'constants'} of a checkpoint's folder: nested dicts of host arrays."""
    folder = folder.absolute() / "weights"
    try:
        with _local_checkpointer() as checkpointer:
            saved = checkpointer.metadata(folder).item_metadata.tree
            declared = sum(
                leaf.dtype.itemsize * math.prod(leaf.shape)
                for leaf in jax.tree.leaves(saved)
            )
            stored = sum(path.stat().st_size for path in folder.rglob("*"))
            check_size(folder, declared, stored)
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
            )
            weights = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
        if not isinstance(weights.get("params"), dict):
            raise ValueError("it holds no params")
        return weights
    except (UserError, MemoryError):
        raise
    # Orbax and what it calls raise errors of many types.
    except Exception as error:
        raise UserError(str(error).strip().split("\n")[0][:120]) from None
