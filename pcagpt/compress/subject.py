"""A trained model whose token table is compressed: opened, calibrated, written anew.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import trees
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches, TrainingBatches
from pcagpt.data.corpus import Corpus
from pcagpt.factorize import FactorizedTable, Statistics
from pcagpt.factorize import files as factor_files
from pcagpt.model import GPT
from pcagpt.run import calibrate as statistics
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.run import initialise as warm_start
from pcagpt.run.opened import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress

CALIBRATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run with a full table, its corpus, and its model on the devices of a mesh.

    table_VD: [V, D] float32, padding rows left out; variables: placed on the mesh;
    host_params: the same parameters as host arrays.
    """

    run: Run
    settings: Settings
    corpus: Corpus
    model: GPT
    mesh: Any
    variables: dict
    table_VD: np.ndarray

    @classmethod
    def of(cls, run: Run, settings: Settings) -> "Subject":
        """The run on its own corpus, unless `settings.data` names another.

        Raises:
          UserError: its table is factorized already, or the corpus or the devices do
            not fit it.
        """
        table_VD = run.table()
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        for path, size in (
            ("train.batch_size", settings.train.batch_size),
            ("evaluate.batch_size", settings.evaluate.batch_size),
        ):
            placement.check_divisible(path, size, mesh)
        corpus = run.corpus(settings.data, settings.cache_dir)
        model = GPT(run.config(settings.model))
        host = run.variables(model.config)
        variables = jax.device_put(host, placement.shardings(host, mesh))
        return cls(run, settings, corpus, model, mesh, variables, table_VD)

    def validation(self, batch_size: int) -> EvaluationBatches:
        """The whole validation split."""
        block_size = self.model.config.block_size
        return EvaluationBatches(self.corpus.tokens("val"), block_size, batch_size)

    def statistics(self) -> Statistics:
        """Measured on training text, or read from beside the run if there already."""
        tokens = self.settings.compress.calibration_tokens
        batch_size = self.settings.train.batch_size
        block_size = self.model.config.block_size
        train = self.corpus.tokens("train")
        batches = TrainingBatches(train, block_size, batch_size, CALIBRATION_SEED)
        steps = -(-tokens // (batch_size * block_size))
        protocol = {
            "checkpoint": self.run.fingerprint,
            "corpus": self.corpus.fingerprint(),
            "split": "train",
            "tokens": steps * batch_size * block_size,
            "window": block_size,
            "batch_size": batch_size,
            "seed": CALIBRATION_SEED,
            "compute_dtype": self.model.config.compute_dtype,
        }
        path = statistics.beside(self.run.folder, self.run.step, protocol)
        known = statistics.read(path, protocol)
        if known is not None:
            return known
        windows = (batches.batch_at(step)[:, :-1] for step in range(steps))
        with Progress(f"calibrating on {self.corpus.name}", steps) as progress:
            found = statistics.collect(
                self.model,
                self.variables,
                statistics.token_frequency(train, len(self.table_VD)),
                progress.track(windows),
                self.mesh,
                self.settings.train.loss_chunks,
            )
        if jax.process_index() == 0:
            statistics.write(path, found, protocol)
        return found

    def write(
        self, folder: Path, table: FactorizedTable, origin: dict[str, Any]
    ) -> None:
        """The model with another table: config.json, ckpt/0 and the factors' files.

        All commands take it as they take a run. If the same is there already it is left
        alone: a run may have gone on from it.

        Args:
          folder: made if missing; what is in it is replaced.
          table: in place of the model's own.
          origin: JSON values, how the table was made; in config.json as 'compressed'.
        """
        record = self.run.record
        source = {"run": str(self.run.folder), "step": self.run.step}
        made = {**source, "fingerprint": self.run.fingerprint, **origin}
        made["table_sha256"] = _sha256(table)
        there = (run_folder.read_record(folder) or {}).get("compressed") or {}
        if {**there, "run": made["run"]} == made:  # Runs may be moved.
            return
        (folder / "config.json").unlink(missing_ok=True)  # Written last again.
        checkpoint.save_weights(folder, compressed_variables(self, table))
        factor_files.write_bands(folder / "factors", table)
        is_banded = len(table.bands) > 1
        model = {
            "n_embd_wte": None if is_banded else table.ranks[0] or None,
            "n_embd_wte_scale_tying": True,
            "band_sizes": table.sizes if is_banded else (),
            "band_ranks": table.ranks if is_banded else (),
        }
        model = {**record["model"], **model}
        run_folder.write_record(folder, {**record, "model": model, "compressed": made})


def _sha256(table: FactorizedTable) -> str:
    """Of every number of a table: what it is made from may change unseen."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def compressed_variables(subject: Subject, table: FactorizedTable) -> dict:
    """{'params', 'constants'} of the subject's model with another table."""
    params = dict(subject.run.variables(subject.model.config)["params"])
    padding = subject.model.config.padded_vocab_size - len(table.order)
    leaves = warm_start.band_parameters(table, padding)
    params["embed"] = trees.unflatten(leaves)["embed"]
    if table.mean is not None:
        params["wpe"] = (params["wpe"] + table.mean).astype(np.float32)
    constants = (
        warm_start.position_constants(table.order) if len(table.bands) > 1 else {}
    )
    return {"params": params, "constants": constants}
