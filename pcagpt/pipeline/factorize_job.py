"""A job that factorizes the table of a run or of a .npy file."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcagpt import factorization
from pcagpt.compression.original import check_is_original
from pcagpt.compression.sides import seen_by
from pcagpt.config import Settings, effort
from pcagpt.config.command_line import next_command
from pcagpt.data.corpus import describe_corpus, open_corpus
from pcagpt.errors import UserError, warn_once
from pcagpt.factorization import (
    FactorizedTable,
    Factorizer,
    Statistics,
    factor_files,
)
from pcagpt.file_hashes import sha256_of_file
from pcagpt.files import remove_leftovers
from pcagpt.methods import METHODS
from pcagpt.pipeline.differences import differences
from pcagpt.pipeline.job import DONE, TO_DO, Job, Status
from pcagpt.pipeline.token_rows import BEFORE, show_rows
from pcagpt.report import spectrum_figure
from pcagpt.run import calibrate, checkpoint, fingerprint, lock
from pcagpt.run.folder import (
    check_is_folder,
    look,
    make_room,
    move_aside,
    watching,
)
from pcagpt.run.origin import origin_of
from pcagpt.run.trained import Run
from pcagpt.sharding import placement, processes
from pcagpt.telemetry.boards import Boards


class Work(NamedTuple):
    """What is left to do.

    ranks: those whose files are written; described: {rank: description} of the files
    that stay; is_replaced: the folder is moved aside.
    """

    ranks: tuple[int, ...]
    described: dict[str, Any]
    is_replaced: bool = False


@dataclasses.dataclass(frozen=True)
class FactorizeJob(Job):
    """A factorization.

    source: a run, one of its checkpoints, or a .npy table [V, D]; settings: `ranks` and
    `factorize` define the factorization, `compress`, `data` and `train.batch_size` the
    calibration.
    """

    source: Path

    @property
    def label(self) -> str:
        """The folder's name, aligned with the names of runs."""
        return f"  {self.folder.name}"

    @property
    def amount(self) -> str:
        """The ranks, as in 'rank 64, 128'."""
        ranks = f"rank {', '.join(map(str, self.settings.ranks))}"
        bands = self.settings.factorize.bands
        return ranks if bands == 1 else f"{ranks} in {bands} bands"

    @property
    def sources(self) -> set[Path]:
        """Paths of other jobs' results that this job reads."""
        return {self.source}

    def status(self) -> Status:
        """'done' or 'to do'; UserError for the files of another source or method."""
        return DONE if self._find_work() is None else TO_DO

    def _find_work(self) -> Work | None:
        """What is left to do, or None; raises the same as `status`."""
        check_is_folder(self.folder)
        metadata = factor_files.read_metadata(self.folder)
        described = metadata["ranks"] if metadata else {}
        in_bands = self.settings.factorize.bands > 1
        lacking = tuple(
            rank
            for rank in self.settings.ranks
            if str(rank) not in described
            or not factor_files.exists(self.folder, rank, in_bands)
        )
        conflict = None
        if differing := self._differing(metadata, adds=bool(lacking and described)):
            conflict = self._other_files(differing)
        elif others := factor_files.not_ours(self.folder, metadata, lacking):
            conflict = UserError(
                f"{others[0]} does not belong to a factorization made here: use "
                "another --config.workdir, or --config.overwrite=True to move "
                f"{self.folder} aside"
            )
        if conflict and not self.settings.overwrite:
            if self._source_exists:
                self._shape()  # Replacing the files would not help a wrong source.
            raise conflict
        if conflict:
            return Work(self.settings.ranks, {}, is_replaced=True)
        # No arm needs it. Statistics of another dtype would give another one.
        has_no_spectrum = (
            self.is_target
            and metadata
            and not factor_files.has_spectrum(self.folder)
            and not self._differing(metadata, adds=True)
        )
        if lacking or has_no_spectrum or not self._source_exists:
            for path in factor_files.changed(self.folder, lacking):
                warn_once(
                    f"{path} was changed, damaged or left unfinished: it is made "
                    "again, and the old one moved aside"
                )
            return Work(lacking, described)
        return None

    def _differing(
        self, metadata: dict[str, Any] | None, adds: bool = False
    ) -> list[str]:
        """'PART (there VALUE, here VALUE)' where the files' `identity` is another.

        Empty if there are no files, or no source to compare them with. `adds`: ranks
        are added to the files, which must then have the same compute dtype.
        """
        # `identity` may tokenize a text.
        if metadata is None or not self._source_exists:
            return []
        identity = self.identity()
        unknown = ("calibration_sha256", "compute_dtype")
        older = {"bands": 1} | {name: identity.get(name) for name in unknown}
        metadata = older | metadata  # Older files lack these fields.
        # What a GPU has made counts as done on a CPU.
        is_open = self.settings.model.compute_dtype == "auto" and not adds
        if is_open or self.compute_dtype is None:
            metadata["compute_dtype"] = identity.get("compute_dtype")
        source, recorded = identity["source_sha256"], metadata.get("source_sha256")
        if source != recorded and self._is_source(recorded):
            metadata["source_sha256"] = source
        return differences(metadata, identity, identity)

    def found(self) -> list[str]:
        """The error of each rank or the ranks of its bands, and a next command."""
        ranks, lines = factor_files.read_metadata(self.folder)["ranks"], []
        for rank in self.settings.ranks:
            known = ranks[str(rank)]
            if (error := known.get("relative_error")) is not None:
                lines.append(f"rank {rank}: relative error {error:.4f}")
            elif bands := known.get("band_ranks"):
                own = ", ".join(map(str, bands))
                lines.append(f"size of rank {rank}: bands of ranks {own}")
        data = dataclasses.asdict(self.settings.data).items()
        asked = {"workdir": self.settings.workdir, **{f"data.{n}": v for n, v in data}}
        compress = next_command("compress", self.source, **asked)
        return [*lines, f"factors: {self.folder}", compress]

    def differing(self) -> list[str]:
        """As in `Job`; damaged files are not compared, and a warning says so."""
        try:
            return self._differing(factor_files.read_metadata(self.folder))
        except UserError as error:
            warn_once(f"{self.folder} is not compared with the settings: {error}")
            return []

    def identity(self) -> dict[str, Any]:
        """All that determines the files, except the ranks; stored in metadata.json.

        The source must exist.
        """
        chosen, given = self.settings.factorize, self._statistics_path
        identity = {
            "method": chosen.method,
            "bands": chosen.bands,
            "singular_value_split": chosen.singular_value_split,
            "source_sha256": self._source_sha256(),
        }
        if self._calibrates:
            identity["calibration_tokens"] = self._calibration_tokens
            identity["calibration_batch_size"] = self.settings.train.batch_size
            identity["calibration_sha256"] = self._calibration_sha256()
            config = Run.open(self.source).config(self.settings.model)
            identity["compute_dtype"] = config.compute_dtype
        elif given and given.exists():
            identity["statistics_sha256"] = sha256_of_file(given)
        return identity

    def check_early(self, missing: set[Path]) -> None:
        """As `check`; also if a rank exceeds the vocabulary of a D still to train."""
        if self.source not in missing:
            self._check(missing)
            return
        highest, data = max(self.settings.ranks), self.settings.data
        vocab_size = describe_corpus(data.source, data.tokenizer).vocab_size
        if highest > vocab_size:
            raise UserError(
                f"ranks holds {highest}: the vocabulary has {vocab_size} tokens, and "
                "the rank of the table is at most this number"
            )

    def check(self, missing: set[Path]) -> None:
        """Raises UserError if the source does not fit or no earlier job makes it.

        Reads no weights. `run` checks a source in `missing`. All processes must call
        this.
        """
        processes.from_first(lambda: self._check(missing))

    def _check(self, missing: set[Path]) -> None:
        """As `check`, in one process."""
        if self.source in missing:
            # The files are compared before a D is trained for hours.
            metadata = factor_files.read_metadata(self.folder)
            if metadata and not self.settings.overwrite:
                differing = ["source_sha256 (the source is not made yet)"]
                if not self._is_to_train:
                    differing = self._differing(metadata)
                if differing:
                    raise self._other_files(differing)
            return
        shape = self._shape()
        for rank in self.settings.ranks:
            if rank > min(shape):
                raise UserError(
                    f"ranks holds {rank}: the table of {self.source} is {shape}, so "
                    f"its rank is at most {min(shape)}"
                )
        if self._calibrates:
            Run.open(self.source).checked_data(self.settings.data, ["train"])
        table_VD = None
        if self._is_bare_table:  # The weights of a run are read later.
            table_VD = factor_files.read_table(self.source)
        self._given_statistics(shape, table_VD)
        if table_VD is not None:
            factor_files.check_rows_differ(table_VD, self.source)

    def _shape(self) -> tuple[int, ...]:
        """[V, D] of the source's table; UserError if it was made smaller already."""
        if self._is_bare_table:
            table_VD = factor_files.read_table(self.source)
            factor_files.ask_if_transposed(table_VD, self.source)
            return table_VD.shape
        is_asked = self.settings.task == "factorize"
        run = Run.asked(self.settings) if is_asked else Run.open(self.source)
        check_is_original(run)
        return run.table_shape

    def run(self, _: None = None, command: str = "") -> None:
        """Writes the files on the first process; every process calibrates.

        `command` is as in `Job`.
        Waits while another command holds the folder; nothing is left to do if it made
        these files.
        """
        with lock.held(self.folder, meanwhile=self.status) as check_lock:
            work = processes.from_first(self._find_work)
            if work is None:
                return
            self.check(set())
            identity = processes.from_first(self.identity)
            run = None if self._is_bare_table else Run.open(self.source)
            measured = self._measured_statistics(run) if self._calibrates else None

            def check() -> None:
                check_lock()
                if self.identity() != identity:
                    raise UserError(
                        f"{self.source}, or what it was measured with, was changed "
                        "while it was factorized: run the same command again"
                    )

            processes.from_first(
                lambda: self._write(work, run, measured, check, command)
            )

    def _write(
        self,
        work: Work,
        run: Run | None,
        measured: Statistics | None,
        check: Callable[[], None],
        command: str,
    ) -> None:
        """Writes the files that are left to do, of `run` or of a bare table.

        Those of earlier commands stay as they are: runs may be reading them. `check`
        raises UserError if nothing may be written.
        """
        table_VD = run.table() if run else factor_files.read_table(self.source)
        statistics = measured or self._given_statistics(table_VD.shape, table_VD)
        print(f"factorizing {self.source}, {self.amount}", flush=True)
        chosen, (vocab_size, width) = self.settings.factorize, table_VD.shape
        make = Factorizer(
            table_VD, chosen.method, statistics, chosen.singular_value_split
        )
        made = {rank: make.of_rank(rank, chosen.bands) for rank in work.ranks}
        new = {str(rank): what for rank, (_, what) in made.items()}
        described = work.described | new
        ranks = sorted(map(int, described))
        singular_values = make.factors.singular_values
        if run:
            origin = {"step": run.step, "tokens": run.tokens.identity}
        else:
            origin = origin_of(self.source).stored
        metadata = {
            **self.identity(),
            "source": str(self.source),
            **origin,
            "vocab_size": vocab_size,
            "n_embd": width,
            "effective_rank": factorization.effective_rank(singular_values),
            "ranks": {str(rank): described[str(rank)] for rank in ranks},
        }
        check()
        if work.is_replaced:
            make_room(self.folder)
        for path in factor_files.changed(self.folder, work.ranks):
            move_aside(path)
        tables = {rank: table for rank, (table, _) in made.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with watching(self.folder) as check_place:
            check_place()
            # The boards come first: with its files, the job is done.
            shown_in = (self.settings, self.folder, "factorize", command)
            with Boards.of_command(*shown_in) as boards:
                # Tables in bands keep another share than a rank does.
                marked = [n for n in ranks if "energy_kept" in described[str(n)]]
                boards.figure("spectrum", spectrum_figure(singular_values, marked))
                if run:
                    shown = {
                        f"after_rank_{n}": functools.partial(self._dense, n, tables)
                        for n in ranks
                    }
                    shown = {BEFORE: lambda: table_VD} | shown
                    show_rows(boards, run, self.settings, statistics, shown)
            factor_files.write(
                self.folder, tables, singular_values, metadata, chosen.bands > 1
            )
            check_place()
        remove_leftovers(self.folder)

    def _dense(self, rank: int, made: dict[int, FactorizedTable]) -> np.ndarray | None:
        """The table [V, D] of a rank, in `made` or in the files of earlier commands.

        None if the files are damaged.
        """
        if rank in made:
            return made[rank].dense()
        in_bands = self.settings.factorize.bands > 1
        with contextlib.suppress(UserError):
            return factor_files.read(self.folder, rank, in_bands).dense()
        return None

    def _measured_statistics(self, run: Run) -> Statistics:
        """Statistics on the corpus in `settings.data`, by default the run's own."""
        settings, batch_size = self.settings, self.settings.train.batch_size
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        placement.check_divisible("train.batch_size", batch_size, mesh)
        corpus = run.corpus(settings.data, settings.cache_dir, ["train"])
        model, variables = run.load(settings.model, mesh)
        chunks = settings.train.loss_chunks
        return calibrate.statistics(
            run,
            corpus,
            functools.partial(
                calibrate.collect, model, variables, mesh=mesh, chunks=chunks
            ),
            run.results_in(settings.workdir),
            window=model.config.block_size,
            compute_dtype=model.config.compute_dtype,
            tokens=self._calibration_tokens,
            batch_size=batch_size,
            tables=lambda: [run.table()],
        )

    def _given_statistics(
        self, shape: tuple[int, ...], table_VD: np.ndarray | None
    ) -> Statistics | None:
        """Statistics from a file; None if not needed, UserError if they do not fit."""
        path = self._statistics_path
        if path is None:
            return None
        try:
            if self._is_bare_table:
                known = calibrate.read_for(path, table_VD, self.source)
                return seen_by(known.side, known.statistics)
            statistics = calibrate.read(path, Run.open(self.source))
        except UserError as error:
            raise UserError(
                f"factorize.method is '{self.settings.factorize.method}', which needs "
                f"statistics, and {error}: name their file as "
                "--config.factorize.statistics"
            ) from None
        calibrate.check_shape(statistics, path, shape, self.source)
        return statistics

    def _how_to_make(self) -> tuple[str, str, Settings]:
        boards = ("tensorboard", "wandb", "wandb_project")
        kept = ("workdir", "ranks", "factorize", *(f"telemetry.{b}" for b in boards))
        if self._calibrates:
            kept += ("compress.calibration_tokens", "train.batch_size", "data")
            kept += ("model.compute_dtype",)
        values = {path: operator.attrgetter(path)(self.settings) for path in kept}
        if "data" not in kept:  # An empty source stands for the run's own text.
            values["data.source"] = ""
        settings = Settings(model_path=str(self.source)).replace(values)
        return f"lacks {self.amount}", "configs/factorize.py", settings

    def _other_files(self, differing: list[str]) -> UserError:
        first = (
            f"; if it is of the end of {self.source}, train that first, alone, with "
            "configs/baseline.py"
        )
        return UserError(
            f"{self.folder} holds another factorization, {'; '.join(differing)}: use "
            "another --config.workdir, or --config.overwrite=True"
            f"{first if self._is_to_train else ''}"
        )

    def _source_sha256(self) -> str:
        """Hash of the table or the checkpoint."""
        hash_of = factor_files.sha256 if self._is_bare_table else fingerprint.of
        return hash_of(self.source)

    def _is_source(self, recorded: str | None) -> bool:
        """Whether an older version recorded this hash of the checkpoint."""
        return not self._is_bare_table and fingerprint.same(self.source, recorded)

    def _calibration_sha256(self) -> str:
        """Hash of the calibration text's tokens."""
        data, cache_dir = self.settings.data, self.settings.cache_dir
        run = Run.open(self.source)
        data = run.data(data)
        corpus = open_corpus(
            data.source, cache_dir, data.tokenizer, ["train"], run.tokens.encodes_as
        )
        return corpus.tokens_sha256("train")

    @property
    def _is_bare_table(self) -> bool:
        """Whether the source is a .npy file and not a run."""
        return self.source.suffix == ".npy"

    @property
    def _source_exists(self) -> bool:
        if self._is_bare_table:
            return self.source.exists()
        return checkpoint.exists(self.source)

    @property
    def _is_to_train(self) -> bool:
        """Whether the source is a run that has not reached its last step."""
        if self._is_bare_table or not self._source_exists:
            return not self._is_bare_table
        there = look(self.source)
        last = Settings.of(there.stored or {}).train.steps
        return there.is_made_here and last not in {one.step for one in there.saved}

    @property
    def _calibrates(self) -> bool:
        """Whether the job measures statistics on the run."""
        needed = METHODS[self.settings.factorize.method].needs_statistics
        return needed and self._statistics_path is None

    @property
    def _calibration_tokens(self) -> int:
        """The default is the same on every device, as the files' `identity` must be."""
        return (
            self.settings.compress.calibration_tokens or effort.GPU.calibration_tokens
        )

    @property
    def _statistics_path(self) -> Path | None:
        """The file of the statistics, if the method needs one."""
        chosen = self.settings.factorize
        if not METHODS[chosen.method].needs_statistics:
            return None
        if chosen.statistics:
            return Path(chosen.statistics)
        # Without a model to measure, a file beside the table must hold the statistics.
        return calibrate.beside(self.source) if self._is_bare_table else None
