"""The task 'compress': makes a trained model's token table smaller, without training.

WORKDIR/compressed/ gets a report and compressed models that every command takes as
runs. A sweep also writes sweep.json with one row per table, a bound advice.json.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from pcagpt.compress.candidates import (
    BASELINE,
    FLOAT_BYTES,
    Candidate,
    Recipe,
    recipes,
)
from pcagpt.compress.effort import decide_effort
from pcagpt.compress.fit import Fit
from pcagpt.compress.original import Original
from pcagpt.compress.score import SwapScores
from pcagpt.config import Settings, words_of
from pcagpt.config.schema import COMPRESS_BOUNDS
from pcagpt.errors import UserError
from pcagpt.factorize import METHODS, LossRegression, SecondOrder
from pcagpt.files import read_json, strict, write_json
from pcagpt.report import SMALLEST_ADDED, advice_text, pareto_figure, write_sweep_report
from pcagpt.run import provenance
from pcagpt.run.folder import read_result
from pcagpt.run.trained import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress
from pcagpt.telemetry.record import Telemetry

FOLDER = "compressed"
REPORT_EVERY = 5  # rows

Row = dict[str, Any]
RECIPE = [field.name for field in dataclasses.fields(Recipe)]


def folder_of(settings: Settings) -> Path:
    """The folder of everything that the task writes."""
    return Path(settings.workdir) / FOLDER


def compress(settings: Settings, command: str) -> None:
    """Sweeps, or finds the one table that fits a bound of `settings.compress`.

    Raises:
      UserError: no such run or method, the table is factorized already, the folder
        holds the sweep of another model, or no table fits.
    """
    settings = decide_effort(settings, jax.default_backend())
    methods = _methods(settings.compress.methods)
    run = Run.open(settings.model_path)
    run.check_model(settings.model)
    original = Original.of(run, settings)
    heading = {
        "command": command,
        "run": str(run.folder),
        "step": run.step,
        **provenance.summary(original.mesh.size),
        "protocol": _protocol(original),
    }
    bounds = {name: getattr(settings.compress, name) for name in COMPRESS_BOUNDS}
    bounds = {name: bound for name, bound in bounds.items() if bound}
    tried = [] if bounds else _recipes(original, methods)
    _check_recoverable(original, {recipe.rank for recipe in tried})
    _check_folder(folder_of(settings), heading["protocol"], settings.overwrite)
    if bounds:
        _fit(original, methods[-1], bounds, heading)
    else:
        _sweep(original, tried, heading)
    placement.wait_for_all(str(folder_of(settings)))


def add_recovered(folder: Path, rows: list[Row]) -> Path:
    """Adds the results of further training to sweep.json; rewrites its report."""
    sweep = _read_sweep(folder) | {"recovered": strict(rows)}
    write_json(folder / "sweep.json", sweep)
    return write_sweep_report(folder, sweep)


def _sweep(original: Original, tried: list[Recipe], heading: dict[str, Any]) -> None:
    """Measures every recipe; writes the rows, reports and the best model per rank."""
    folder, writes = folder_of(original.settings), jax.process_index() == 0
    earlier = _read_sweep(folder)
    known: dict[Recipe, Row] = {}
    if earlier.get("protocol") == strict(heading["protocol"]):
        rows = [*earlier["rows"], *earlier.get("other_rows", ())]
        known = {Recipe(**{name: row[name] for name in RECIPE}): row for row in rows}
        if "recovered" in earlier:
            heading = {**heading, "recovered": earlier["recovered"]}
    lacking = [recipe for recipe in tried if recipe not in known]
    done = len(tried) - len(lacking)
    make = original.compressor  # Calibrates first.
    label = f"compressing {original.run.folder.name}"
    with Progress(label, len(tried), start=done) as progress:
        for number, recipe in enumerate(progress.track(lacking), 1):
            candidate = make(recipe)
            known[recipe] = candidate.row(original.measure(candidate))
            if writes:  # After every row: an interrupted sweep resumes here.
                sweep = _write_sweep(folder, heading, tried, known)
                if number % REPORT_EVERY == 0:
                    write_sweep_report(folder, sweep)
    if not writes:
        return
    sweep = _write_sweep(folder, heading, tried, known)
    for rank in sorted({recipe.rank for recipe in tried} - {0}):
        of_rank = [r for r in tried if r.rank == rank and r.bits == 32]
        best = min(of_rank, key=lambda recipe: known[recipe]["added_loss"])
        table = make(best).table
        original.write(folder / f"best_k{rank}", table, dataclasses.asdict(best))
    tensorboard = original.settings.telemetry.tensorboard
    with Telemetry(folder, config={}, tensorboard=tensorboard) as telemetry:
        telemetry.figure("pareto", pareto_figure(sweep))
    print(f"report: {write_sweep_report(folder, sweep)}", flush=True)


def _fit(
    original: Original, method: str, bounds: dict[str, float], heading: dict[str, Any]
) -> None:
    """Finds the table that fits the bound; writes its model and advice.json."""
    ((name, bound),) = bounds.items()
    compress, folder = original.settings.compress, folder_of(original.settings)
    make, shape = original.compressor, original.table_VD.shape  # Calibrates first.
    label = f"fitting {original.run.folder.name}"
    with Progress(label, Fit.TRIALS) as progress:

        def measure(candidate: Candidate) -> SwapScores:
            scores = original.measure(candidate)
            progress.update(len(fit.trials) + 1)
            return scores

        fit = Fit(make, measure, method, compress.bands, shape)
        if name == "max_added_loss":
            chosen = fit.within_loss(bound)
        elif name == "max_params":
            chosen = fit.within_bytes(FLOAT_BYTES * bound, [32])
        else:
            chosen = fit.within_bytes(bound, [32, *compress.bits])
    if chosen is None:
        enough = {"max_params": sum(shape), "max_bytes": FLOAT_BYTES * sum(shape)}
        hint = f" to {enough[name]} or more" if name in enough else ""
        raise UserError(f"no table fits compress.{name} = {bound}: raise it{hint}")
    if jax.process_index() == 0:
        candidate, row = chosen.candidate, chosen.row()
        origin = dataclasses.asdict(candidate.recipe)
        original.write(folder / "advised", candidate.table, origin)
        trials = [trial.row() for trial in fit.trials]
        advice = {"bounds": bounds, "chosen": row, "trials": trials}
        write_json(folder / "advice.json", heading | advice)
        print(advice_text(row, str(folder / "advised")), flush=True)


def _methods(text: str) -> list[str]:
    """The names in `compress.methods`."""
    methods = words_of(text)
    if not methods or set(methods) - METHODS.keys():
        raise UserError(
            f"compress.methods is '{text}': name some of {', '.join(METHODS)}"
        )
    return methods


def _recipes(original: Original, methods: list[str]) -> list[Recipe]:
    """The recipes of the sweep, without ranks that are too high for the table."""
    settings, shape = original.settings, original.table_VD.shape
    ranks = [rank for rank in settings.ranks if rank <= min(shape)]
    if not ranks:
        raise UserError(
            f"ranks is {settings.ranks}: the table of {original.run.folder} is "
            f"{shape}, its rank is at most {min(shape)}"
        )
    if len(ranks) < len(settings.ranks) and jax.process_index() == 0:
        left_out = ", ".join(str(rank) for rank in settings.ranks if rank > min(shape))
        print(
            f"left out: rank {left_out}, the table's is at most {min(shape)}",
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
            f"compress.recover_ranks holds {min(lacking)}, which ranks does not: only "
            "the best table of a rank that was tried can be trained further"
        )
    result = read_result(run.folder)
    if result is None or result["steps"] != run.step:
        raise UserError(
            f"compress.recover_ranks is set, but {settings.model_path} is not "
            "the end of a finished run: D is trained further only from there"
        )
    if run.record.get("corpus_sha256") != original.corpus.fingerprint():
        raise UserError(
            f"compress.recover_ranks is set, but {run.folder} was trained on another "
            f"corpus than {original.corpus.name}: leave data.source out"
        )


def _check_folder(folder: Path, protocol: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError if the folder holds the sweep of another model or corpus."""
    own, there = strict(protocol), _read_sweep(folder).get("protocol")
    names = ("checkpoint", "corpus_sha256", "split", "window")
    differing = [name for name in names if there and there.get(name) != own[name]]
    if differing and not overwrite:
        raise UserError(
            f"{folder} holds the sweep of another model or corpus "
            f"({', '.join(differing)} differ): use another --config.workdir, or "
            "--config.overwrite=True to replace it"
        )


def _protocol(original: Original) -> dict[str, Any]:
    """Everything besides a recipe that decides the numbers of a row."""
    model, settings = original.model.config, original.settings
    protocol = {
        "checkpoint": original.run.fingerprint,
        "table": original.table_VD.shape,
        "corpus_sha256": original.corpus.fingerprint(),
        "split": "val",
        "window": model.block_size,
        "stride": model.block_size,
        "corpus": original.corpus.name,
        "tokenizer": original.corpus.tokenizer,
        "calibration_tokens": settings.compress.calibration_tokens,
        "compute_dtype": model.compute_dtype,
        "singular_value_split": settings.factorize.singular_value_split,
    }
    if original.batches.is_cut:  # Absent if all tokens count, as in older files.
        protocol["evaluated_tokens"] = original.batches.target_count
    return protocol


def _read_sweep(folder: Path) -> dict[str, Any]:
    """An earlier sweep.json; {} without one."""
    return read_json(folder / "sweep.json", "delete it to measure again") or {}


def _write_sweep(
    folder: Path, heading: dict, tried: list[Recipe], known: dict[Recipe, Row]
) -> dict[str, Any]:
    """Writes sweep.json with predictions; returns its content.

    other_rows: rows of earlier commands that are not in `tried`; rows_left: number of
    rows still to measure, absent at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [known[recipe] for recipe in tried if recipe in known]
    _predict(rows)
    others = [row for recipe, row in known.items() if recipe not in tried]
    sweep = {**heading, "rows": rows, "other_rows": others}
    if len(rows) < len(tried):
        sweep["rows_left"] = len(tried) - len(rows)
    write_json(folder / "sweep.json", sweep)
    return sweep


def _predict(rows: list[Row]) -> None:
    """Fills in `predicted_loss` and `is_anchor` of every row.

    Anchors are the smallest and the largest table of each method, both in a single band
    and in the fewest bands. The other rows are predicted from them.
    """

    def second_order(row: Row) -> SecondOrder:
        return SecondOrder(row["second_order_head"], row["second_order_input"])

    kinds: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        row["is_anchor"] = False
        # Smaller losses are mostly rounding and predict nothing.
        if row["bits"] == 32 and row["added_loss"] >= SMALLEST_ADDED:
            kinds.setdefault((row["method"], row["bands"] > 1), []).append(row)
    for kind in kinds.values():
        fewest = min(row["bands"] for row in kind)
        kind = [row for row in kind if row["bands"] == fewest]
        for choose in (min, max):
            choose(kind, key=lambda row: row["budget"])["is_anchor"] = True
    regression = LossRegression(
        (row["method"], second_order(row), row["added_loss"])
        for row in rows
        if row["is_anchor"]
    )
    for row in rows:
        row["predicted_loss"] = regression(row["method"], second_order(row))
