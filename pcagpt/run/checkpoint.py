"""Orbax checkpoints of a run: saved in the background, restored whole or weights only.

A checkpoint has three items: `weights` (params and constants), `optimizer` (its state
and the number of updates) and `meta` (JSON). Its name is the number of updates.
"""

import hashlib
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pcagpt.errors import UserError

FOLDER = "ckpt"
ITEMS = ("weights", "optimizer", "meta")
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
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda m: m["val_loss"]
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
        self._manager.save(
            step,
            args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def wait(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()

    def restore_latest(self, template: dict) -> tuple[dict, dict] | None:
        """The newest undamaged checkpoint, or None if the run has no checkpoint.

        If it finds one, it reports and deletes the newer ones, which are damaged.

        Args:
          template: items as for `save`, as `jax.ShapeDtypeStruct` with the shardings to
            restore onto.

        Returns:
          (items, meta).

        Raises:
          UserError: every checkpoint is damaged.
        """
        arrays = {n: ocp.args.StandardRestore(tree) for n, tree in template.items()}
        wanted = ocp.args.Composite(**arrays, meta=ocp.args.JsonRestore())
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=wanted)
            # Orbax and what it calls raise errors of many types.
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):  # It may be undamaged.
                    raise
                reason = str(error).strip().split("\n")[0][:120]
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
    if path.name.isdigit() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    run_dir = path.parent if path.name == FOLDER else path
    found = steps(run_dir)
    if not found:
        raise UserError(
            f"{run_dir} holds no finished checkpoint: give the folder of a trained run"
        )
    return run_dir, max(found)


def fingerprint(path: str | Path) -> str:
    """A hash that differs between runs and between steps of a run.

    It covers the result of a finished run. For other runs, it covers the config and the
    manifest of the weights, because the same config can get new weights. `path` and
    errors are as for `find`.
    """
    run_dir, step = find(path)
    digest = hashlib.sha256(f"step {step}\n".encode())
    # The manifest differs between saves, because it lists files with new names.
    written = f"{FOLDER}/{step}/weights/manifest.ocdbt"
    finished = (run_dir / "result.json").exists()
    for name in ("result.json",) if finished else ("config.json", written):
        if (run_dir / name).exists():
            digest.update((run_dir / name).read_bytes())
    return digest.hexdigest()


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
    """Replaces all checkpoints by checkpoint 0 with host arrays.

    Only one process may call it.
    """
    folder = (run_dir / FOLDER).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)  # With these options, Orbax does not make it.
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


def load_weights(path: str | Path) -> tuple[dict, dict, int]:
    """(params, constants, step) of RUN or RUN/ckpt/STEP: nested dicts of host arrays.

    Raises UserError if the checkpoint is missing or damaged.
    """
    run_dir, step = find(path)
    folder = (run_dir / FOLDER / str(step)).absolute()
    try:
        with _local_checkpointer() as checkpointer:
            saved = checkpointer.metadata(folder / "weights").item_metadata
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.tree
            )
            weights = checkpointer.restore(
                folder / "weights",
                args=ocp.args.PyTreeRestore(restore_args=as_numpy),
            )
    except (ValueError, OSError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason}): name another step beside "
            "it, or train the run again with --config.overwrite=True"
        ) from None
    return weights["params"], weights.get("constants") or {}, step
