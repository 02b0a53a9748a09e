"""A trained model whose token table is compressed: opened, calibrated, written anew.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pcagpt import trees
from pcagpt.data.batches import EvaluationBatches, TrainingBatches
from pcagpt.data.corpus import Corpus, fingerprint, open_corpus
from pcagpt.errors import UserError
from pcagpt.factorize import FactorizedTable, Statistics
from pcagpt.factorize import files as factor_files
from pcagpt.model import GPT
from pcagpt.run import calibrate as statistics
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.run import initialise as warm_start
from pcagpt.run.opened import DEVICE_CHOICES, TrainedRun
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Progress

CALIBRATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run with a full table, its corpus, and its model on the devices of a mesh.

    table_VD: [V, D] float32, padding rows left out; variables: placed on the mesh;
    host_params: the same parameters as host arrays.
    """

    run: TrainedRun
    corpus: Corpus
    model: GPT
    mesh: Any
    variables: dict
    host_params: dict
    table_VD: np.ndarray

    @classmethod
    def open(cls, config: ConfigDict) -> "Subject":
        """The run of `config.model_path`, on its own corpus unless another is named.

        Raises:
          UserError: no such run, its table is factorized already, or the corpus, the
            `model` knobs or the devices do not fit it.
        """
        run = TrainedRun.find(config.model_path)
        run.check_model(config.model, DEVICE_CHOICES)
        model = GPT(run.config(config.model, placement.hardware()))
        if len(model.config.bands) > 1 or model.config.bands[0].rank:
            raise UserError(
                f"{run.run_dir} has a factorized embedding already: compress a "
                "baseline, such as checkpoints/gpt_baseline"
            )
        mesh = placement.make_mesh(config.mesh.data, config.mesh.fsdp)
        for path, size in (
            ("train.batch_size", config.train.batch_size),
            ("evaluate.batch_size", config.evaluate.batch_size),
        ):
            placement.check_divisible(path, size, mesh)
        data = config.data if config.data.source else ConfigDict(run.record["data"])
        cache = Path(config.data.cache_dir or Path(config.workdir) / "data")
        corpus = open_corpus(data.source, cache, data.tokenizer)
        run.check_corpus(corpus)
        host = run.variables(model.config)
        variables = jax.device_put(host, placement.shardings(host, mesh))
        wte_VD = np.asarray(host["params"]["embed"]["band_0"]["wte"], np.float32)
        table_VD = wte_VD[: model.config.vocab_size]
        return cls(run, corpus, model, mesh, variables, host["params"], table_VD)

    @property
    def fingerprint(self) -> str:
        """What tells its checkpoint from others."""
        folder = self.run.run_dir / checkpoint.FOLDER
        return checkpoint.fingerprint(folder / str(self.run.step))

    def validation(self, batch_size: int) -> EvaluationBatches:
        """The whole validation split."""
        block_size = self.model.config.block_size
        return EvaluationBatches(self.corpus.tokens("val"), block_size, batch_size)

    def statistics(self, tokens: int, batch_size: int, chunks: int) -> Statistics:
        """Measured on training text, or read from beside the run if there already.

        Args:
          tokens: to calibrate on, rounded up to whole batches.
          batch_size: windows at a time.
          chunks: parts the logits are computed in.
        """
        block_size = self.model.config.block_size
        train = self.corpus.tokens("train")
        batches = TrainingBatches(train, block_size, batch_size, CALIBRATION_SEED)
        steps = -(-tokens // (batch_size * block_size))
        protocol = {
            "checkpoint": self.fingerprint,
            "corpus": fingerprint(self.corpus),
            "split": "train",
            "tokens": steps * batch_size * block_size,
            "window": block_size,
            "batch_size": batch_size,
            "seed": CALIBRATION_SEED,
            "compute_dtype": self.model.config.compute_dtype,
        }
        path = statistics.beside(self.run.run_dir, self.run.step, protocol)
        known = statistics.read(path, protocol)
        if known is not None:
            return known
        with Progress(f"calibrating on {self.corpus.name}", steps) as progress:

            def shown() -> Iterator[np.ndarray]:
                for step in range(steps):
                    progress.update(step)
                    yield batches.batch_at(step)[:, :-1]
                progress.update(steps)

            found = statistics.collect(
                self.model,
                self.variables,
                statistics.token_frequency(train, len(self.table_VD)),
                shown(),
                self.mesh,
                chunks,
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
        source = {"run": str(self.run.run_dir), "step": self.run.step}
        made = {**source, "fingerprint": self.fingerprint, **origin}
        made["table_sha256"] = _sha256(table)
        there = (run_folder.read_config(folder) or {}).get("compressed") or {}
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
        run_folder.write_config(folder, {**record, "model": model, "compressed": made})


def _sha256(table: FactorizedTable) -> str:
    """Of every number of a table: what it is made from may change unseen."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def compressed_variables(subject: Subject, table: FactorizedTable) -> dict:
    """{'params', 'constants'} of the subject's model with another table."""
    params = dict(subject.host_params)
    padding = subject.model.config.padded_vocab_size - len(table.order)
    leaves = warm_start.band_parameters(table, padding)
    params["embed"] = trees.unflatten(leaves)["embed"]
    if table.mean is not None:
        params["wpe"] = (params["wpe"] + table.mean).astype(np.float32)
    constants = warm_start.positions(table.order) if len(table.bands) > 1 else {}
    return {"params": params, "constants": constants}
