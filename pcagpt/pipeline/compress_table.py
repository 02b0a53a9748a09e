"""The task 'compress' on a .npy file: a table without its model, so without a loss.

WORKDIR/compressed_table/ gets errors.json, with one row per table, its report, and the
best table of each kind and rank. A search for a bound writes its table and advice.json
into advised/ instead. Statistics of the model beside the table, as for configs/
factorize.py, allow the methods that need them, and an estimate of the loss.
"""

from pathlib import Path

import jax

from pcagpt.compression.advise import ADVISED
from pcagpt.compression.bare_table import BareTable, check_needs_no_text
from pcagpt.compression.output import Output
from pcagpt.compression.sweep import models_of
from pcagpt.compression.table_files import ADVICE, check_table_place
from pcagpt.compression.table_sweep import advise_table, sweep_table
from pcagpt.config import Settings, methods_of
from pcagpt.files import remove_leftovers
from pcagpt.pipeline.compress import check_file
from pcagpt.pipeline.compress_plan import (
    amount_of,
    decide_effort,
    recipes_of,
    tell_left_out,
)
from pcagpt.pipeline.execute import check_workdir, say
from pcagpt.report import error_figure, lacking_line, table_lines
from pcagpt.rows import ErrorRow, read_sweep
from pcagpt.run import calibrate, lock, provenance
from pcagpt.run.folder import check_is_folder, watching
from pcagpt.sharding import processes
from pcagpt.telemetry.boards import Boards
from pcagpt.telemetry.wandb_run import import_wandb

FOLDER = "compressed_table"  # in a workdir


def compress_table(settings: Settings, command: str) -> None:
    """Makes smaller tables, or the best one for a bound of `settings.compress`.

    All processes must call this; the first does the work.

    Raises UserError if W&B is not installed, for a damaged table, a method that needs
    more than there is, the results of another table in the folder, and a bound that no
    table fits.
    """
    check_workdir(settings.workdir)
    if settings.telemetry.wandb:
        import_wandb()
    settings = decided(settings)
    table, methods = _open(settings)
    folder, options = Path(settings.workdir) / FOLDER, settings.compress
    source, known = Path(settings.model_path), folder / "errors.json"
    tried, places = [], [folder / ADVISED]
    tell_left_out(methods, options.bands)
    if options.bounds:
        known = folder / ADVISED / ADVICE
    else:
        tried = recipes_of(settings, table.table_VD.shape, methods)
        places = sorted(models_of(folder, tried))

    def check_folder() -> None:
        check_is_folder(folder)
        if not settings.overwrite:
            check_file(known, table)
            for place in places:
                check_table_place(place)

    def work() -> list[str]:
        check_folder()
        heading = {
            "command": command,
            "source": str(source),
            "protocol": table.protocol,
            "statistics_are_checked": table.is_checked,
        }

        def check() -> None:
            check_lock()
            check_place()

        made_by, lines = provenance.summary(1), []
        output = Output(folder, heading, made_by, check, "errors.json")
        if options.bounds:
            advise_table(table, methods, options, output)
        else:
            try:
                content = sweep_table(table, tried, output)
            except OSError:
                content = read_sweep(known, ErrorRow)
                if content and "rows_left" not in content:  # All are made.
                    *lines, _, _ = table_lines(content, folder, settings.workdir)
                    say(*lines)  # Without paths: the best tables may be lacking.
                raise
            lines = table_lines(content, folder, settings.workdir)
            with Boards.of_command(settings, folder, "compress", command) as boards:
                boards.figure("errors", error_figure(content))
        check()
        remove_leftovers(folder)
        return [*lines, _lacking(table, source)]

    with (
        lock.held(folder, meanwhile=check_folder) as check_lock,
        watching(folder) as check_place,
    ):
        say(*processes.from_first(work))


def preview_table(settings: Settings) -> list[str]:
    """What `compress_table` would do, from `decided` settings; UserError as there."""
    (table, _), path = _open(settings), Path(settings.model_path)
    shape = table.table_VD.shape
    return [
        f"compress {path}, a table {shape} without its model",
        amount_of(settings, shape, jax.default_backend(), 1),
        _lacking(table, path),
    ]


def decided(settings: Settings) -> Settings:
    """As `decide_effort`, which depends on whether statistics are beside the table."""
    has_statistics = calibrate.beside(Path(settings.model_path)).exists()
    platform = jax.default_backend()
    return decide_effort(settings, platform, has_statistics=has_statistics)


def _open(settings: Settings) -> tuple[BareTable, list[str]]:
    """(the table, the methods); UserError if one lacks the statistics."""
    path, methods = Path(settings.model_path), methods_of(settings.compress.methods)
    table = BareTable.read(path, settings.factorize.singular_value_split)
    if table.statistics is None:
        check_needs_no_text(methods, f"give them as {calibrate.beside(path)}")
    return table, methods


def _lacking(table: BareTable, path: Path) -> str:
    lacking = None if table.statistics else calibrate.beside(path)
    return lacking_line(lacking, table.is_checked)
