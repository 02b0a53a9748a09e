"""The task 'compress': a trained model's table, smaller, without training.

Writes WORKDIR/compressed/: sweep.json with a row for each table tried, a report, and
the chosen tables as models that every other command takes.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pcagpt import (
    checkpoint,
    factor_files,
    factorize,
    provenance,
    run_folder,
    sharding,
    statistics,
)
from pcagpt.config import model_settings
from pcagpt.corpus import Corpus, fingerprint, open_corpus
from pcagpt.data import EvaluationBatches, TrainingBatches
from pcagpt.errors import UserError
from pcagpt.model import GPT, GPTConfig
from pcagpt.report import write_sweep_report
from pcagpt.search import Calibration, Candidate, Compressor, Recipe, recipes
from pcagpt.table_swap import SwapScores, TableSwap, frequency_deciles
from pcagpt.telemetry import Progress

FOLDER = "compressed"
CALIBRATION_SEED = 0
# Of the tables tried, every so many'th is measured on training text, too, to calibrate
# the predictions of all.
CALIBRATE_EVERY = 4
CALIBRATION_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model whose table is compressed, ready to run.

    run_dir, step: where it comes from; config: of its run; table_VD: [V, D] float32
    without padding rows; params: nested dict of host arrays.
    """

    run_dir: Path
    step: int
    config: ConfigDict
    corpus: Corpus
    model: GPT
    params: dict
    table_VD: np.ndarray


def compress(config: ConfigDict, command: str) -> None:
    """Sweeps, or finds the one table that keeps the bounds of `config.compress`.

    Raises:
      UserError: no such run, its table is not a full one, a method there is not, or a
        bound that no table keeps.
    """
    methods = _methods(config.compress.methods)
    subject = _subject(config)
    width = subject.table_VD.shape[1]
    ranks = [rank for rank in config.ranks if rank <= width]
    if not ranks:
        raise UserError(
            f"ranks is {config.ranks}: the table of {subject.run_dir} has width {width}"
        )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    for name in ("train.batch_size", "evaluate.batch_size"):
        section, knob = name.split(".")
        sharding.check_divisible(name, config[section][knob], mesh)
    variables = jax.device_put(
        {"params": subject.params},
        sharding.shardings({"params": subject.params}, mesh),
    )
    found = _statistics(config, subject, variables, mesh)
    swap = TableSwap(
        subject.model,
        variables,
        frequency_deciles(found.frequency),
        mesh,
        config.train.loss_chunks,
    )
    compressor = Compressor(
        subject.table_VD, found, config.factorize.singular_value_split
    )
    folder = Path(config.workdir) / FOLDER
    tried = list(
        recipes(
            *subject.table_VD.shape,
            methods,
            ranks,
            config.compress.bands,
            config.compress.bits,
        )
    )
    sweep = {
        "command": command,
        "run": str(subject.run_dir),
        "step": subject.step,
        "device": provenance.device(mesh.size),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "protocol": _protocol(config, subject),
    }
    path = folder / "sweep.json"
    known = _known_rows(path, sweep["protocol"])
    with Progress(f"compressing {subject.run_dir.name}", len(tried)) as progress:
        for number, recipe in enumerate(tried):
            progress.update(number)
            if recipe not in known:
                candidate = compressor(recipe)
                scores = swap(candidate.dense, _validation(config, subject))
                row = _row(candidate, scores)
                if number % CALIBRATE_EVERY == 0:
                    windows = _calibration_windows(config, subject)
                    row["calibration_added_loss"] = swap(
                        candidate.dense, windows
                    ).added_loss
                known[recipe] = row
                if jax.process_index() == 0:
                    _write_sweep(path, sweep, list(known.values()))
        progress.update(len(tried))
    rows = [known[recipe] for recipe in tried]
    _predict(rows)
    if jax.process_index() == 0:
        sweep = _write_sweep(path, sweep, rows)
        for rank in ranks:
            of_rank = [r for r in tried if r.rank == rank and r.bits == 32]
            best = min(of_rank, key=lambda recipe: known[recipe]["added_loss"])
            write_model(folder / f"best_k{rank}", subject, compressor(best))
        page = write_sweep_report(folder, sweep)
        print(f"report: {page}", flush=True)


def _known_rows(path: Path, protocol: dict[str, Any]) -> dict[Recipe, dict[str, Any]]:
    """What an earlier command measured under the same protocol."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text("utf-8"))
    if earlier.get("protocol") != run_folder.strict(protocol):
        return {}
    names = {field.name for field in dataclasses.fields(Recipe)}
    return {
        Recipe(**{name: row[name] for name in names}): row for row in earlier["rows"]
    }


def _write_sweep(path: Path, sweep: dict, rows: list[dict]) -> dict:
    """Writes sweep.json, whole after every row: what is measured is never lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep = {**sweep, "rows": rows}
    run_folder.write_json(path, sweep)
    return sweep


def _predict(rows: list[dict[str, Any]]) -> None:
    """Fills in `predicted_loss`, calibrated on the rows measured on training text."""

    def second_order(row):
        return factorize.SecondOrder(
            row["second_order_head"], row["second_order_input"]
        )

    calibration = Calibration(
        [
            (second_order(row), row["calibration_added_loss"])
            for row in rows
            if row["calibration_added_loss"] is not None
        ]
    )
    for row in rows:
        row["predicted_loss"] = calibration(second_order(row))


def _methods(text: str) -> list[str]:
    methods = [word.strip() for word in text.split(",") if word.strip()]
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


def _subject(config: ConfigDict) -> Subject:
    """The model of `config.model_path` with its corpus."""
    run_dir, step = checkpoint.find(config.model_path)
    record = run_folder.read_config(run_dir)
    if record is None:
        raise UserError(f"{run_dir} has no config.json: it is not a run's folder")
    trained = ConfigDict(record)
    params, _, step = checkpoint.load_weights(config.model_path)
    if len(params["embed"]) > 1 or "scale_up" in params["embed"]["band_0"]:
        raise UserError(
            f"{run_dir} has a factorized embedding already: compress a baseline, such "
            "as checkpoints/gpt_baseline"
        )
    data = config.data if config.data.source else trained.data
    cache = Path(config.data.cache_dir or Path(config.workdir) / "data")
    corpus = open_corpus(data.source, cache, data.tokenizer)
    for name in ("compute_dtype", "attention"):
        trained.model[name] = config.model[name]
    settings = model_settings(
        trained.model, trained.vocab_size, jax.devices()[0].platform
    )
    settings["band_sizes"] = ()
    model = GPT(GPTConfig(**settings))
    table_VD = np.asarray(params["embed"]["band_0"]["wte"], np.float32)
    return Subject(
        run_dir, step, trained, corpus, model, params, table_VD[: trained.vocab_size]
    )


def _statistics(config, subject: Subject, variables, mesh) -> factorize.Statistics:
    """Measured, or read from beside the run where they are there already."""
    block_size = subject.model.config.block_size
    batch_size = config.train.batch_size
    batches = TrainingBatches(
        subject.corpus.tokens("train"), block_size, batch_size, CALIBRATION_SEED
    )
    needed = -(-config.compress.calibration_tokens // (batch_size * block_size))
    protocol = {
        "checkpoint": checkpoint.fingerprint(
            subject.run_dir / "ckpt" / str(subject.step)
        ),
        "corpus": fingerprint(subject.corpus),
        "split": "train",
        "tokens": needed * batch_size * block_size,
        "window": block_size,
        "batch_size": batch_size,
        "seed": CALIBRATION_SEED,
    }
    path = subject.run_dir / f"statistics_step{subject.step}.npz"
    known = statistics.read(path, protocol)
    if known is not None:
        return known

    with Progress(f"calibrating on {subject.corpus.name}", needed) as progress:

        def shown() -> Iterator[np.ndarray]:
            for step in range(needed):
                progress.update(step)
                yield batches.batch_at(step)[:, :-1]
            progress.update(needed)

        found = statistics.collect(
            subject.model,
            variables,
            statistics.token_frequency(
                subject.corpus.tokens("train"), len(subject.table_VD)
            ),
            shown(),
            mesh,
            config.train.loss_chunks,
        )
    if jax.process_index() == 0:
        statistics.write(path, found, protocol)
    return found


def _validation(config: ConfigDict, subject: Subject) -> EvaluationBatches:
    return EvaluationBatches(
        subject.corpus.tokens("val"),
        subject.model.config.block_size,
        config.evaluate.batch_size,
    )


def _calibration_windows(config: ConfigDict, subject: Subject) -> EvaluationBatches:
    """The end of the training split: where the calibration text seldom reaches."""
    block_size = subject.model.config.block_size
    tokens = subject.corpus.tokens("train")[-CALIBRATION_WINDOWS * block_size - 1 :]
    return EvaluationBatches(tokens, block_size, config.evaluate.batch_size)


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
        "calibration_added_loss": None,
        "second_order_head": candidate.second_order.head,
        "second_order_input": candidate.second_order.input,
        **measured,
        "seconds": candidate.seconds,
    }


def _protocol(config: ConfigDict, subject: Subject) -> dict[str, Any]:
    block_size = subject.model.config.block_size
    return {
        "checkpoint": checkpoint.fingerprint(
            subject.run_dir / checkpoint.FOLDER / str(subject.step)
        ),
        "table": subject.table_VD.shape,
        "corpus_sha256": fingerprint(subject.corpus),
        "split": "val",
        "window": block_size,
        "stride": block_size,
        "corpus": subject.corpus.name,
        "tokenizer": subject.corpus.tokenizer,
        "calibration_tokens": config.compress.calibration_tokens,
    }


def write_model(folder: Path, subject: Subject, candidate: Candidate) -> None:
    """A candidate as a model: config.json, ckpt/0, and its factor files."""
    table, params = candidate.table, dict(subject.params)
    padding = subject.model.config.padded_vocab_size - len(subject.table_VD)
    embed, start = {}, 0
    for number, part in enumerate(table.tables):
        is_last = number == len(table.tables) - 1
        low_rank = isinstance(part, factorize.LowRank)
        rows = part.wte if low_rank else part
        leaves = {"wte": np.pad(rows, ((0, padding if is_last else 0), (0, 0)))}
        if low_rank:
            leaves["scale_up"] = part.scale
        embed[f"band_{number}"] = {
            name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()
        }
        start += len(rows)
    params["embed"] = embed
    if table.mean is not None:
        params["wpe"] = (params["wpe"] + table.mean).astype(np.float32)
    constants, model = {}, {"n_embd_wte": table.ranks[0] or None}
    if len(table.tables) > 1:
        position_V = np.empty(len(table.order), np.int32)
        position_V[table.order] = np.arange(len(table.order), dtype=np.int32)
        constants = {"embed": {"position_of_token": position_V}}
        model = {
            "n_embd_wte": None,
            "band_sizes": table.sizes,
            "band_ranks": table.ranks,
        }
    record = subject.config.to_dict()
    record["model"] = {**record["model"], **model, "n_embd_wte_scale_tying": True}
    record["compressed"] = {
        "source": str(subject.run_dir),
        "step": subject.step,
        **dataclasses.asdict(candidate.recipe),
    }
    checkpoint.save_weights(folder, {"params": params, "constants": constants})
    factor_files.write_bands(folder / "factors", table)
    run_folder.write_config(folder, record)
