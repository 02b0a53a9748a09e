"""The task 'export': writes a run in a form that other programs read.

WORKDIR/exported/RUN_FORMAT/ has a Hugging Face folder (hf), or the factors as the files
of the original system (npz). It gets its name when it is complete.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.config import Settings, override
from pcagpt.data import hugging_face_tokenizer, vocabulary
from pcagpt.errors import UserError
from pcagpt.factorize import BandFactors, FactorizedTable, factor_files
from pcagpt.files import (
    check_digests,
    digests_of,
    read_json,
    strict,
    sync,
    write_json,
    write_npy,
    write_npz,
    write_text,
)
from pcagpt.model import FULL_TABLE, embedding_parameters, token_order
from pcagpt.pipeline.execute import check_workdir
from pcagpt.report.model_card import model_card
from pcagpt.run import hugging_face_files, lock
from pcagpt.run.dense import dense_weights
from pcagpt.run.folder import is_vacant, move_aside, read_result
from pcagpt.run.trained import Run
from pcagpt.sharding import processes

FOLDER = "exported"  # in a workdir
ORIGIN = "pcagpt.json"  # says what the folder was made from, with digests
HF = "hf"  # the form that has a model card


def export(settings: Settings) -> str:
    """Writes the run of `model_path` as `format`; returns a line that says where.

    A folder that already holds it stays as it is. If the run was evaluated since, the
    line says that the model card is older. All processes must call this.

    Raises:
      UserError: the run does not exist, cannot be written in this form, or something
        else is in the folder and `overwrite` is off.
    """
    check_workdir(settings.workdir)
    run = Run.asked(settings)
    name = f"{run.folder.resolve().name}_{settings.format}"
    folder = Path(settings.workdir) / FOLDER / name
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with lock.held(folder, meanwhile=lambda: None) as check_lock:
            return processes.from_first(
                lambda: _export(run, settings, folder, check_lock)
            )
    finally:
        # A refusal leaves no empty folder behind.
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _export(
    run: Run, settings: Settings, folder: Path, check_lock: Callable[[], None]
) -> str:
    """As `export`, in one process, which holds the lock of the folder."""
    losses = strict(_losses(run, settings.workdir)) if settings.format == HF else []
    origin = {
        "run": run.folder.resolve().name,
        "step": run.step,
        "fingerprint": run.fingerprint,
        "format": settings.format,
        "tokenizer_sha256": _tokenizer_sha256(run, settings),
        "losses": losses,
    }
    if held := _held(folder, origin):
        if held.get("losses", losses) == losses:
            return f"{folder} is done"
        if not settings.overwrite:
            return (
                f"{folder} is done, but its README.md shows other losses than "
                f"{run.folder} has now: --config.overwrite=True writes it anew"
            )
    if not is_vacant(folder) and not settings.overwrite:
        raise UserError(
            f"{folder} holds something else: use another --config.workdir, or "
            "--config.overwrite=True to move it aside"
        )
    # A killed command may have left it.
    written = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        _FORMATS[settings.format](written, run, settings, losses)
        run.check_unchanged()
        files = digests_of(written, [path.name for path in written.iterdir()])
        write_json(written / ORIGIN, origin | {"files": files})
        check_lock()
        move_aside(folder)
        if folder.exists():  # empty
            folder.rmdir()
        written.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    hint = ""
    if settings.format == "npz":
        hint = (
            f"; the mean of its table, if it has one, is in the position embeddings of "
            f"{run.folder}: import it beside {override('init.blocks_from', run.folder)}"
        )
    return f"{folder} was written{hint}"


def _tokenizer_sha256(run: Run, settings: Settings) -> str | None:
    """The hash of the tokenizer that the export gets; None without one of a name."""
    name = run.tokenizer_name(settings.data.tokenizer)
    return vocabulary.describe(name).sha256 if name else None


def _held(folder: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder with the undamaged files of this origin was made from; or None."""
    try:
        found = read_json(folder / ORIGIN, "delete it") or {}
        names = ("fingerprint", "format", "tokenizer_sha256")
        if any(found.get(name) != origin[name] for name in names):
            return None
        check_digests(folder, found.get("files"))
    except UserError:
        return None
    return found


def _write_hugging_face(
    folder: Path, run: Run, settings: Settings, losses: list[dict[str, Any]]
) -> None:
    """The model with its table multiplied out, its tokenizer and a model card."""
    model, texts = run.settings.model, run.record.get("characters")
    name, end = run.tokenizer_name(settings.data.tokenizer), None
    weights = dense_weights(run)
    hugging_face_files.write_weights(folder, weights)
    if texts:
        hugging_face_tokenizer.write_characters(folder, texts)
    elif name:
        hugging_face_tokenizer.write(folder, name, model.block_size)
        end = vocabulary.load(name).eot_token
    table_VD = weights.pop(FULL_TABLE)
    hugging_face_files.write_config(folder, model, len(table_VD), end)
    card = model_card(
        run.record,
        losses,
        name=run.folder.resolve().name,
        run=run.folder.resolve().name,
        step=run.step,
        fingerprint=run.fingerprint[:12],
        window=model.block_size,
        is_compressed=model.is_factorized or "compressed" in run.record,
        here=table_VD.size,
        there=None
        if model.band_blocks
        else embedding_parameters(run.config(settings.model)),
        others=sum(array.size for array in weights.values()),
        bare=not (texts or name),
    )
    write_text(folder / "README.md", card)


def _losses(run: Run, workdir: str) -> list[dict[str, Any]]:
    """What was measured on this checkpoint, for the model card.

    Corpora of the same name are told apart by the hash of their tokens.
    """
    measured = []
    result = read_result(run.folder)
    if result and result.get("steps") == run.step:
        measured.append(result | {"loss": result.get("val_loss")})
    for path in sorted(run.results_in(workdir).glob("evaluation_*.json")):
        with contextlib.suppress(UserError):
            measured.append(read_json(path, "") or {})
    found = {}
    for one in measured:
        protocol = one.get("protocol")
        # Evaluations of older versions do not say which weights they are of.
        is_of_run = one.get("step", run.step) == run.step and (
            one.get("fingerprint", run.fingerprint) == run.fingerprint
        )
        if isinstance(protocol, dict) and is_of_run:
            known = {"split": "val"} | protocol
            names = ("corpus", "split", "tokens_predicted", "tokens_sha256")
            key = tuple(known.get(name) for name in names)
            found.setdefault(key, one.get("loss"))
    others = Counter((corpus, split, count) for corpus, split, count, _ in found)
    return [
        {
            "corpus": corpus
            if others[corpus, split, count] == 1
            else f"{corpus}, tokens {(sha256 or 'unknown')[:8]}",
            "split": split,
            "tokens": count,
            "loss": loss,
        }
        for (corpus, split, count, sha256), loss in found.items()
    ]


def _write_factors(folder: Path, run: Run, settings: Settings, _: list) -> None:
    """The table, or its factors, as the files that `init.import_*` read.

    The mean of a centred table is not in them: it is in the run's `wpe`.
    """
    config = run.config(settings.model)
    if config.band_blocks:
        raise UserError(
            f"{run.folder} has a packed table, which has no factors: give "
            "--config.format=hf"
        )
    variables, bands = run.variables(config), []
    for number, band in enumerate(config.bands):
        leaves = variables["params"]["embed"][f"band_{number}"]
        up, down = leaves.get("scale_up"), leaves.get("scale_down")
        bands.append((leaves["wte"][: band.size], up, up if down is None else down))
    if len(bands) > 1:
        pairs = ((up, down) for _, up, down in bands if up is not None)
        if not all(np.array_equal(up, down) for up, down in pairs):
            raise UserError(
                f"{run.folder} has two different scale matrices in a band, for which "
                "there are no files"
            )
        order_V = token_order(variables["constants"], config.vocab_size)
        factors = tuple(BandFactors(wte, up) for wte, up, _ in bands)
        table = FactorizedTable(order_V.astype(np.int32), factors, None)
        factor_files.write_bands(folder, table)
        return
    [(wte, up, down)] = bands
    if up is None:
        write_npy(folder / "wte.npy", wte)
        return
    write_npy(factor_files.table_path(folder, len(up)), wte)
    path = factor_files.scale_path(folder, len(up))
    write_npz(path, scale_up=up, scale_down=down)


_FORMATS = {HF: _write_hugging_face, "npz": _write_factors}
