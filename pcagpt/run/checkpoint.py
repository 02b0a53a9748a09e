"""Orbax checkpoints of a run: saved in the background, restored whole or weights only.

A checkpoint has three items: `weights` (params and constants), `optimizer` (its state
and the number of updates done) and `meta` (JSON). Its number is the updates done. Its
digests are checked before Orbax opens a file.
"""

import glob
import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pcagpt import trees
from pcagpt.array_files import LARGEST, check_values
from pcagpt.errors import Unreadable, UserError, warn_once
from pcagpt.files import sync, unused_name
from pcagpt.json_files import read_json, strict
from pcagpt.model import is_order
from pcagpt.run import digests, foreign
from pcagpt.run.weights import alone, read_weights
from pcagpt.sharding import processes

FOLDER = "ckpt"
ITEMS = ("weights", "optimizer", "meta")
_REMEDY = "repeat the command that made it: a trained run needs --config.overwrite=True"
_NUMBER = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint's folder
_LONGEST_WAIT = 60  # seconds, for a thread of Orbax after an error
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the names of saves that are not complete
_DELETED = ".deleted"  # holds old checkpoints until their files are deleted
_LOGGER = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder; a context manager.

    Keeps the last `keep_last` and the one with the lowest validation loss. All
    processes must call the methods.
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
            self._empty()
            _move_damaged_metadata_aside(run_dir)
        processes.wait_for_all(FOLDER)
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda m: m["val_loss"],
                # Takes them away at once: no reader sees a part. See `digests.present`.
                todelete_subdir=_DELETED,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type | None, *_) -> None:
        try:
            self._manager.close()
        except Exception:
            # A save into a folder that is gone must not hide why training stopped.
            if error is None:
                raise

    def _empty(self) -> None:
        """Deletes the files of old checkpoints, on the first process.

        Files that a person put there move to STEP.replaced-TIME.
        """
        if jax.process_index() > 0:
            return
        deleted = self._folder / _DELETED
        for old in deleted.iterdir() if deleted.is_dir() else ():
            if others := digests.files_of_others(old):
                kept = unused_name(self._folder / old.name, "replaced")
                for file in others:
                    place = kept / file.relative_to(old)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file.rename(place)
                _LOGGER.warning(
                    "%s is deleted, because newer checkpoints take its place. What "
                    "pcagpt did not write there is now in %s",
                    self._folder / old.name,
                    kept,
                )
        shutil.rmtree(deleted, ignore_errors=True)

    def _seal(self) -> None:
        """Completes a save. Its folder may still have a temporary name."""
        if jax.process_index() > 0:  # All would write the same file.
            return
        written = self._folder / f"{self._saving}{_UNFINISHED}"
        final = self._folder / str(self._saving)
        digests.seal(written if written.exists() else final, self._run_id)

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
        self._empty()
        self._saving, self._run_id = step, (meta.get("config") or {}).get("run_id")
        self._manager.save(
            step,
            args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(strict(meta))),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def wait(self) -> None:
        """Waits until every save is on disk; OSError if the last one was removed."""
        self._manager.wait_until_finished()
        self._empty()
        sync(self._folder)
        if self._saving:
            (self._folder / str(self._saving)).stat()

    def restore_latest(self, template: dict) -> tuple[dict, dict] | None:
        """The newest undamaged checkpoint, or None if the run has no checkpoint.

        If it finds one, it reports the newer ones, which are damaged, and moves them
        aside: their steps are trained again.

        Args:
          template: items as for `save`, as `jax.ShapeDtypeStruct` with the shardings to
            restore onto.

        Returns:
          (items, meta).

        Raises:
          UserError: every checkpoint is damaged, or the system does not let one be
            read. Any other error is no damage, and leaves all checkpoints as they are.
        """
        arrays = {n: ocp.args.StandardRestore(tree) for n, tree in template.items()}
        wanted = ocp.args.Composite(**arrays, meta=ocp.args.JsonRestore())
        below = tuple(f"{name}/" for name in ITEMS)
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                # One process reads all files, the others follow its judgement.
                if reason := processes.from_first(
                    lambda at=step: digests.damage(self._folder / str(at), below)
                ):
                    raise UserError(reason)
                with digests.reading(self._folder / str(step)):
                    restored = self._manager.restore(step, args=wanted)
                if not _is_sane({name: restored[name] for name in template}):
                    raise UserError("it holds values that are not finite, or absurd")
            except Unreadable:
                raise
            except UserError as error:
                damaged.append((step, error))
                continue
            for later, reason in damaged:
                kept = processes.from_first(lambda at=later: self._move_aside(at))
                _LOGGER.warning(
                    "checkpoint %s is damaged or incomplete (%s): "
                    "falling back to the one before, step %d; its files are kept in %s",
                    self._folder / str(later),
                    reason,
                    step,
                    kept,
                )
            self._manager.reload()
            return {name: restored[name] for name in template}, restored.meta
        if damaged:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged or incomplete "
                f"({damaged[0][1]}): delete {self._folder.parent} to train the run "
                "again, or give its own command --config.overwrite=True"
            )
        return None

    def _move_aside(self, step: int) -> str:
        """Renames a checkpoint, so that no command uses it; returns its new name."""
        folder = self._folder / str(step)
        return folder.rename(unused_name(folder, "damaged")).name


def check_path(folder: Path) -> None:
    """Raises UserError if Orbax cannot save in a folder, because of its path."""
    path = str(folder.absolute())
    # Orbax takes it for a pattern, finds nothing, and loses the arrays.
    if glob.escape(path) != path:
        raise UserError(
            f"{path} holds one of *?[, with which no checkpoint can be saved: use "
            "another --config.workdir"
        )


def steps(run_dir: Path) -> list[int]:
    """Numbers of the finished checkpoints of a run, ascending."""
    if foreign.is_model(run_dir):
        return [foreign.STEP]
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    # One look may miss the new name of a checkpoint, and the old one that was deleted.
    for _ in range(2):
        names = [path.name for path in folder.iterdir() if path.is_dir()]
        if found := sorted(map(int, filter(_NUMBER.fullmatch, names))):
            return found
    return []


def folder_of(run_dir: Path, step: int) -> Path:
    """Folder of a checkpoint; of a model of another program, its own folder."""
    if foreign.is_model(run_dir):
        return run_dir
    return run_dir / FOLDER / str(step)


def find(path: str | Path) -> tuple[Path, int]:
    """RUN, RUN/ckpt or RUN/ckpt/STEP -> (run folder, step); also a file of `foreign`.

    Without a step, it is the newest one with undamaged weights. Raises UserError if
    there is no checkpoint.
    """
    path = foreign.place_of(Path(path))
    if not (path.is_dir() or foreign.is_model(path)):
        problem = "is not a folder" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}: give the folder of a run, such as "
            f"checkpoints/gpt_baseline, or correct the path{_hub_hint(path)}"
        )
    run_dir, step = _parts(path)
    if step is not None:
        return run_dir, step
    step, damaged = _newest_good(run_dir)
    if step is None:
        remedy = _REMEDY if damaged else "give the folder of a trained run"
        raise UserError(f"{run_dir} {_lack(damaged)}: {remedy}")
    for reason in damaged:
        warn_once(f"{reason}: falling back to the one before, step {step}")
    return run_dir, step


def _hub_hint(path: Path) -> str:
    """Words for an error if a path may be a name on a hub, as in gpt2 or owner/gpt2."""
    is_owned = len(path.parts) == 2 and not path.parent.exists()
    if path.exists() or not (len(path.parts) == 1 or is_owned):
        return ""
    return (
        "; pcagpt reads folders and downloads no models: get one of Hugging Face's "
        f"with hf download {path} --local-dir {path.name}, and give "
        f"--config.model_path={path.name}"
    )


def lack(run_dir: Path, items: tuple[str, ...] = ("weights",)) -> str | None:
    """Why no checkpoint of a run has these items undamaged; None if one has."""
    step, damaged = _newest_good(run_dir, items)
    return _lack(damaged) if step is None else None


def _lack(damaged: list[str]) -> str:
    if damaged:
        return f"holds no checkpoint that can be read ({damaged[0]})"
    return "holds no finished checkpoint"


@digests.persistent
def _newest_good(
    run_dir: Path, items: tuple[str, ...] = ("weights",)
) -> tuple[int | None, list[str]]:
    """The newest step with these items undamaged, and the damage of those after it."""
    below, damaged = tuple(f"{name}/" for name in items), []
    for step in reversed(steps(run_dir)):
        folder = folder_of(run_dir, step)
        with digests.present(folder):
            reason = digests.damage(folder, below)
        if reason is None:
            return step, damaged
        damaged.append(reason)
    return None, damaged


def exists(path: str | Path) -> bool:
    """Whether `find` would find a checkpoint, damaged or not."""
    run_dir, step = _parts(Path(path))
    found = steps(run_dir)
    return bool(found) if step is None else step in found


def _parts(path: Path) -> tuple[Path, int | None]:
    """Run folder and step that a path names."""
    path = foreign.place_of(path)
    if foreign.is_model(path):
        return path, None
    if _NUMBER.fullmatch(path.name) and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    return path.parent if path.name == FOLDER else path, None


def read_saved_meta(run_dir: Path, step: int) -> dict[str, Any]:
    """The item 'meta' of a checkpoint: {'history', 'config'}.

    Raises UserError if it is missing or damaged.
    """
    folder = folder_of(run_dir, step)
    damage = digests.damage(folder, "meta/")
    meta = None
    if not damage:
        remedy = "name another step beside it"
        meta = read_json(folder / "meta/metadata", remedy, has_infinities=True)
    if meta is None:
        reason = damage or "it has no meta/metadata, so it was not trained here"
        raise UserError(f"checkpoint {folder} cannot be read: {reason}")
    return meta


def _move_damaged_metadata_aside(run_dir: Path) -> None:
    """Renames damaged metadata and metrics, on which Orbax fails.

    The metrics only tell which checkpoint is the best.
    """
    for step in steps(run_dir):
        folder = folder_of(run_dir, step)
        # Damaged digests do not tell whether the metrics are damaged, too.
        has_digests = digests.damage(folder, ()) is None
        for path in (folder / "_CHECKPOINT_METADATA", folder / "metrics"):
            file = path / "metrics" if path.name == "metrics" else path
            try:
                if (
                    has_digests
                    and file.exists()
                    and (damage := digests.damage(folder, path.name))
                ):
                    raise UserError(damage)
                read_json(file, "it is left out")
            except Unreadable:
                raise
            except UserError as error:
                _LOGGER.warning("%s", error)
                path.rename(path.with_name(f"{path.name}.damaged"))


@jax.jit
def _is_sane(items: dict) -> jax.Array:
    """Whether all values are finite, and those of weights no larger than LARGEST."""

    def limit(item: str, leaf: jax.Array) -> float:
        return LARGEST if item == "weights" else jnp.finfo(leaf.dtype).max

    return jnp.all(
        jnp.stack(
            [
                jnp.all(jnp.abs(leaf) <= limit(name, leaf))
                for name, item in items.items()
                for leaf in jax.tree.leaves(item)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ]
        )
    )


def save_weights(
    run_dir: Path, variables: dict, record: dict[str, Any] | None = None
) -> None:
    """Writes host arrays as checkpoint 0, the first in a folder; one process calls it.

    `record`: of the run; the checkpoint keeps a copy, as those of training do.
    FileExistsError if the folder has checkpoints.
    """
    folder = (run_dir / FOLDER).absolute()
    folder.mkdir(parents=True)  # Orbax does not if it is one of several processes.
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,  # Its threads wait for others that failed.
        multiprocessing_options=alone(),
    )
    items = {"weights": ocp.args.StandardSave(variables)}
    if record:
        items["meta"] = ocp.args.JsonSave(strict({"config": record}))
    try:
        with ocp.CheckpointManager(
            folder, options=options, item_names=tuple(items)
        ) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
    except BaseException:
        # Threads of Orbax still write.
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax.") and thread.is_alive():
                thread.join(_LONGEST_WAIT)
        raise
    digests.seal(folder / "0", (record or {}).get("run_id"))


@digests.persistent
def load_weights(path: str | Path) -> dict[str, dict]:
    """{'params', 'constants'} of RUN or RUN/ckpt/STEP: nested dicts of host arrays.

    RUN stands for its newest checkpoint that is not damaged.

    Raises UserError if the checkpoint is missing or damaged, or holds values that are
    not finite, or absurd.
    """
    run_dir, step = find(path)
    folder = folder_of(run_dir, step).absolute()
    try:
        with digests.present(folder):
            if damage := digests.damage(folder, "weights/"):
                raise UserError(damage)
            with digests.reading(folder):
                weights = read_weights(folder)
        for name, leaf in trees.flatten(weights).items():
            check_values(leaf, name)
        constants = weights.get("constants") or {}
        if not is_order(constants):
            raise UserError("position_of_token is no permutation of its positions")
    except (Unreadable, digests.Deleted):
        raise
    except UserError as error:
        if foreign.is_model(folder):
            raise UserError(f"{folder} cannot be read: {error}") from None
        raise UserError(
            f"checkpoint {folder} cannot be read ({error}): name another step beside "
            f"it, or {_REMEDY}"
        ) from None
    return {"params": weights["params"], "constants": constants}
