"""From a trained run (or a bare table) to the files of its factorization."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt import factorize
from pcagpt.compress.subject import Subject
from pcagpt.errors import UserError
from pcagpt.factorize import files as factor_files
from pcagpt.report.plots import spectrum_figure
from pcagpt.run import calibrate as statistics
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.run.folder import DONE, TO_DO
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Telemetry


@dataclasses.dataclass(frozen=True)
class FactorizeJob:
    """What to factorize, how, and where the files go.

    source: a run, a checkpoint of one, or a .npy table [V, d]; folder: of the files;
    config: with the sections `factorize`, `compress` (how much to calibrate on where
    statistics are lacking), `telemetry`, and `data` and `mesh` to calibrate on;
    is_target: asked for by name, not a prerequisite.
    """

    source: Path
    folder: Path
    ranks: tuple[int, ...]
    config: ConfigDict
    is_target: bool = True

    @property
    def method(self) -> str:
        """A name in `factorize.METHODS`."""
        return self.config.factorize.method

    @property
    def bands(self) -> int:
        """Frequency bands to start from; 1 for one rank for all tokens."""
        return self.config.factorize.bands

    @property
    def label(self) -> str:
        """The folder's name, in line with the letters of the runs."""
        return f"  {self.folder.name}"

    @property
    def amount(self) -> str:
        """As in 'rank 64, 128'."""
        ranks = f"rank {', '.join(map(str, self.ranks))}"
        return ranks if self.bands == 1 else f"{ranks} in {self.bands} bands"

    @property
    def sources(self) -> set[Path]:
        """Folders of other jobs that this one reads."""
        return {self.source}

    def status(self) -> str:
        """'done' or 'to do'.

        Raises:
          UserError: the folder holds the files of another source or method.
        """
        if not self.has_source() or (self.config.overwrite and self.differing()):
            return TO_DO
        return TO_DO if self.missing_ranks() else DONE

    def has_source(self) -> bool:
        """Whether the table or the checkpoint is there."""
        if self.source.suffix == ".npy":
            return self.source.exists()
        try:
            checkpoint.find(self.source)
        except UserError:
            return False
        return True

    def check(self, to_be_made: set[Path]) -> None:
        """Raises UserError if the source is not there and no earlier job makes it."""
        if self.source in to_be_made:
            return
        self._read_table()
        if self._statistics_path():
            self._read_statistics()

    def source_sha256(self) -> str:
        """Hash of the table file, or what tells the checkpoint from others."""
        if self.source.suffix != ".npy":
            return checkpoint.fingerprint(self.source)
        try:
            with open(self.source, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.source}: {error.strerror}") from None

    def identity(self) -> dict:
        """What the files depend on besides the ranks."""
        identity = {
            "method": self.method,
            "bands": self.bands,
            "singular_value_split": self.config.factorize.singular_value_split,
            "source_sha256": self.source_sha256(),
        }
        path = self._statistics_path()
        if path and path.exists():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            identity["statistics_sha256"] = digest.hexdigest()
        elif self._calibrates():
            identity["calibration_tokens"] = self.config.compress.calibration_tokens
            identity["calibration_batch_size"] = self.config.train.batch_size
        return identity

    def differing(self) -> list[str]:
        """In which parts of `identity` the files in the folder differ from this job."""
        metadata = factor_files.read_metadata(self.folder)
        if metadata is None:
            return []
        metadata = {"bands": 1} | metadata  # Older ones do not say.
        return [k for k, v in self.identity().items() if metadata.get(k) != v]

    def missing_ranks(self) -> tuple[int, ...]:
        """The ranks whose files are not there yet.

        Raises:
          UserError: the folder holds the files of another source or method, or there
            is no such source.
        """
        metadata = factor_files.read_metadata(self.folder)
        if metadata is None:
            return self.ranks
        differing = self.differing()
        if differing:
            raise UserError(
                f"{self.folder} holds another factorization ({', '.join(differing)} "
                "differ): use another --config.workdir, or --config.overwrite=True"
            )
        return tuple(
            rank
            for rank in self.ranks
            if str(rank) not in metadata["ranks"]
            or not factor_files.exists(self.folder, rank, self.bands > 1)
        )

    def run(self) -> None:
        """Writes the files on the first process; the others wait.

        Statistics that the method needs are measured by all of them.
        """
        known = self.statistics()
        if jax.process_index() == 0:
            print(f"factorizing {self.source}, {self.amount}", flush=True)
            if self.config.overwrite and self.differing():
                shutil.rmtree(self.folder)
            self.write(known)
        placement.wait_for_all(str(self.folder))

    def write(self, found: factorize.Statistics | None = None) -> dict:
        """Writes the files of all ranks, those there already too; returns the metadata.

        Args:
          found: `statistics()`, if that was called already.

        Raises:
          UserError: no table there, it is factorized already, a rank is too high, or
            the folder holds the files of another source or method.
        """
        self.missing_ranks()
        found = self.statistics() if found is None else found
        table_VD, origin = self._read_table()
        width = table_VD.shape[1]
        for rank in self.ranks:
            if rank > min(table_VD.shape):
                raise UserError(
                    f"ranks holds {rank}: the table of {self.source} is "
                    f"{table_VD.shape}, its rank is at most {min(table_VD.shape)}"
                )
        earlier = factor_files.read_metadata(self.folder)
        ranks = sorted({*self.ranks, *map(int, earlier["ranks"] if earlier else ())})
        if found and found.probability.shape != table_VD.shape[:1]:
            raise UserError(
                f"{self._statistics_path()} is of {len(found.probability)} tokens, the "
                f"table of {self.source} has {len(table_VD)}: give it its own"
            )
        factors = factorize.by_method(table_VD, self.method, found)
        tables = {rank: self._table(table_VD, factors, found, rank) for rank in ranks}
        energy = factorize.energy_kept(factors.singular_values)
        metadata = {
            **self.identity(),
            "source": str(self.source),
            **origin,
            "vocab_size": table_VD.shape[0],
            "n_embd": width,
            "effective_rank": factorize.effective_rank(factors.singular_values),
            "ranks": {
                str(rank): {
                    "energy_kept": energy[rank - 1],
                    "relative_error": max(0.0, 1 - energy[rank - 1]) ** 0.5,
                }
                if self.bands == 1
                else {
                    "parameters": tables[rank].parameters,
                    "band_sizes": tables[rank].sizes,
                    "band_ranks": tables[rank].ranks,
                }
                for rank in ranks
            },
        }
        factor_files.write(
            self.folder, tables, factors.singular_values, metadata, self.bands > 1
        )
        with Telemetry(
            self.folder,
            config={},
            run_name=self.folder.name,
            tensorboard=self.config.telemetry.tensorboard,
        ) as telemetry:
            figure = spectrum_figure(factors.singular_values, ranks)
            telemetry.figure("spectrum", figure)
        return metadata

    def _table(
        self,
        table_VD: np.ndarray,
        factors: factorize.Factors,
        known: factorize.Statistics | None,
        rank: int,
    ) -> factorize.FactorizedTable:
        """The table of a rank, or of its size in bands."""
        split = self.config.factorize.singular_value_split
        if self.bands == 1:
            return factorize.table_of_rank(factors, rank, split)
        weighting = factorize.METHODS[self.method](table_VD, known)
        budget = factorize.budget_of_rank(*table_VD.shape, rank)
        try:
            return factorize.banded(table_VD, weighting, self.bands, budget, split)
        except ValueError:
            raise UserError(
                f"rank {rank} of {len(table_VD):,} tokens is too small for "
                f"{self.bands} bands: raise the rank or lower factorize.bands"
            ) from None

    def statistics(self) -> factorize.Statistics | None:
        """What the method needs to know of the model; None if nothing.

        Of a run measured, unless that was done before under the same protocol.

        Raises:
          UserError: a file was named, or a bare table given, and holds none.
        """
        if not self._calibrates():
            return self._read_statistics() if self._statistics_path() else None
        config = self.config.copy_and_resolve_references()
        config.model_path, config.model = str(self.source), knobs.base().model
        config.model.compute_dtype = self.config.model.compute_dtype
        return Subject.open(config).statistics(
            config.compress.calibration_tokens,
            config.train.batch_size,
            config.train.loss_chunks,
        )

    def _calibrates(self) -> bool:
        """Whether statistics are measured on the run."""
        needed = factorize.needs_statistics(self.method)
        return needed and self._statistics_path() is None

    def _statistics_path(self) -> Path | None:
        """The file of the statistics, if they are not measured but given."""
        if not factorize.needs_statistics(self.method):
            return None
        if self.config.factorize.statistics:
            return Path(self.config.factorize.statistics)
        is_table = self.source.suffix == ".npy"
        return self.source.with_suffix(".statistics.npz") if is_table else None

    def _read_statistics(self) -> factorize.Statistics:
        """Those of the file."""
        path = self._statistics_path()
        found = statistics.read(path)
        if found is None:
            raise UserError(
                f"factorize.method is '{self.method}', which needs statistics, and "
                f"{path} holds none: name their file as --config.factorize.statistics"
            )
        return found

    def _read_table(self) -> tuple[np.ndarray, dict]:
        """The table without padding rows, and where it comes from."""
        if self.source.suffix == ".npy":
            return factor_files.read_table(self.source), {}
        params, _, step = checkpoint.load_weights(self.source)
        embed = params["embed"]
        if len(embed) > 1 or "scale_up" in embed["band_0"]:
            raise UserError(
                f"{self.source} has a factorized embedding already: factorize a "
                "baseline, such as checkpoints/gpt_baseline"
            )
        run_dir, _ = checkpoint.find(self.source)
        config = run_folder.read_config(run_dir)
        if config is None:
            raise UserError(f"{run_dir} has no config.json: it is not a run's folder")
        return embed["band_0"]["wte"][: config["vocab_size"]], {"step": step}
