"""The task 'evaluate': the loss of any run on any split of a corpus that fits it."""

import re
from pathlib import Path
from typing import Any

import jax

from pcagpt.config import Settings
from pcagpt.errors import UserError, warn_once
from pcagpt.files import check_fields, read_json, write_json
from pcagpt.run import provenance
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.trained import Run
from pcagpt.sharding import placement
from pcagpt.telemetry.progress import Progress


def evaluate(settings: Settings) -> dict:
    """Evaluates `model_path` on `split`; returns the result and writes it.

    The corpus is the one that the run was trained on, unless `data.source` names
    another. With `evaluate.max_tokens`, only the first tokens of the split count, and
    the name of the file says so.

    The file is in the run's folder; for a model of another program, in the workdir. If
    it cannot be written, a warning says so.

    Raises:
      UserError: the run does not exist, or the corpus or a `model` knob does not fit
        it.
    """
    run = Run.asked(settings)
    corpus = run.corpus(settings.data, settings.cache_dir, [settings.split])
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
    is_own = run.is_own(corpus, [settings.split])
    label = f"{run.folder.name} on {settings.split}"
    with Progress(label, len(evaluator.batches)) as progress:
        measured = evaluator(variables, progress)
    result = {
        "run": run.folder.name,
        "step": run.step,
        "fingerprint": run.fingerprint,
        **measured.metrics,
        **provenance.summary(mesh.size),
        "is_own_corpus": is_own,
        "protocol": evaluator.protocol,
    }
    if jax.process_index() == 0:
        part = settings.split
        if evaluator.batches.is_cut:
            part += f"_first{settings.evaluate.max_tokens}"
        try:
            run.check_unchanged()
            corpus.check_unchanged()
        except (UserError, OSError) as error:
            warn_once(f"the result is not written: {error}")
            return result
        folder = run.results_in(settings.workdir)
        path = _path(folder, part, run.step, evaluator.protocol)
        # The folder of a shared model may be read-only.
        run.keep_result(path, lambda place: write_json(place, result))
    return result


def _path(folder: Path, part: str, step: int, protocol: dict[str, Any]) -> Path:
    """The file of a result.

    Two corpora of the same name but other content have two files.
    """
    name = re.sub(r"[^\w.-]+", "_", protocol["corpus"])
    plain = folder / f"evaluation_{name}_{part}_step{step}.json"
    try:
        earlier = read_json(plain, "delete it")
        if earlier is not None:
            check_fields(earlier, {"protocol": (dict, None)}, plain, "delete it")
    except UserError:  # It is damaged, and a new one can replace it.
        earlier = None
    hashes = ("tokens_sha256", "tokenizer_sha256")
    is_same = earlier is None or all(
        (earlier.get("protocol") or {}).get(key) == protocol[key] for key in hashes
    )
    if is_same:
        return plain
    return plain.with_stem(f"{plain.stem}_{protocol['tokens_sha256'][:8]}")
