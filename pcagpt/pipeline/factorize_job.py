"""The factorization of a run's table, or of a bare table, as a job."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt import factorize
from pcagpt.compress.effort import GPU, decide_effort
from pcagpt.compress.subject import Subject
from pcagpt.config import Settings
from pcagpt.errors import UserError
from pcagpt.factorize import METHODS, Factorizer, Statistics, files
from pcagpt.files import sha256_of_file
from pcagpt.pipeline.train_job import DONE, TO_DO
from pcagpt.report import spectrum_figure
from pcagpt.run import calibrate, checkpoint
from pcagpt.run.opened import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Telemetry


@dataclasses.dataclass(frozen=True)
class FactorizeJob:
    """A factorization with its source and the folder of its files.

    source: a run, one of its checkpoints, or a .npy table [V, D]; settings: `ranks` and
    `factorize` say what to make, `compress` and `train.batch_size` how to calibrate;
    is_target: the person asked for it by name, it is not a prerequisite.
    """

    source: Path
    folder: Path
    settings: Settings
    is_target: bool

    @property
    def label(self) -> str:
        """The folder's name, aligned with the names of runs."""
        return f"  {self.folder.name}"

    @property
    def amount(self) -> str:
        """As in 'rank 64, 128'."""
        ranks = f"rank {', '.join(map(str, self.settings.ranks))}"
        bands = self.settings.factorize.bands
        return ranks if bands == 1 else f"{ranks} in {bands} bands"

    @property
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""
        return {self.source}

    def status(self) -> str:
        """'done' or 'to do'.

        Raises:
          UserError: the folder holds the files of another source or method.
        """
        if not self.has_source():
            return TO_DO
        differing = self.differing()
        if differing and self.settings.overwrite:
            return TO_DO
        if differing:
            raise UserError(
                f"{self.folder} holds another factorization ({', '.join(differing)} "
                "differ): use another --config.workdir, or --config.overwrite=True"
            )
        metadata = files.read_metadata(self.folder) or {"ranks": {}}
        is_banded = self.settings.factorize.bands > 1
        is_complete = all(
            str(rank) in metadata["ranks"]
            and files.exists(self.folder, rank, is_banded)
            for rank in self.settings.ranks
        )
        return DONE if is_complete else TO_DO

    def has_source(self) -> bool:
        """The table or the checkpoint exists."""
        if self.is_bare_table:
            return self.source.exists()
        try:
            checkpoint.find(self.source)
        except UserError:
            return False
        return True

    @property
    def is_bare_table(self) -> bool:
        """The source is a .npy file and not a run."""
        return self.source.suffix == ".npy"

    def differing(self) -> list[str]:
        """Parts of `identity` in which the files in the folder differ."""
        metadata = files.read_metadata(self.folder)
        if metadata is None:
            return []
        metadata = {"bands": 1} | metadata  # Older files do not say.
        identity = self.identity()
        # Files from before the number was automatic were calibrated on the GPU's.
        if (
            not self.settings.compress.calibration_tokens
            and metadata.get("calibration_tokens") == GPU.calibration_tokens
        ):
            identity["calibration_tokens"] = GPU.calibration_tokens
        return [k for k, v in identity.items() if metadata.get(k) != v]

    def identity(self) -> dict[str, Any]:
        """What the files depend on besides the ranks."""
        chosen, path = self.settings.factorize, self._statistics_path
        source = self.source
        found = {
            "method": chosen.method,
            "bands": chosen.bands,
            "singular_value_split": chosen.singular_value_split,
            "source_sha256": (
                sha256_of_file(source)
                if self.is_bare_table
                else checkpoint.fingerprint(source)
            ),
        }
        if path and path.exists():
            found["statistics_sha256"] = sha256_of_file(path)
        elif self._calibrates:
            found["calibration_tokens"] = self._decided.compress.calibration_tokens
            found["calibration_batch_size"] = self.settings.train.batch_size
        return found

    def check(self, to_be_made: set[Path]) -> None:
        """Raises UserError if the source is missing and no earlier job makes it."""
        if self.source not in to_be_made:
            self._open()

    def run(self) -> None:
        """Writes the files on the first process; every process calibrates."""
        opened, table_VD, statistics = self._open()
        if self._calibrates:
            statistics = Subject.of(opened, self._decided).statistics
        if jax.process_index() == 0:
            print(f"factorizing {self.source}, {self.amount}", flush=True)
            if self.settings.overwrite and self.differing():
                shutil.rmtree(self.folder)
            self._write(opened, table_VD, statistics)
        placement.wait_for_all(str(self.folder))

    def _open(self) -> tuple[Run | None, np.ndarray, Statistics | None]:
        """The run, its table [V, D], and statistics that come from a file.

        Raises:
          UserError: no table there, it is factorized already, a rank is too high, or
            the statistics are missing or those of another table.
        """
        run = None if self.is_bare_table else Run.open(self.source)
        table_VD = run.table() if run else files.read_table(self.source)
        for rank in self.settings.ranks:
            if rank > min(table_VD.shape):
                raise UserError(
                    f"ranks holds {rank}: the table of {self.source} is "
                    f"{table_VD.shape}, its rank is at most {min(table_VD.shape)}"
                )
        statistics, path = None, self._statistics_path
        if path:
            statistics = calibrate.read(path)
            if statistics is None:
                raise UserError(
                    f"factorize.method is '{self.settings.factorize.method}', which "
                    f"needs statistics, and {path} holds none: name their file as "
                    "--config.factorize.statistics"
                )
            if len(statistics.probability) != len(table_VD):
                raise UserError(
                    f"{path} has statistics of {len(statistics.probability)} tokens, "
                    f"the table of {self.source} has {len(table_VD)}: give it its own"
                )
        return run, table_VD, statistics

    def _write(
        self, run: Run | None, table_VD: np.ndarray, statistics: Statistics | None
    ) -> None:
        """Writes the files of all ranks, those that are there already, too."""
        chosen, shape = self.settings.factorize, table_VD.shape
        make = Factorizer(
            table_VD, chosen.method, statistics, chosen.singular_value_split
        )
        earlier = files.read_metadata(self.folder) or {"ranks": {}}
        ranks = sorted({*self.settings.ranks, *map(int, earlier["ranks"])})
        tables = {}
        for rank in ranks:
            budget = factorize.budget_of_rank(*shape, rank)
            try:
                tables[rank] = make(budget, chosen.bands)
            except ValueError:
                raise UserError(
                    f"rank {rank} of {len(table_VD):,} tokens is too small for "
                    f"{chosen.bands} bands: raise the rank or lower factorize.bands"
                ) from None
        singular_values = make.factors.singular_values
        energy = factorize.energy_kept(singular_values)

        def describe(rank: int) -> dict[str, Any]:
            table, kept = tables[rank], energy[rank - 1]
            if chosen.bands == 1:
                return {"energy_kept": kept, "relative_error": max(0, 1 - kept) ** 0.5}
            return {
                "parameters": table.parameters,
                "band_sizes": table.sizes,
                "band_ranks": table.ranks,
            }

        metadata = {
            **self.identity(),
            "source": str(self.source),
            **({"step": run.step} if run else {}),
            "vocab_size": len(table_VD),
            "n_embd": table_VD.shape[1],
            "effective_rank": factorize.effective_rank(singular_values),
            "ranks": {str(rank): describe(rank) for rank in ranks},
        }
        files.write(self.folder, tables, singular_values, metadata, chosen.bands > 1)
        with Telemetry(
            self.folder,
            tensorboard=self.settings.telemetry.tensorboard,
        ) as telemetry:
            figure = spectrum_figure(singular_values, ranks)
            telemetry.figure("spectrum", figure)

    @property
    def _decided(self) -> Settings:
        """The settings with the number of calibration tokens for this device."""
        return decide_effort(self.settings, jax.default_backend())

    @property
    def _needs_statistics(self) -> bool:
        return METHODS[self.settings.factorize.method].needs_statistics

    @property
    def _calibrates(self) -> bool:
        """Statistics are measured on the run."""
        return self._needs_statistics and self._statistics_path is None

    @property
    def _statistics_path(self) -> Path | None:
        """The file of the statistics, if they are not measured here."""
        if not self._needs_statistics:
            return None
        if self.settings.factorize.statistics:
            return Path(self.settings.factorize.statistics)
        return (
            self.source.with_suffix(".statistics.npz") if self.is_bare_table else None
        )
