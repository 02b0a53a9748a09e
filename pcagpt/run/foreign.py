"""Models of other programs, and exports, as runs.

Nothing is ever written into their folders. Such a run has one checkpoint, 0. Its folder
is the folder of the run itself; a GGUF file is a run itself.
"""

import copy
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pcagpt import trees
from pcagpt.config import KNOBS
from pcagpt.data import (
    hugging_face_tokenizer,
    in_transformers,
    tokenizer_settings,
    vocabulary,
)
from pcagpt.data.meta import META_FILES, read_meta
from pcagpt.data.tokenizer import RANKS
from pcagpt.errors import UserError, warn_once
from pcagpt.file_hashes import check_digests, read_once
from pcagpt.json_files import check_fields, read_json
from pcagpt.model import CONSTANTS, TABLES
from pcagpt.run import (
    exported,
    generation_files,
    gguf_model,
    hugging_face,
    nano_gpt,
    other_decoder,
)

STEP = 0  # of the only checkpoint
_GPT2_SIZES = (50257, 50304)  # of GPT-2's vocabulary, the second one padded
_OWN = "ckpt"  # our own runs have this folder
_FILES = (
    hugging_face.CONFIG, hugging_face.WEIGHTS, hugging_face.INDEX, nano_gpt.CHECKPOINT,
    exported.OTHERS, exported.CODED_TABLE,
)  # fmt: skip
_SETTINGS = (hugging_face.CONFIG, hugging_face.INDEX)
_OF_WEIGHTS = {Path(name).suffix for name in _FILES} - {".json"}
_EXPORT_AGAIN = "export the model again"
_MAY_CHANGE = ("README.md", generation_files.FILE)  # files of an export
_FORMATS: tuple[ModuleType, ...] = (
    gguf_model,
    exported,
    other_decoder,
    hugging_face,
    nano_gpt,
)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of another program."""
    return _format(folder) is not None


def place_of(path: Path) -> Path:
    """The folder of a model's file, or the GGUF file of a folder; else the path.

    Folders of GGUF files often have a config.json, too. A folder in the cache of
    Hugging Face stands for its snapshot. UserError if it has not just one, or if other
    weights than those of a named file would be read.
    """
    path = hugging_face.snapshot_in(path)
    if path.is_dir() and not (path / _OWN).exists():
        kind = _format(path)
        has_config = kind in (hugging_face, other_decoder)
        if kind is None or (has_config and not hugging_face.has_weights(path)):
            return gguf_model.file_in(path) or path
    if not (path.name in _FILES and path.is_file() and is_model(path.parent)):
        return path
    if path.name not in (read := _read_in(path.parent)):
        raise UserError(
            f"{path} is not read where it is, because {path.with_name(read[-1])} is "
            f"read there: name that one, or move {path.name} into a folder of its own"
        )
    return path.parent


def _read_in(folder: Path) -> tuple[str, ...]:
    """The names in `_FILES` that stand for what is read in the folder of a model."""
    kind, config = _format(folder), hugging_face.CONFIG
    if kind is nano_gpt:
        return config, nano_gpt.CHECKPOINT
    if kind is exported and "table" not in hugging_face.stored_config(folder):
        return config, exported.CODED_TABLE, exported.OTHERS
    weights = (hugging_face.WEIGHTS, hugging_face.INDEX)
    return config, *[name for name in weights if (folder / name).is_file()][:1]


def record_of(folder: Path) -> dict[str, Any]:
    """The record that a run of ours with the model of a folder would have.

    Raises UserError if pcagpt cannot read the model, or would compute another one.
    """
    return copy.deepcopy(_record(folder))


def _check_export(folder: Path) -> dict[str, Any]:
    """What pcagpt.json of an export holds, {} without it.

    UserError if files that are read here were changed.
    """
    is_file = folder.is_file()  # GGUF
    origin = None if is_file else read_json(folder / exported.FILE, _EXPORT_AGAIN)
    if origin is None:
        return {}
    fields = {"files": (dict,), "compressed": (list, None)}
    check_fields(origin, fields, folder / exported.FILE, _EXPORT_AGAIN)
    for number, made in enumerate(origin.get("compressed") or ()):
        place = f"compressed[{number}] of {folder / exported.FILE}"
        check_fields(made, {"run": (str,), "step": (int, None)}, place, _EXPORT_AGAIN)
    read = {name: of for name, of in origin["files"].items() if name not in _MAY_CHANGE}
    try:
        check_digests(folder, read)
    except UserError as error:
        remedy = _EXPORT_AGAIN
        if origin.get("format") == "hf":
            remedy += (
                f"; if you changed it yourself, delete {exported.FILE} to have it read "
                "as any Hugging Face folder"
            )
        elif exported.is_model(folder):
            remedy += exported.ONLY_THERE
        raise UserError(f"{error}: {remedy}") from None
    for name in (hugging_face.WEIGHTS, exported.OTHERS, exported.CODED_TABLE):
        if (folder / name).is_file() and name not in origin["files"]:
            raise UserError(
                f"{folder / name} is not of the export that {folder / exported.FILE} "
                "describes, but perhaps of an older one in the same folder: remove it"
            )
    return origin


@read_once
def _record(folder: Path) -> dict[str, Any]:
    origin = _check_export(folder)
    record = _format(folder).record_of(folder)
    record[exported.BEFORE] = origin.get("compressed") or []
    rows, name = record["vocab_size"], _tokenizer_of(folder)
    if hugging_face.is_model(folder):
        record[generation_files.FIELD] = generation_files.read(folder, rows)
        if "architecture" not in record:  # Exports of others copy their files.
            generation_files.name_lost(folder, rows)
    if name:
        _check_rows(folder, "tokenizer", vocabulary.describe(name).rows_needed, rows)
        sha256 = vocabulary.describe(name).sha256
        if (folder / hugging_face.CONFIG).is_file():
            in_transformers.compare(folder)
        # Exports write the files of such a tokenizer anew.
        if name in RANKS and (own := hugging_face_tokenizer.own_files(folder)):
            kept = record.setdefault(generation_files.FIELD, {})
            kept[generation_files.TOKENIZER] = {name: own}
        return record | {"tokenizer": name, "tokenizer_sha256": sha256}
    if any((folder / file).is_file() for file in META_FILES):  # nanoGPT's meta.pkl
        info, size = read_meta(folder, "auto"), None
        if info.tokenizer:
            size = vocabulary.describe(info.tokenizer).rows_needed
        _check_rows(folder, "meta file", size or info.vocab_size, rows)
        return record | {
            "tokenizer": info.tokenizer,
            "tokenizer_sha256": info.tokenizer_sha256,
            "characters": info.characters,
        }
    # Other architectures have vocabularies of these sizes, too.
    is_gpt2 = rows in _GPT2_SIZES and "architecture" not in record
    if is_gpt2:
        tokenizer_settings.check_is_gpt2s(folder)
        if not nano_gpt.is_model(folder):  # Its models have no other tokenizer.
            warn_once(
                f"{folder} has no tokenizer: the {rows:,} rows of its table are taken "
                "for GPT-2's tokens"
            )
    return record | {"tokenizer": "gpt2" if is_gpt2 else None}


def _check_rows(folder: Path, teller: str, size: int, rows: int) -> None:
    """UserError if a file of a model tells of more tokens than its table has rows."""
    if size > rows:
        raise UserError(
            f"{folder}: its {teller} has {size} tokens, but its table {rows} rows: "
            "give both of one model"
        )


def read_weights(folder: Path) -> dict:
    """{'params', 'constants'} as a run of ours stores them; raises as `record_of`."""
    found = _format(folder).read_weights(folder)
    tables = [path for path in found if re.fullmatch(TABLES, path)]
    if tables:  # A packed table has no padding.
        rows = sum(len(found[path]) for path in tables)
        padding = -rows % KNOBS["model.vocab_multiple"].default
        last = max(tables, key=lambda path: (len(path), path))  # The highest number.
        found[last] = np.pad(found[last], ((0, padding), (0, 0)))
    tree = trees.unflatten(found)
    return {"constants": tree.pop(CONSTANTS, {}), "params": tree}


def weight_files(folder: Path) -> list[Path]:
    """The files of a model that decide what it computes."""
    if folder.is_file():  # GGUF
        return [folder]
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.name in _SETTINGS or file.suffix in _OF_WEIGHTS)
    )


def file_digests(folder: Path) -> dict[str, str]:
    """{file: sha256} of a model that only transformers can read; {} of others."""
    kind = _format(folder)
    return kind.digests(folder) if kind in (gguf_model, other_decoder) else {}


def _tokenizer_of(folder: Path) -> str | None:
    """The tokenizer that comes with a model; None without one that can be used."""
    if not gguf_model.is_model(folder):
        return vocabulary.in_folder(folder)
    try:
        name = vocabulary.name_of(str(folder))
        vocabulary.load(name)
    except UserError:  # `OwnTokens.check_is_told` repeats it if it matters.
        return None
    return name


def _format(folder: Path) -> ModuleType | None:
    """The module that reads a folder; None for runs of ours and for other folders."""
    if (folder / _OWN).is_dir():
        return None
    return next((one for one in _FORMATS if one.is_model(folder)), None)
