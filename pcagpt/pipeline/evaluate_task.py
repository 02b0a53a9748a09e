"""Evaluates any trained run on any split of any corpus its tokens fit."""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import open_corpus, text_counts
from pcagpt.data.tokenizer import tokenizer_sha256
from pcagpt.model import GPT
from pcagpt.run import evaluate, provenance
from pcagpt.run import folder as run_folder
from pcagpt.run.opened import DEVICE_CHOICES, TrainedRun
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Progress


def evaluate_run(config: ConfigDict) -> dict:
    """Loss of `config.model_path` on `config.split`; written beside the run, returned.

    The corpus is the run's own unless `config.data.source` names another.

    Raises:
      UserError: no such run, a corpus whose ids the model lacks, or a `model` knob that
        contradicts the run.
    """
    trained = TrainedRun.find(config.model_path)
    run_dir, step = trained.run_dir, trained.step
    data = config.data if config.data.source else ConfigDict(trained.record["data"])
    folder = Path(config.data.cache_dir or Path(config.workdir) / "data")
    corpus = open_corpus(data.source, folder, data.tokenizer)
    trained.check_corpus(corpus)
    trained.check_model(config.model, DEVICE_CHOICES)
    model = GPT(trained.config(config.model, placement.hardware()))
    mesh = placement.make_mesh(config.mesh.data, config.mesh.fsdp)
    placement.check_divisible("evaluate.batch_size", config.evaluate.batch_size, mesh)
    batches = EvaluationBatches(
        corpus.tokens(config.split),
        model.config.block_size,
        config.evaluate.batch_size,
    )
    variables = trained.variables(model.config)
    variables = jax.device_put(variables, placement.shardings(variables, mesh))
    with Progress(f"{run_dir.name} on {config.split}", len(batches)) as progress:
        measured = evaluate.evaluate(
            evaluate.scorer(model, mesh, config.train.loss_chunks),
            variables,
            _shown(batches, progress),
            batches.window_count,
            placement.batch_sharding(mesh),
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


def _shown(batches: EvaluationBatches, progress: Progress) -> Iterator:
    for number, batch in enumerate(batches):
        progress.update(number)
        yield batch
    progress.update(len(batches))
