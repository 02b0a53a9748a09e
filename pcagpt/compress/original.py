"""A trained model with a table to compress, and the compressed models made of it.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import trees
from pcagpt.compress.candidates import Candidate, Compressor
from pcagpt.compress.score import SwapScores, TableSwap, frequency_deciles
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import Corpus
from pcagpt.factorize import FactorizedTable, Statistics
from pcagpt.factorize.factor_files import write_bands
from pcagpt.model import GPT
from pcagpt.run import calibrate, checkpoint, initialise
from pcagpt.run.folder import read_record, write_record
from pcagpt.run.trained import Run
from pcagpt.sharding import placement


@dataclasses.dataclass(frozen=True)
class Original:
    """A run with a full table, on the devices of a mesh.

    table_VD: [V, D] float32 without padding rows; variables: placed on the mesh.
    """

    run: Run
    settings: Settings
    corpus: Corpus
    model: GPT
    mesh: Any
    variables: dict
    table_VD: np.ndarray

    @classmethod
    def of(cls, run: Run, settings: Settings) -> "Original":
        """The run with its own corpus, or with the one in `settings.data`.

        Raises UserError if the table is factorized already, or the corpus or the
        devices do not fit.
        """
        table_VD = run.table()
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        for section in ("train", "evaluate"):
            size = getattr(settings, section).batch_size
            placement.check_divisible(f"{section}.batch_size", size, mesh)
        corpus = run.corpus(settings.data, settings.cache_dir)
        model = GPT(run.config(settings.model))
        host = run.variables(model.config)
        variables = jax.device_put(host, placement.shardings(host, mesh))
        return cls(run, settings, corpus, model, mesh, variables, table_VD)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics on calibration text; see `calibrate.statistics`."""
        return calibrate.statistics(
            self.run, self.settings, self.corpus, self.model, self.variables, self.mesh
        )

    @functools.cached_property
    def compressor(self) -> Compressor:
        """Makes candidates of this table."""
        split = self.settings.factorize.singular_value_split
        return Compressor(self.table_VD, self.statistics, split)

    @functools.cached_property
    def batches(self) -> EvaluationBatches:
        """The validation split, or its first `evaluate.max_tokens` targets."""
        return EvaluationBatches(
            self.corpus.tokens("val"),
            self.model.config.block_size,
            self.settings.evaluate.batch_size,
            self.settings.evaluate.max_tokens,
        )

    def measure(self, candidate: Candidate) -> SwapScores:
        """Scores a candidate in place of the model's table."""
        return self._swap(candidate.dense, self.batches)

    @functools.cached_property
    def _swap(self) -> TableSwap:
        deciles = frequency_deciles(self.statistics.frequency)
        chunks = self.settings.train.loss_chunks
        return TableSwap(self.model, self.variables, deciles, self.mesh, chunks)

    def write(
        self, folder: Path, table: FactorizedTable, origin: dict[str, Any]
    ) -> None:
        """Writes the model with another table: config.json, ckpt/0 and factors/.

        Every command takes the folder as a run. A folder that holds this model already
        is left alone, because other runs may have started from it. `origin` tells how
        the table was made: JSON values for 'compressed' in config.json.
        """
        record = self.run.record
        made = {
            "run": str(self.run.folder),
            "step": self.run.step,
            "fingerprint": self.run.fingerprint,
            **origin,
            "table_sha256": _sha256(table),
        }
        earlier = (read_record(folder) or {}).get("compressed") or {}
        if {**earlier, "run": made["run"]} == made:  # A run may have been moved.
            return
        (folder / "config.json").unlink(missing_ok=True)  # Written last.
        checkpoint.save_weights(folder, self._variables_with(table))
        write_bands(folder / "factors", table)
        is_banded = len(table.bands) > 1
        model = {
            "n_embd_wte": None if is_banded else table.ranks[0] or None,
            "n_embd_wte_scale_tying": True,
            "band_sizes": table.sizes if is_banded else (),
            "band_ranks": table.ranks if is_banded else (),
        }
        model = {**record["model"], **model}
        write_record(folder, {**record, "model": model, "compressed": made})

    def _variables_with(self, table: FactorizedTable) -> dict:
        """{'params', 'constants'} of the model with another table."""
        config = self.model.config
        params, constants = dict(self.run.variables(config)["params"]), {}
        padding = config.padded_vocab_size - len(table.order)
        leaves = initialise.band_parameters(table, padding)
        params["embed"] = trees.unflatten(leaves)["embed"]
        if table.mean is not None:
            params["wpe"] = (params["wpe"] + table.mean).astype(np.float32)
        if len(table.bands) > 1:
            constants = initialise.position_constants(table.order)
        return {"params": params, "constants": constants}


def _sha256(table: FactorizedTable) -> str:
    """Hash of all values of a table, because the same recipe can give another table."""
    digest = hashlib.sha256(table.order.tobytes())
    for leaf in jax.tree.leaves((table.bands, table.mean)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
