"""The task 'evaluate': the loss of any run on any split of a corpus that fits it."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import jax

from pcagpt.config import Settings
from pcagpt.errors import UserError, warn_once
from pcagpt.files import file_name
from pcagpt.json_files import check_fields, read_json, write_json
from pcagpt.run import provenance
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.folder import move_aside
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
    # Another one rounds in another way.
    protocol = evaluator.protocol | {"compute_dtype": model.config.compute_dtype}
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
        "protocol": protocol,
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
        path = _path(folder, part, run.step, protocol)
        # The folder of a shared model may be read-only.
        if run.keep_result(path, lambda place: _write(place, result)):
            # The result is on stdout, alone.
            print(f"written to {path}", file=sys.stderr, flush=True)
    return result


def _path(folder: Path, part: str, step: int, protocol: dict[str, Any]) -> Path:
    """The file of a result.

    Two corpora of the same name but other content have two files, as have two compute
    dtypes. Results of older versions do not say theirs.
    """
    name = re.sub(r"[^\w.-]+", "_", protocol["corpus"])
    plain = folder / file_name(f"evaluation_{name}", f"_{part}_step{step}.json")
    if (earlier := _protocol_in(plain)) is None:
        return plain
    stem, dtype = plain.stem, protocol["compute_dtype"]
    hashes = ("tokens_sha256", "tokenizer_sha256")
    if any(earlier.get(key) != protocol[key] for key in hashes):
        stem += f"_{protocol['tokens_sha256'][:8]}"
    if earlier.get("compute_dtype", dtype) != dtype:
        stem += f"_{dtype}"
    return plain.with_stem(stem)


def _protocol_in(path: Path) -> dict[str, Any] | None:
    """The protocol of a result; None if the file has none, is damaged or missing."""
    try:
        result = read_json(path, "delete it") or {}
        check_fields(result, {"protocol": (dict, None)}, path, "delete it")
    except UserError:
        return None
    return result.get("protocol")


def _write(path: Path, result: dict[str, Any]) -> None:
    """Replaces an earlier result; another file there is moved aside."""
    if _protocol_in(path) is None:
        with contextlib.redirect_stdout(sys.stderr):  # The result is on stdout.
            move_aside(path)
    write_json(path, result)
