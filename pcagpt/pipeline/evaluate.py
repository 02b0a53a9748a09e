"""The task 'evaluate': the loss of any run on any split of a corpus that fits it."""

import re

import jax

from pcagpt.config import Settings
from pcagpt.files import write_json
from pcagpt.run import provenance
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.trained import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress


def evaluate(settings: Settings) -> dict:
    """Evaluates `model_path` on `split`; writes the result into the run's folder.

    With `evaluate.max_tokens`, it uses only the first tokens of the split, and the name
    of the file says so.

    The corpus is the one that the run was trained on, unless `data.source` names
    another.

    Raises:
      UserError: the run does not exist, or the corpus or a `model` knob does not fit
        it.
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
        write_json(run.folder / name, result)
    return result
