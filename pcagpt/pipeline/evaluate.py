"""The task 'evaluate': the loss of any run on any split of a corpus that fits it."""

import re

import jax

from pcagpt.config import Settings
from pcagpt.files import keep, write_json
from pcagpt.run import provenance
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.trained import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress


def evaluate(settings: Settings) -> dict:
    """Evaluates `model_path` on `split`; writes the result beside the run if it can.

    `evaluate.max_tokens` cuts the split; the file then has another name.

    The corpus is the run's own unless `data.source` names another.

    Raises:
      UserError: no such run, a corpus that does not fit it, or a `model` knob that
        contradicts it.
    """
    run = Run.open(settings.model_path)
    run.check_model(settings.model)
    corpus = run.corpus(settings.data, settings.cache_dir)
    mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    model, variables = run.load(settings.model, mesh)
    evaluator = Evaluator(
        model,
        mesh,
        corpus,
        settings.split,
        settings.evaluate.batch_size,
        settings.train.loss_chunks,
        settings.evaluate.max_tokens,
    )
    label = f"{run.folder.name} on {settings.split}"
    with Progress(label, len(evaluator.batches)) as progress:
        measured = evaluator(variables, progress)
    result = {
        "run": run.folder.name,
        "step": run.step,
        **measured.metrics,
        **provenance.summary(mesh.size),
        "protocol": evaluator.protocol,
    }
    if jax.process_index() == 0:
        corpus_name = re.sub(r"[^\w.-]+", "_", corpus.name)
        tokens = settings.evaluate.max_tokens
        part = f"{settings.split}_first{tokens}" if tokens else settings.split
        name = f"evaluation_{corpus_name}_{part}_step{run.step}.json"
        # The folder of a shared model may be read-only.
        keep(run.folder / name, lambda path: write_json(path, result))
    return result
