"""The task 'compress': makes a trained model's token table smaller, without training.

WORKDIR/compressed/ gets a report and compressed models that every command takes as
runs; of a model of another architecture, only its tables. A sweep also writes
sweep.json with one row per table; a search for a bound writes advice.json instead. A
sweep on another split than val chooses no models, and writes to
WORKDIR/compressed_SPLIT/. Of an untied model, each of the two tables has this in a
folder of its own, input/ and output/.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from pcagpt.compression.advise import ADVISED, advise
from pcagpt.compression.bare_table import BareTable
from pcagpt.compression.codes import KINDS
from pcagpt.compression.original import (
    Original,
    check_is_original,
    of_extra,
    platform_of,
)
from pcagpt.compression.output import Output
from pcagpt.compression.read_table import read_table
from pcagpt.compression.sweep import (
    Models,
    add_recovered,
    models_of,
    set_samples,
    sweep,
)
from pcagpt.compression.table_files import undamaged
from pcagpt.compression.write_model import check_place as check_model
from pcagpt.compression.write_model import is_of_another
from pcagpt.config import Settings, methods_of
from pcagpt.data.token_array import TokenArray
from pcagpt.errors import UserError
from pcagpt.files import remove_leftovers
from pcagpt.json_files import check_fields, read_json, strict
from pcagpt.pipeline import estimate
from pcagpt.pipeline.compress_plan import (
    amount_of,
    decide_effort,
    recipes_of,
    tell_left_out,
)
from pcagpt.pipeline.differences import differences
from pcagpt.pipeline.execute import check, check_workdir, execute, say
from pcagpt.pipeline.plan import recovery_plan
from pcagpt.pipeline.samples import samples_of
from pcagpt.pipeline.token_rows import BEFORE, show_rows
from pcagpt.report import (
    how_to_take,
    pareto_figure,
    recommended_row,
    recovered_rows,
    sweep_lines,
)
from pcagpt.rows import REMEDY, Recipe, best_models, read_sweep
from pcagpt.run import checkpoint, lock, provenance
from pcagpt.run.folder import (
    check_is_folder,
    read_record,
    read_result,
    removed,
    watching,
)
from pcagpt.run.trained import Run
from pcagpt.sharding import placement, processes
from pcagpt.telemetry.boards import Boards
from pcagpt.telemetry.wandb_run import import_wandb, share_group

FOLDER = "compressed"  # in a workdir; with a suffix for other splits than val


def compress(settings: Settings, command: str) -> None:
    """Sweeps, or finds the one table that fits a bound of `settings.compress`.

    With `compress.recover_ranks`, it then trains the best models of the sweep further.
    All processes must call this.

    Raises:
      UserError: W&B is not installed, the run or a method does not exist, the table is
        already factorized, the folder holds the sweep of another model, or no table
        fits.
    """
    check_workdir(settings.workdir)
    if settings.telemetry.wandb:
        import_wandb()
    run = Run.asked(settings)
    settings = decide_effort(settings, platform_of(run), run.table_shape)
    suffix = "" if settings.split == "val" else f"_{settings.split}"
    folder = Path(settings.workdir) / f"{FOLDER}{suffix}"
    checkpoint.check_path(folder)
    methods = methods_of(settings.compress.methods)
    if types := run.record.get("stored_as"):
        say(f"{run.folder}: its values, dequantized from {', '.join(types)}, are D")
    tables = [
        _Table(original, folder / original.side, methods, settings)
        for original in Original.of(run, settings).of_each_table()
    ]
    tell_left_out(methods, settings.compress.bands)
    if len(tables) > 1:
        places = " and ".join(str(table.folder) for table in tables)
        say(
            f"{run.folder} is untied: its tables are compressed one by one, while the "
            f"other stays as it is, into {places}"
        )
        for table in tables:
            processes.from_first(table.check_folder)
    try:
        for table in tables:
            table.compress(command)
    finally:  # Also if the report cannot be written.
        say(*(line for table in tables for line in table.found))


def preview_compress(settings: Settings, run: Run) -> list[str]:
    """What `compress` would do with a run, and how long that takes; UserError as there.

    `settings` has its effort decided.
    """
    check_is_original(run)
    each = "for each token table that it has: " if run.architecture else ""
    mesh, devices = settings.mesh, 1  # PyTorch uses one.
    if not run.architecture:
        devices = placement.make_mesh(mesh.data, mesh.fsdp).size
    amount = amount_of(settings, run.table_shape, platform_of(run), devices)
    lines = [f"{each}{amount}"]
    if ranks := settings.compress.recover_ranks:
        folder, methods = Path(settings.workdir), methods_of(settings.compress.methods)
        tried = recipes_of(settings, run.table_shape, methods)
        models = _models_to_train(models_of(folder, tried), ranks)
        (baseline,) = recovery_plan(settings, folder, ()).jobs
        runs = 1 + 2 * len(models)  # As in `recovery_plan`.
        lines.append(estimate.of_training(runs, runs * baseline.flops(), devices))
    return lines


class _Table:
    """The work on one table: what is tried, and the folder of the results."""

    def __init__(
        self, original: Original, folder: Path, methods: list[str], settings: Settings
    ):
        self.original, self.folder, self.settings = original, folder, settings
        self._methods, options = methods, settings.compress
        self._file = folder / ("advice.json" if options.bounds else "sweep.json")
        self._tried: list[Recipe] = []
        self.found: list[str] = []  # the last lines of the command
        self._models: Models = {folder / ADVISED: []}
        if not options.bounds:
            self._tried = recipes_of(settings, original.table_VD.shape, methods)
            self._models = models_of(folder, self._tried)

    def check_folder(self) -> None:
        """Raises UserError if the folder holds something else."""
        for place in (self.folder, *sorted(self._models)):
            check_is_folder(place)
        if not self.settings.overwrite:
            check_file(self._file, self.original)
            for model in sorted(self._models):
                check_model(model)

    def _check_answered(self) -> None:
        """Raises UserError if a model that stays is for another bound than the asked.

        Scripts export it if the command succeeds.
        """
        ((name, bound),) = self.settings.compress.bounds.items()
        earlier = (read_json(self._file, REMEDY) or {}).get("bounds")
        if earlier != strict({name: bound}):
            raise UserError(
                f"the table for compress.{name} = {bound} was not saved, because "
                f"{self.folder / ADVISED} stays: use another --config.workdir, or "
                "--config.overwrite=True to move that model aside"
            )

    def compress(self, command: str) -> None:
        """Does the work; `command` is for the report."""
        original, folder, settings = self.original, self.folder, self.settings
        options, run, models = settings.compress, original.run, self._models
        heading = {
            "command": command,
            "run": str(run.folder),
            "step": run.step,
            "protocol": original.protocol,
            "measured_on": original.measured_on,
            "architecture": run.architecture,
            "stored_as": run.record.get("stored_as"),
            "holds_factors": _holds_factors(original),
        }
        with (
            lock.held(folder, meanwhile=self.check_folder) as check_lock,
            watching(folder) as check_place,
        ):
            processes.from_first(self.check_folder)
            processes.from_first(lambda: _tell_of_others(folder, models, original))

            def check_inputs() -> None:
                check_lock()
                check_place()
                original.corpus.check_unchanged()

            model = original.model
            made_by = provenance.summary(model.device_count, model.packages)
            output = Output(folder, heading, made_by, check_inputs)
            overwrite = settings.overwrite
            if options.bounds:
                row = advise(
                    original, self._methods, options, output, overwrite=overwrite
                )
                processes.from_first(self._check_answered)
                if row:
                    place = folder / ADVISED
                    self.found = [how_to_take(row, place, settings.workdir, heading)]
            else:
                _check_recoverable(original, models, settings, folder)
                try:
                    models = sweep(original, self._tried, output, overwrite=overwrite)
                    _sample(settings, output, original)
                except OSError:
                    content = read_sweep(self._file)
                    if content and "rows_left" not in content:  # All are measured.
                        lines = sweep_lines(content, folder, settings.workdir)
                        self.found = lines[:1]  # The models may be lacking.
                    raise
                if jax.process_index() == 0:
                    content = read_sweep(self._file)
                    if not content:
                        raise removed(self._file)
                    for place in models:
                        if not (place / "config.json").exists():
                            raise removed(place)
                    self.found = sweep_lines(content, folder, settings.workdir)
                    _show(settings, folder, content, original, command)
            if jax.process_index() == 0:
                remove_leftovers(folder)
            processes.wait_for_all(FOLDER)
            if options.recover_ranks:
                _recover(settings, output, models, run, command)


def _holds_factors(original: Original) -> bool:
    """Whether a model with a small table of it can be exported as hf-factored."""
    run = original.run
    if not run.architecture:
        return not original.side
    if original.side or not run.folder.is_dir():
        return False
    with of_extra(run.folder, run.architecture):
        from pcagpt.export.architecture import holds_factors
    return holds_factors(run)


def check_file(path: Path, original: Original | BareTable) -> None:
    """Raises UserError if the file holds numbers of another protocol.

    Numbers of a part of the split may be replaced by those of the whole split.
    """
    own, content = strict(original.protocol), read_json(path, REMEDY)
    if content is None:
        return
    check_fields(content, {"protocol": (dict,)}, path, REMEDY)
    stored = original.renewed(content["protocol"])
    parts = own.keys() | stored.keys()
    if "evaluated_tokens" not in own:
        parts -= {"evaluated_tokens"}
    if differing := differences(stored, own, sorted(parts)):
        raise UserError(
            f"{path} holds other numbers, {'; '.join(differing)}: use another "
            "--config.workdir, or --config.overwrite=True to move them aside"
        )


def _tell_of_others(folder: Path, models: Models, original: Original) -> None:
    """Prints a line for each best model that is of another D."""
    run = original.run
    for place in best_models(folder):
        if not is_of_another(place, original):
            continue
        renewed = place in models
        remedy = "this sweep renews it" if renewed else "sweep its rank, or delete it"
        say(
            f"{place} belongs to another D than {run.folder}, step {run.step}: {remedy}"
        )


def _check_recoverable(
    original: Original, models: Models, settings: Settings, folder: Path
) -> None:
    """Raises UserError if `recover_ranks` cannot be trained and compared with D."""
    run, ranks = original.run, settings.compress.recover_ranks
    if not ranks:
        return
    _models_to_train(models, ranks)
    if original.batches.is_cut:
        raise UserError(
            "compress.recover_ranks is set beside evaluate.max_tokens, but models that "
            "are trained further are evaluated on the whole split: leave it out"
        )
    result = read_result(run.folder)
    if result is None or result.get("steps", run.step) != run.step:
        raise UserError(
            f"compress.recover_ranks is set, but {settings.model_path} is not "
            "the last step of a finished run: D can be trained further only from there"
        )
    if not run.is_own(original.corpus):
        raise UserError(
            f"compress.recover_ranks is set, but {run.folder} was not trained on "
            f"{original.corpus.name}: leave data.source out"
        )
    # The models do not exist yet; D, trained further, has the same settings.
    for job in check(recovery_plan(settings, folder, ())):
        job.check(set())


def _models_to_train(models: Models, ranks: tuple[int, ...]) -> list[Path]:
    """The models of these ranks; UserError if a rank has none."""
    trainable = {
        model: recipes[0].rank
        for model, recipes in models.items()
        if recipes[0].is_factors or KINDS[recipes[0].method].trainable
    }
    codes = [name for name, kind in KINDS.items() if kind.trainable]
    if lacking := set(ranks) - set(trainable.values()):
        raise UserError(
            f"compress.recover_ranks holds {min(lacking)}, which the sweep leaves out: "
            f"only the best factors and the {' and '.join(codes)} table of a rank that "
            "was tried can be trained further"
        )
    return [model for model, rank in trainable.items() if rank in ranks]


def _sample(settings: Settings, output: Output, original: Original) -> None:
    """Adds samples of D and of the best models of the recommended size to the report.

    A sweep on another split has no models.
    """
    if original.split != "val":
        return
    content = read_sweep(output.folder / "sweep.json")
    if not content:
        return
    own = _best_of_size(output.folder, content)
    own = [place for place in own if (place / "config.json").is_file()]
    run, is_other = original.run, bool(original.run.architecture)
    baseline = run.folder if is_other else checkpoint.folder_of(run.folder, run.step)
    runs = {"D": baseline} | {place.name: place for place in own}

    def text() -> TokenArray:
        return original.corpus.tokens(original.split)

    decoder = original if is_other else None
    samples = samples_of(runs, settings, text, known=content, original=decoder)
    is_renewed = samples.get("samples_of") != content.get("samples_of")
    if is_renewed and jax.process_index() == 0:
        set_samples(output, samples)


def _show(
    settings: Settings, folder: Path, content: dict, original: Original, command: str
) -> None:
    """Shows the figure of a sweep, and the tables of its recommended size, on boards.

    On the first process.
    """
    places = _best_of_size(folder, content)
    after = {f"after_{p.name}": functools.partial(_table_in, p) for p in places}
    tables = {BEFORE: lambda: original.table_VD} | after
    with Boards.of_command(settings, folder, "compress", command) as boards:
        boards.figure("pareto", pareto_figure(content))
        show_rows(boards, original.run, settings, original.statistics, tables)


def _table_in(folder: Path) -> np.ndarray | None:
    """The table [V, D] of a best model, or None if it is damaged."""
    made = (read_record(folder) or {}).get("compressed", {})
    table = undamaged(lambda: read_table(folder, made))
    return table and table.dense()


def _best_of_size(folder: Path, content: dict) -> list[Path]:
    """The best models of the size that a sweep recommends, with the tables of rows."""
    rows = content["rows"]
    rank = recommended_row(content).rank or max(row.rank for row in rows)
    models = content["models"].items()
    places = (folder / name for name, made in sorted(models) if made["rank"] == rank)
    return [place for place in places if place.is_dir()]


def _recover(
    settings: Settings, output: Output, models: Models, baseline: Run, command: str
) -> None:
    """Trains the best models of a sweep and D further; adds them to its report."""
    processes.from_first(baseline.check_unchanged)
    ranks = settings.compress.recover_ranks
    plan = recovery_plan(settings, output.folder, _models_to_train(models, ranks))
    if settings.telemetry.wandb and jax.process_index() == 0:
        share_group(Path(settings.workdir), output.folder)
    execute(plan, command)
    processes.from_first(baseline.check_unchanged)
    # A run's own record names the place where its start was then.
    starts = {j.folder.name: Run.open(j.settings.init.weights_from) for j in plan.jobs}
    if jax.process_index() == 0:
        made = {run: of.record.get("compressed", {}) for run, of in starts.items()}
        rows = recovered_rows(output.folder, made, baseline.folder)
        say(f"report: {add_recovered(output, rows)}")
