"""The task 'compress': a trained model's table, smaller, without training.

Writes WORKDIR/compressed/: sweep.json with a row for each table tried, a report, and
the chosen tables as models that every other command takes.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pcagpt import factorize
from pcagpt.compress.candidates import (
    FLOAT_BYTES,
    Advisor,
    Calibration,
    Candidate,
    Compressor,
    Recipe,
    anchors,
    recipes,
)
from pcagpt.compress.score import SwapScores, TableSwap, frequency_deciles
from pcagpt.compress.subject import Subject
from pcagpt.config import Settings, words_of
from pcagpt.config.schema import COMPRESS_BOUNDS
from pcagpt.errors import UserError
from pcagpt.factorize import SecondOrder
from pcagpt.files import strict, write_json
from pcagpt.report import SMALLEST_ADDED, advice_text, pareto_figure, write_sweep_report
from pcagpt.run import folder as run_folder
from pcagpt.run import provenance
from pcagpt.run.opened import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress
from pcagpt.telemetry.record import Telemetry

FOLDER = "compressed"


def folder_of(config: Settings) -> Path:
    """Where everything goes."""
    return Path(config.workdir) / FOLDER


def compress(config: Settings, command: str) -> None:
    """Sweeps, or finds the one table that keeps a bound of `config.compress`.

    Raises:
      UserError: no such run, its table is not a full one, there is no such method, or
        no table keeps the bound.
    """
    methods = _methods(config.compress.methods)
    run = Run.open(config.model_path)
    run.check_model(config.model)
    subject = Subject.of(run, config)
    ranks = _ranks(config, subject)
    lacking = set(config.compress.recover_ranks) - set(ranks)
    if lacking:
        raise UserError(
            f"compress.recover_ranks holds {min(lacking)}, which ranks does not: what "
            "is trained on is the best table of a rank that was tried"
        )
    if config.compress.recover_ranks:
        _check_recoverable(config, subject)
    chunks, evaluated = config.train.loss_chunks, config.evaluate.batch_size
    known = subject.statistics()
    deciles = frequency_deciles(known.frequency)
    swap = TableSwap(subject.model, subject.variables, deciles, subject.mesh, chunks)
    split = config.factorize.singular_value_split
    compressor = Compressor(subject.table_VD, known, split)

    def measure(candidate: Candidate) -> SwapScores:
        return swap(candidate.dense, subject.validation(evaluated))

    heading = {
        "command": command,
        "run": str(subject.run.folder),
        "step": subject.run.step,
        "device": provenance.device(subject.mesh.size),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "protocol": _protocol(config, subject),
    }
    folder = folder_of(config)
    _check_folder(folder, heading["protocol"], config.overwrite)
    if _bounds(config):
        _advise(config, subject, compressor, measure, methods[-1], folder, heading)
    else:
        tried = list(
            recipes(
                *subject.table_VD.shape,
                methods,
                ranks,
                config.compress.bands,
                config.compress.bits,
            )
        )
        _sweep(subject, compressor, measure, tried, folder, heading, config)
    placement.wait_for_all(str(folder))


def _check_folder(folder: Path, protocol: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError if the folder holds the sweep of another model or corpus."""
    earlier = _read_sweep(folder / "sweep.json")
    own, there = strict(protocol), (earlier or {}).get("protocol")
    names = ("checkpoint", "corpus_sha256", "split", "window")
    differing = [name for name in names if there and there.get(name) != own[name]]
    if differing and not overwrite:
        raise UserError(
            f"{folder} holds the sweep of another model or corpus "
            f"({', '.join(differing)} differ): use another --config.workdir, or "
            "--config.overwrite=True to replace it"
        )


def _check_recoverable(config: Settings, subject: Subject) -> None:
    """Raises UserError if what would be trained on could not be held against D."""
    run_dir = subject.run.folder
    result = run_folder.read_result(run_dir)
    if result is None or result["steps"] != subject.run.step:
        raise UserError(
            f"compress.recover_ranks is set, and {config.model_path} is not the end of "
            "a finished run: D is trained on and compared from there only"
        )
    if subject.run.record.get("corpus_sha256") != subject.corpus.fingerprint():
        raise UserError(
            f"compress.recover_ranks is set, and {run_dir} was trained on another "
            f"corpus than {subject.corpus.name}: leave data.source out"
        )


def add_recovered(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Enters what training on won back into sweep.json; its report, written anew."""
    sweep = strict(_read_sweep(folder / "sweep.json") | {"recovered": rows})
    write_json(folder / "sweep.json", sweep)
    return write_sweep_report(folder, sweep)


def _sweep(
    subject: Subject,
    compressor: Compressor,
    measure: Callable[[Candidate], SwapScores],
    tried: list[Recipe],
    folder: Path,
    heading: dict[str, Any],
    config: Settings,
) -> None:
    """Measures every recipe; writes the rows, the report and each rank's best model."""
    path, writes = folder / "sweep.json", jax.process_index() == 0
    if all(recipe.method == "baseline" for recipe in tried):
        raise UserError(
            "ranks are too small for compress.bands: no table fits; raise the ranks, "
            "or try fewer bands"
        )
    known = _known_rows(path, heading["protocol"])
    if known and (trained_on := _read_sweep(path).get("recovered")):
        heading = {**heading, "recovered": trained_on}
    with Progress(f"compressing {subject.run.folder.name}", len(tried)) as progress:
        for recipe in progress.track(tried):
            if recipe not in known:
                candidate = compressor(recipe)
                known[recipe] = _row(candidate, measure(candidate))
                if writes:
                    _write_sweep(path, heading, list(known.values()))
    rows = [known[recipe] for recipe in tried]
    _predict(tried, rows)
    if not writes:
        return
    others = [row for recipe, row in known.items() if recipe not in tried]
    sweep = _write_sweep(path, heading, rows, others)
    for rank in sorted({recipe.rank for recipe in tried} - {0}):
        of_rank = [r for r in tried if r.rank == rank and r.bits == 32]
        best = min(of_rank, key=lambda recipe: known[recipe]["added_loss"])
        made = compressor(best)
        subject.write(folder / f"best_k{rank}", made.table, dataclasses.asdict(best))
    with Telemetry(
        folder,
        tensorboard=config.telemetry.tensorboard,
    ) as telemetry:
        telemetry.figure("pareto", pareto_figure(sweep))
    print(f"report: {write_sweep_report(folder, sweep)}", flush=True)


def _advise(
    config: Settings,
    subject: Subject,
    compressor: Compressor,
    measure: Callable[[Candidate], SwapScores],
    method: str,
    folder: Path,
    heading: dict[str, Any],
) -> None:
    """Finds the table that keeps the bound, says so, and writes its model."""
    vocab_size, width = subject.table_VD.shape
    whole, least = vocab_size * width, 4 * (vocab_size + width)
    scores: dict[Recipe, SwapScores] = {}

    def added_loss(candidate: Candidate) -> float:
        scores[candidate.recipe] = measure(candidate)
        progress.update(len(scores))
        return scores[candidate.recipe].added_loss

    advisor = Advisor(compressor, added_loss, method, config.compress.bands)
    bounds, label = config.compress, f"advising on {subject.run.folder.name}"
    with Progress(label, Advisor.TRIALS) as progress:
        if bounds.max_added_loss:
            chosen = advisor.smallest(bounds.max_added_loss, least, whole)
        else:
            budgets = _budgets(bounds, vocab_size, width)
            if max((budget for budget, _ in budgets), default=0) < least:
                asked, enough = "max_params", f"{least} numbers"
                if bounds.max_bytes:
                    asked, enough = "max_bytes", f"{FLOAT_BYTES * least} bytes"
                raise UserError(
                    f"compress.{asked} is too small for {vocab_size} tokens: {enough} "
                    "are enough"
                )
            chosen = advisor.best(budgets, bounds.max_bytes)
    if chosen is None:
        ((name, bound),) = _bounds(config).items()
        raise UserError(f"no table keeps compress.{name} = {bound}: raise it")
    rows = [
        _row(trial.candidate, scores[trial.candidate.recipe])
        | {"predicted_loss": trial.predicted}
        for trial in advisor.trials
    ]
    row = rows[advisor.trials.index(chosen)]
    advice = {**heading, "bounds": dict(_bounds(config)), "chosen": row, "trials": rows}
    if jax.process_index() == 0:
        origin = dataclasses.asdict(chosen.candidate.recipe)
        subject.write(folder / "advised", chosen.candidate.as_bands, origin)
        write_json(folder / "advice.json", advice)
        print(advice_text(row, str(folder / "advised")), flush=True)


def _budgets(bounds, vocab_size: int, width: int) -> list[tuple[int, int]]:
    """(numbers, bits) that keep a bound on numbers or bytes."""
    if bounds.max_params:
        return [(min(bounds.max_params, vocab_size * width), 32)]
    order = FLOAT_BYTES * vocab_size
    found = [(bounds.max_bytes // FLOAT_BYTES, 32)]
    # Besides its codes a table stores scales, about a twentieth more; the order of the
    # tokens counts as numbers, too.
    for bits in bounds.bits:
        codes = max(bounds.max_bytes - order, 0) / 1.3
        found.append((int(codes * 8 / bits) + vocab_size, bits))
    return [(min(budget, vocab_size * width), bits) for budget, bits in found]


def _bounds(config: Settings) -> dict[str, float]:
    """The bounds that are set, of which there is one at most."""
    bounds = config.compress
    found = {name: getattr(bounds, name) for name in COMPRESS_BOUNDS}
    return {name: bound for name, bound in found.items() if bound}


def _ranks(config: Settings, subject: Subject) -> list[int]:
    """The ranks that the table can have."""
    most = min(subject.table_VD.shape)
    ranks = [rank for rank in config.ranks if rank <= most]
    if ranks and len(ranks) < len(config.ranks) and jax.process_index() == 0:
        left_out = ", ".join(str(rank) for rank in config.ranks if rank > most)
        print(f"left out: rank {left_out}, the table's is at most {most}", flush=True)
    if not ranks:
        raise UserError(
            f"ranks is {config.ranks}: the table of {subject.run.folder} is "
            f"{subject.table_VD.shape}, its rank is at most {most}"
        )
    return ranks


def _read_sweep(path: Path) -> dict[str, Any] | None:
    """An earlier sweep.json, if there is one."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, to measure anew") from None


def _known_rows(path: Path, protocol: dict[str, Any]) -> dict[Recipe, dict[str, Any]]:
    """What an earlier command measured under the same protocol."""
    earlier = _read_sweep(path)
    if earlier is None or earlier.get("protocol") != strict(protocol):
        return {}
    names = {field.name for field in dataclasses.fields(Recipe)}
    rows = [*earlier["rows"], *earlier.get("other_rows", ())]
    return {Recipe(**{name: row[name] for name in names}): row for row in rows}


def _write_sweep(
    path: Path, heading: dict, rows: list[dict], others: list[dict] | None = None
) -> dict:
    """Writes sweep.json, whole after every row: what is measured is never lost.

    `others` were measured by earlier commands, and are not in the report of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep = {**heading, "rows": rows, "other_rows": others or []}
    write_json(path, sweep)
    return sweep


def _predict(tried: list[Recipe], rows: list[dict[str, Any]]) -> None:
    """Fills in `predicted_loss` of every row, and which rows it is calibrated on."""

    def second_order(row):
        return SecondOrder(row["second_order_head"], row["second_order_input"])

    chosen = anchors(
        [
            recipe
            for recipe, row in zip(tried, rows, strict=True)
            if row["added_loss"] >= SMALLEST_ADDED
        ]
    )
    for recipe, row in zip(tried, rows, strict=True):
        row["is_anchor"] = recipe in chosen
    calibration = Calibration(
        [
            (row["method"], second_order(row), row["added_loss"])
            for row in rows
            if row["is_anchor"]
        ]
    )
    for row in rows:
        row["predicted_loss"] = calibration(row["method"], second_order(row))


def _methods(text: str) -> list[str]:
    methods = words_of(text)
    for method in methods:
        if method not in factorize.METHODS:
            raise UserError(
                f"compress.methods holds '{method}': it must be of "
                f"{', '.join(factorize.METHODS)}"
            )
    if not methods:
        raise UserError(
            "compress.methods is empty: name at least one, as in kl,context"
        )
    return methods


def _row(candidate: Candidate, scores: SwapScores) -> dict[str, Any]:
    recipe, table = candidate.recipe, candidate.table
    measured = scores._asdict()
    return {
        "method": recipe.method,
        "bands": recipe.bands,
        "rank": recipe.rank,
        "budget": recipe.budget,
        "bits": recipe.bits,
        "band_sizes": table.sizes if table else (len(candidate.dense),),
        "band_ranks": table.ranks if table else (0,),
        "params": candidate.parameters,
        "bytes": candidate.bytes,
        "added_loss": measured.pop("added_loss"),
        "predicted_loss": None,
        "is_anchor": False,
        "second_order_head": candidate.second_order.head,
        "second_order_input": candidate.second_order.input,
        **measured,
        "seconds": candidate.seconds,
    }


def _protocol(config: Settings, subject: Subject) -> dict[str, Any]:
    block_size = subject.model.config.block_size
    return {
        "checkpoint": subject.run.fingerprint,
        "table": subject.table_VD.shape,
        "corpus_sha256": subject.corpus.fingerprint(),
        "split": "val",
        "window": block_size,
        "stride": block_size,
        "corpus": subject.corpus.name,
        "tokenizer": subject.corpus.tokenizer,
        "calibration_tokens": config.compress.calibration_tokens,
        "compute_dtype": subject.model.config.compute_dtype,
        "singular_value_split": config.factorize.singular_value_split,
    }
