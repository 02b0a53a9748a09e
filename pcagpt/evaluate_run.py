"""Evaluates any trained run on any split of any corpus its tokens fit."""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pcagpt import checkpoint, evaluate, provenance, run_folder, sharding
from pcagpt.config import KNOBS, model_settings
from pcagpt.corpus import open_corpus, text_counts
from pcagpt.data import EvaluationBatches
from pcagpt.errors import UserError
from pcagpt.model import GPT, GPTConfig
from pcagpt.telemetry import Progress
from pcagpt.tokenizer import tokenizer_sha256

# Knobs of the model that are about the device, and change no more than rounding.
DEVICE_CHOICES = ("compute_dtype", "attention")


def evaluate_run(config: ConfigDict) -> dict:
    """Loss of `config.model_path` on `config.split`; written beside the run, returned.

    The corpus is the run's own unless `config.data.source` names another.

    Raises:
      UserError: no such run, a corpus whose ids the model lacks, or a `model` knob that
        contradicts the run.
    """
    run_dir, step = checkpoint.find(config.model_path)
    trained = run_folder.read_config(run_dir)
    if trained is None:
        raise UserError(f"{run_dir} has no config.json: it is not a run's folder")
    trained = ConfigDict(trained)
    data = config.data if config.data.source else trained.data
    folder = Path(config.data.cache_dir or Path(config.workdir) / "data")
    corpus = open_corpus(data.source, folder, data.tokenizer)
    if corpus.vocab_size > trained.vocab_size:
        raise UserError(
            f"{corpus.name} has token ids up to {corpus.vocab_size - 1}, the model of "
            f"{run_dir} {trained.vocab_size} tokens: give the corpus it was trained on"
        )
    known = trained.get("tokenizer")
    if known and corpus.tokenizer and known != corpus.tokenizer:
        raise UserError(
            f"{corpus.name} is in tokens of {corpus.tokenizer}, the model of {run_dir} "
            f"knows those of {known}: set --config.data.tokenizer={known}"
        )
    _check_model(run_dir, trained.model, config.model)
    for name in DEVICE_CHOICES:  # Of this device, not of the one it was trained on.
        trained.model[name] = config.model[name]
    settings = model_settings(
        trained.model, trained.vocab_size, jax.devices()[0].platform
    )
    settings["band_sizes"] = tuple(settings["band_sizes"])
    model = GPT(GPTConfig(**settings))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_divisible("evaluate.batch_size", config.evaluate.batch_size, mesh)
    batches = EvaluationBatches(
        corpus.tokens(config.split),
        model.config.block_size,
        config.evaluate.batch_size,
    )
    params, constants, _ = checkpoint.load_weights(config.model_path)
    variables = {"params": params, "constants": constants}
    variables = jax.device_put(variables, sharding.shardings(variables, mesh))
    with Progress(f"{run_dir.name} on {config.split}", len(batches)) as progress:
        measured = evaluate.evaluate(
            evaluate.scorer(model, mesh, config.train.loss_chunks),
            variables,
            _shown(batches, progress),
            batches.window_count,
            sharding.batch_sharding(mesh),
            evaluate.TextSize.of(text_counts(corpus, config.split)),
        )
    tokenizer = corpus.tokenizer
    result = {
        "run": run_dir.name,
        "step": step,
        **measured.metrics,
        "device": provenance.device(mesh.size),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "protocol": {
            "split": config.split,
            "window": model.config.block_size,
            "stride": model.config.block_size,
            "windows": batches.window_count,
            "corpus": corpus.name,
            "tokenizer": tokenizer,
            "tokenizer_sha256": tokenizer and tokenizer_sha256(tokenizer),
        },
    }
    if jax.process_index() == 0:
        corpus_name = re.sub(r"[^\w.-]+", "_", corpus.name)
        name = f"evaluation_{corpus_name}_{config.split}_step{step}.json"
        run_folder.write_json(run_dir / name, result)
    return result


def _check_model(run_dir: Path, trained: ConfigDict, asked: ConfigDict) -> None:
    """Raises UserError for a knob that was set and contradicts the run's own model."""
    for name, value in asked.items():
        if name in DEVICE_CHOICES or value == KNOBS[f"model.{name}"].default:
            continue
        known = tuple(trained[name]) if isinstance(value, tuple) else trained[name]
        if value != known:
            raise UserError(
                f"model.{name} is {value}, but {run_dir} was trained with {known}: "
                "leave it out, a run keeps its model"
            )


def _shown(batches: EvaluationBatches, progress: Progress) -> Iterator:
    for number, batch in enumerate(batches):
        progress.update(number)
        yield batch
    progress.update(len(batches))
