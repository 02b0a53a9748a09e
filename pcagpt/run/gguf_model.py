"""A GGUF file as a run: its values, dequantized by transformers, are the model.

Only `compress` takes it, as a model of another architecture.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.data.gguf_header import END, ENDING, header
from pcagpt.errors import UserError
from pcagpt.file_hashes import sha256_of_file
from pcagpt.run import generation_files, other_decoder

_TABLE = "token_embd.weight"
_PART = re.compile(rf"-\d{{5}}-of-\d{{5}}\{ENDING}$")


def is_model(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    return path.suffix == ENDING and path.is_file()


def file_in(folder: Path) -> Path | None:
    """The only GGUF file in a folder; None without one, UserError for several."""
    found = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
    if parts := [path for path in found if _PART.search(path.name)]:
        raise _split(parts[0])
    if len(found) > 1:
        raise UserError(
            f"{folder} has {len(found)} GGUF files: name one, such as {found[0]}"
        )
    return found[0] if found else None


def _split(part: Path) -> UserError:
    """The error for a file that is a part of a model."""
    return UserError(
        f"{part} is one of several parts of a model: merge them, with llama-gguf-split "
        "--merge of llama.cpp, and name the whole file"
    )


def record_of(path: Path) -> dict[str, Any]:
    """The record of a run with the model of a file; UserError without a token table.

    'stored_as' names the types from which its values are dequantized.
    """
    found = header(path)
    if found.fields.get("split.count", 1) != 1:
        raise _split(path)
    shape = found.shapes.get(_TABLE, ())
    if len(shape) != 2:
        raise UserError(
            f"{path} has no tensor {_TABLE}: give the GGUF of a language model"
        )
    architecture = found.fields.get("general.architecture")
    depth = found.fields.get(f"{architecture}.block_count")
    end = found.fields.get(END)
    has_end = type(end) is int and 0 <= end < shape[0]
    own = {"eos_token_id": end if has_end else None}
    return {
        "vocab_size": shape[0],
        "model": other_decoder.model_record(shape[1], depth),
        "architecture": f"{architecture}{other_decoder.IN_GGUF}",
        "stored_as": list(found.types),
        generation_files.FIELD: {generation_files.FILE: own},
    }


def digests(path: Path) -> dict[str, str]:
    """{file: sha256}."""
    return {path.name: sha256_of_file(path)}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Always raises UserError: only transformers knows what to do with them."""
    raise other_decoder.refusal(path, record_of(path)["architecture"])
