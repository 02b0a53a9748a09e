"""The task 'export': writes a model in a form that other programs read.

WORKDIR/exported/NAME_FORMAT/ gets its name when it is complete; of one table of an
untied model, NAME_SIDE_FORMAT/.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcagpt.config import Settings, override
from pcagpt.data import in_transformers
from pcagpt.errors import UserError
from pcagpt.export.formats import FORMATS
from pcagpt.export.measured import measured
from pcagpt.export.model_card import is_bare, model_card
from pcagpt.export.source import RunSource, Source, open_source
from pcagpt.file_hashes import check_digests, digests_of
from pcagpt.files import write_text
from pcagpt.json_files import read_json, strict, write_json
from pcagpt.pipeline.execute import check_workdir
from pcagpt.run import generation_files, lock
from pcagpt.run.exported import FILE as ORIGIN
from pcagpt.run.exported import compressions
from pcagpt.run.folder import check_is_folder, is_vacant, replacing
from pcagpt.sharding import processes

FOLDER = "exported"  # in a workdir


def export(settings: Settings) -> str:
    """Writes the model of `model_path` as `format`; returns a line that says where.

    A folder that already holds it stays as it is. If the run was evaluated since, the
    line says that the model card is older. All processes must call this.

    Raises:
      UserError: the model does not exist, cannot be written in this form, or something
        else is in the folder and `overwrite` is off.
    """
    check_workdir(settings.workdir)
    source = open_source(settings)
    folder = processes.from_first(lambda: _place(source, settings))
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with lock.held(folder, meanwhile=lambda: None) as check_lock:
            return processes.from_first(
                lambda: _export(source, settings, folder, check_lock)
            )
    finally:
        # A refusal leaves no empty folder behind.
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _place(source: Source, settings: Settings) -> Path:
    """The folder for an export.

    `compress` replaces a table by another one of the same name. The export of the later
    one gets the beginning of its hash into its name, if the earlier one was exported.
    """
    made = source.record.get("compressed") or {}
    parts = [source.folder.resolve().name, made.get("side"), settings.format]
    folder = Path(settings.workdir) / FOLDER / "_".join(filter(None, parts))
    check_is_folder(folder)
    own, earlier = made.get("table_sha256"), None
    with contextlib.suppress(UserError):
        origin = read_json(folder / ORIGIN, "") or {}
        *_, last = origin.get("compressed") or [{}]
        earlier = last.get("table_sha256")
    if settings.overwrite or None in (own, earlier) or own == earlier:
        return folder
    return folder.with_name(f"{folder.name}_{own[:8]}")


def _export(
    source: Source, settings: Settings, folder: Path, check_lock: Callable[[], None]
) -> str:
    """As `export`, in one process, which holds the lock of the folder."""
    form = settings.format
    has_card = form != "npz"
    losses = strict(measured(source, settings.workdir)) if has_card else []
    how = ": its README.md says how to load it" if has_card else ""
    if has_card and is_bare(source):
        how += (
            "; pcagpt knows no tokenizer for it: --config.data.tokenizer=FILE names one"
        )
    origin = {
        "run": source.folder.resolve().name,
        **source.identity,
        "format": form,
        "table": source.table_name,
        "tokenizer_sha256": source.tokenizer_sha256,
        "losses": losses,
        generation_files.FIELD: source.record.get(generation_files.FIELD),
    }
    if made := compressions(source.record):
        origin["compressed"] = [
            one | {"run": Path(one.get("run", "")).name} for one in made
        ]
    if held := _held(folder, origin):
        if held.get("losses", losses) == losses:
            return f"{folder} is done{how}"
        if not settings.overwrite:
            return (
                f"{folder} is done, but its README.md shows other losses than "
                f"{source.folder} has now: --config.overwrite=True moves it aside "
                "and writes it anew"
            )
    if not is_vacant(folder) and not settings.overwrite:
        raise UserError(
            f"{folder} holds {_other(folder, origin)}: use another "
            "--config.workdir, or --config.overwrite=True to move it aside"
        )
    with replacing(folder) as written:
        FORMATS[form](written, source)
        if has_card:
            write_text(written / "README.md", model_card(source, form, losses))
        source.check_unchanged()
        files = digests_of(written, [path.name for path in written.iterdir()])
        # Imports of the table refuse other tokens.
        tokens = {"tokens": source.tokens} if form == "npz" else {}
        write_json(written / ORIGIN, origin | tokens | {"files": files})
        check_lock()
    if has_card:
        in_transformers.compare(folder)
    if form == "npz" and isinstance(source, RunSource):
        how = (
            "; the mean of a run's table, if it has one, is in the position embeddings "
            f"of {source.folder}: to start a model from the files, also give "
            f"{override('init.blocks_from', source.folder)}"
        )
    return f"{folder} was written{how}"


def _other(folder: Path, origin: dict[str, Any]) -> str:
    """What is in a folder that does not hold this origin undamaged."""
    try:
        found = read_json(folder / ORIGIN, "write it again") or {}
        if _is_of(found, origin):
            check_digests(folder, found.get("files"))
    except UserError as error:
        return f"an export, but {error}"
    step = found.get("step")
    if found.get("run") != origin["run"] or step in (None, origin.get("step")):
        return "something else"
    return f"{origin['run']} at step {step}, and this is step {origin.get('step')}"


def _is_of(found: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Whether an export was made from this origin."""
    # Older versions did not store all fields.
    names = ("fingerprint", "format", "tokenizer_sha256", "table_sha256")
    names += (generation_files.FIELD,)
    return all(found.get(name) == origin.get(name) for name in names)


def _held(folder: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder with the undamaged files of this origin was made from; or None."""
    try:
        found = read_json(folder / ORIGIN, "delete it") or {}
        if not _is_of(found, origin):
            return None
        check_digests(folder, found.get("files"))
    except UserError:
        return None
    return found
