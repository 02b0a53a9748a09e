"""The task 'compress': makes a trained model's token table smaller, without training.

WORKDIR/compressed/ gets a report and compressed models that every command takes as
runs. A sweep also writes sweep.json with one row per table; a search for a bound
writes advice.json instead.
"""

from pathlib import Path
from typing import Any

import jax

from pcagpt.compress.advise import advise
from pcagpt.compress.candidates import BASELINE, Recipe, recipes
from pcagpt.compress.effort import decide_effort
from pcagpt.compress.original import Original
from pcagpt.compress.sweep import add_recovered, read_sweep, sweep
from pcagpt.config import Settings, words_of
from pcagpt.config.schema import COMPRESS_BOUNDS
from pcagpt.errors import UserError
from pcagpt.factorize import METHODS
from pcagpt.files import strict
from pcagpt.pipeline.execute import execute
from pcagpt.pipeline.plan import recovery_plan
from pcagpt.report import recovered_rows
from pcagpt.run import checkpoint, provenance
from pcagpt.run.folder import read_result
from pcagpt.run.trained import Run
from pcagpt.sharding import placement

FOLDER = "compressed"  # in a workdir


def compress(settings: Settings, command: str) -> None:
    """Sweeps, or finds the one table that fits a bound of `settings.compress`.

    With `compress.recover_ranks`, it then trains the best models of the sweep further.

    Raises:
      UserError: the run or a method does not exist, the table is already factorized,
        the folder holds the sweep of another model, or no table fits.
    """
    settings = decide_effort(settings, jax.default_backend())
    methods = _methods(settings.compress.methods)
    folder = Path(settings.workdir) / FOLDER
    run = Run.open(settings.model_path)
    run.check_model(settings.model)
    original = Original.of(run, settings)
    heading = {
        "command": command,
        "run": str(run.folder),
        "step": run.step,
        **provenance.summary(original.mesh.size),
        "protocol": original.protocol,
    }
    bounds = {name: getattr(settings.compress, name) for name in COMPRESS_BOUNDS}
    bounds = {name: bound for name, bound in bounds.items() if bound}
    tried = [] if bounds else _recipes(original, methods)
    _check_recoverable(original, {recipe.rank for recipe in tried})
    _check_folder(folder, heading["protocol"], settings.overwrite)
    if bounds:
        advise(original, methods[-1], bounds, heading, folder)
    else:
        sweep(original, tried, heading, folder)
    placement.wait_for_all(str(folder))
    if settings.compress.recover_ranks:
        _recover(settings, folder)


def _methods(text: str) -> list[str]:
    """The names in `compress.methods`."""
    methods = words_of(text)
    if not methods or set(methods) - METHODS.keys():
        raise UserError(
            f"compress.methods is '{text}': choose from {', '.join(METHODS)}"
        )
    return methods


def _recipes(original: Original, methods: list[str]) -> list[Recipe]:
    """The recipes of the sweep, without ranks that are too high for the table."""
    settings, shape = original.settings, original.table_VD.shape
    ranks = [rank for rank in settings.ranks if rank <= min(shape)]
    if not ranks:
        raise UserError(
            f"ranks is {settings.ranks}: the table of {original.run.folder} is "
            f"{shape}, so its rank is at most {min(shape)}"
        )
    if len(ranks) < len(settings.ranks) and jax.process_index() == 0:
        left_out = ", ".join(str(rank) for rank in settings.ranks if rank > min(shape))
        print(
            f"left out: rank {left_out}; the table has at most rank {min(shape)}",
            flush=True,
        )
    compress = settings.compress
    tried = recipes(*shape, methods, ranks, compress.bands, compress.bits)
    if all(recipe.method == BASELINE or recipe.bits < 32 for recipe in tried):
        raise UserError(
            "ranks are too small for compress.bands: no table fits; raise the ranks, "
            "or try fewer bands"
        )
    return tried


def _check_recoverable(original: Original, ranks: set[int]) -> None:
    """Raises UserError if `recover_ranks` cannot be trained and compared with D."""
    run, settings = original.run, original.settings
    if not settings.compress.recover_ranks:
        return
    lacking = set(settings.compress.recover_ranks) - ranks
    if lacking:
        raise UserError(
            f"compress.recover_ranks holds {min(lacking)}, but ranks does not: add it "
            "to ranks, because only tables of the sweep can be trained further"
        )
    result = read_result(run.folder)
    if result is None or result["steps"] != run.step:
        raise UserError(
            f"compress.recover_ranks is set, but {settings.model_path} is not "
            "the last step of a finished run: D can be trained further only from there"
        )
    if run.record.get("corpus_sha256") != original.corpus.fingerprint():
        raise UserError(
            f"compress.recover_ranks is set, but {run.folder} was not trained on "
            f"{original.corpus.name}: leave data.source out"
        )


def _check_folder(folder: Path, protocol: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError if the folder holds the sweep of another model or corpus."""
    own, there = strict(protocol), read_sweep(folder).get("protocol")
    names = ("checkpoint", "corpus_sha256", "split", "window")
    differing = [name for name in names if there and there.get(name) != own[name]]
    if differing and not overwrite:
        raise UserError(
            f"{folder} holds the sweep of another model or corpus "
            f"({', '.join(differing)} differ): use another --config.workdir, or "
            "--config.overwrite=True to replace it"
        )


def _recover(settings: Settings, folder: Path) -> None:
    """Trains the best models of a sweep and D further; adds them to its report."""
    plan = recovery_plan(settings, folder)
    execute(plan, plan.jobs[0].settings, command="")
    if jax.process_index() == 0:
        runs = [job.folder.name for job in plan.jobs]
        baseline = checkpoint.find(settings.model_path)[0]
        rows = recovered_rows(folder, runs, baseline)
        print(f"report: {add_recovered(folder, rows)}", flush=True)
