"""What a GGUF file says of itself, as the package `gguf` reads it."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pcagpt.errors import OF_NO_FILE, UserError, unreadable
from pcagpt.file_hashes import read_once

ENDING = ".gguf"
TOKENIZER = "tokenizer.ggml."  # begins the fields of the tokenizer
_TOKENS = f"{TOKENIZER}tokens"
END = f"{TOKENIZER}eos_token_id"  # field: the id that ends a text


@contextlib.contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but a link to a GGUF file, of the same name.

    transformers reads what else is in its folder, too, and prefers a tokenizer.json.
    Errors that name the folder name that of the file instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / file.name).symlink_to(file.resolve())
        try:
            yield place
        except Exception as error:
            error.args = tuple(
                one.replace(folder, str(file.parent)) if isinstance(one, str) else one
                for one in error.args
            )
            raise


class Header(NamedTuple):
    """fields: by name; shapes: of the tensors, rows first; types: those they have.

    places: the first byte of each tensor in the file, and the byte after it.
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: tuple[str, ...]
    places: dict[str, tuple[int, int]]


class TokenizerFields(NamedTuple):
    """tokens: by id, as the file writes them; end: the id that ends a text.

    merges: texts like "a b", in their order; None if the file has none.
    others: all that the file says, by name.
    """

    tokens: list[str]
    end: int | None
    kind: tuple[str | None, str | None]  # the model, and the pattern
    sha256: str
    merges: list[str] | None
    others: dict[str, Any]


@read_once
def header(path: Path) -> Header:
    """The header of a file; UserError if it is damaged, or without the package."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{path} can only be read with the package `gguf`: pip install 'pcagpt[hf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        shapes = {
            one.name: tuple(map(int, reversed(one.shape))) for one in reader.tensors
        }
        types = dict.fromkeys(one.tensor_type.name for one in reader.tensors)
        places = {
            one.name: (int(one.data_offset), int(one.data_offset + one.n_bytes))
            for one in reader.tensors
        }
    except OF_NO_FILE:
        raise
    # The package raises errors of many types for damaged files.
    except Exception as error:
        if found := unreadable(error, path):
            raise found from None
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is damaged ({reason}): restore it, or download it again"
        ) from None
    return Header(fields, shapes, tuple(types), places)


def tokenizer_fields(path: Path) -> TokenizerFields:
    """What a file says of its tokenizer; UserError if it has none."""
    fields = header(path).fields
    own = {name: v for name, v in fields.items() if name.startswith(TOKENIZER)}
    tokens, end = own.get(_TOKENS), own.get(END)
    if not isinstance(tokens, list) or not tokens:
        raise UserError(
            f"{path} has no tokenizer: name its tokenizer.json as "
            "--config.data.tokenizer"
        )
    kind = own.get(f"{TOKENIZER}model"), own.get(f"{TOKENIZER}pre")
    sha256 = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    merges = own.get(f"{TOKENIZER}merges")
    others = {name.removeprefix(TOKENIZER): value for name, value in own.items()}
    return TokenizerFields(tokens, end, kind, sha256.hexdigest(), merges, others)
