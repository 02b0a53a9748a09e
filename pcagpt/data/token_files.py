"""Token files in nanoGPT's format: `<split>.bin`, little-endian ids and no header."""

import functools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.data.tokenizer import RANKS, rank_file
from pcagpt.errors import UserError
from pcagpt.files import read_json

SPLITS = ("train", "val", "test")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_CHUNK_TOKENS = 1 << 20


def present_splits(folder: Path) -> tuple[str, ...]:
    """The splits for which the folder holds a token file."""
    return tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def map_tokens(folder: Path, split: str, dtype: str) -> np.memmap:
    """Maps `<split>.bin` read-only: [n] of the dtype, ids not yet checked.

    Raises:
      UserError: the file is missing, empty or truncated.
    """
    path, itemsize = folder / f"{split}.bin", DTYPES[dtype].itemsize
    if not path.is_file():
        present = ", ".join(present_splits(folder)) or "none"
        raise UserError(
            f"no '{split}' split in {folder} (present: {present}): "
            f"add {path.name}, or ask for a split that is there"
        )
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty: write its tokens again")
    if size % itemsize:
        raise UserError(
            f"{path} is truncated: {size} bytes is not a multiple of {itemsize}, the "
            f"size of a {dtype}; write it again"
        )
    return np.memmap(path, dtype=DTYPES[dtype], mode="r")


def check_ids(folder: Path, split: str, dtype: str, vocab_size: int) -> None:
    """Reads a split's file once per process and raises UserError for an invalid id."""
    status = (folder / f"{split}.bin").stat()
    version = status.st_ino, status.st_size, status.st_mtime_ns
    _scan(folder.resolve(), split, dtype, vocab_size, version)


@functools.lru_cache
def _scan(
    folder: Path, split: str, dtype: str, vocab_size: int, version: tuple
) -> None:
    """Checks every id. An unchanged file is not read again, thanks to the cache."""
    for number, chunk in enumerate(chunks(map_tokens(folder, split, dtype))):
        if chunk.max() >= vocab_size:
            at = int(np.argmax(chunk >= vocab_size))
            raise UserError(
                f"{folder / split}.bin holds id {chunk[at]} at position "
                f"{number * _CHUNK_TOKENS + at}, but the vocabulary size is "
                f"{vocab_size}: correct vocab_size or dtype (now {dtype}) in meta.json "
                "beside it, or write the tokens again"
            )


def chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive pieces of an array of tokens, small enough to copy or convert."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]


def read_meta(folder: Path, tokenizer: str) -> dict[str, Any]:
    """name, vocab_size, tokenizer and dtype of a folder of token files.

    They come from meta.json or meta.pkl. A folder with neither holds GPT-2's tokens.
    meta.json has vocab_size and, optionally, name, dtype ('uint16' or 'uint32'),
    tokenizer, tokenizer_sha256 and tokens (the number of tokens of each split, which
    is checked).

    Args:
      folder: holds at least one token file.
      tokenizer: 'auto' or a name in RANKS.

    Raises:
      UserError: the meta file is damaged, or contradicts `tokenizer` or the files.
    """
    if tokenizer != "auto":
        rank_file(tokenizer)
    path = folder / "meta.json"
    if path.is_file():
        meta = read_json(path, 'correct it, e.g. to {"vocab_size": 50257}')
    elif (path := folder / "meta.pkl").is_file():
        meta = {"vocab_size": _read_pickle(path).get("vocab_size")}
    else:
        # nanoGPT writes no meta file for GPT-2's tokens.
        name = "gpt2" if tokenizer == "auto" else tokenizer
        meta = {"vocab_size": RANKS[name].vocab_size, "tokenizer": name}
        _refuse_wide_ids(folder)
    vocab_size = meta.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(
            f"{path} gives vocab_size {vocab_size!r}: it must be a positive integer"
        )
    dtype = meta.get("dtype", "uint16")
    if dtype not in list(DTYPES):
        raise UserError(f"{path} gives dtype {dtype!r}: it must be uint16 or uint32")
    _check_lengths(folder, meta.get("tokens", {}), DTYPES[dtype].itemsize)
    title = meta.get("name")
    return {
        "name": title if isinstance(title, str) and title else folder.resolve().name,
        "vocab_size": vocab_size,
        "tokenizer": _agreed_tokenizer(path, meta, vocab_size, tokenizer),
        "dtype": dtype,
    }


def _agreed_tokenizer(
    path: Path, meta: dict, vocab_size: int, asked: str
) -> str | None:
    """The tokenizer that fits both the meta file and the request; None if unknown."""
    stated = meta.get("tokenizer")
    if stated is not None and asked not in ("auto", stated):
        raise UserError(
            f"{path} says that the tokens were made by {stated!r}, not '{asked}': set "
            "--config.data.tokenizer=auto"
        )
    name = stated if asked == "auto" else asked
    if not isinstance(name, str) or name not in RANKS:
        return None  # Such ids can be trained on, but not turned into text.
    if RANKS[name].vocab_size != vocab_size:
        raise UserError(
            f"{path} gives vocab_size {vocab_size}, but tokenizer '{name}' has "
            f"{RANKS[name].vocab_size}: correct one of them"
        )
    if meta.get("tokenizer_sha256", RANKS[name].sha256) != RANKS[name].sha256:
        raise UserError(
            f"{path} was made with another version of tokenizer '{name}': remove "
            f"{path.parent} and tokenize its text again"
        )
    return name


def _check_lengths(folder: Path, counts: object, itemsize: int) -> None:
    """Compares the sizes of the files with the numbers of tokens in meta.json."""
    if not isinstance(counts, dict):
        raise UserError(
            f"{folder / 'meta.json'} is damaged: 'tokens' is {counts!r}, it must give "
            "the number of tokens of each split"
        )
    for split in present_splits(folder):
        path = folder / f"{split}.bin"
        size, stated = path.stat().st_size, counts.get(split)
        if stated is not None and size / itemsize != stated:
            raise UserError(
                f"{path} is truncated or belongs to other tokens: it has {size} bytes, "
                f"but meta.json says {stated!r} tokens of {itemsize} bytes; remove "
                f"{folder} and make it again"
            )


def _refuse_wide_ids(folder: Path) -> None:
    """Raises if files without a meta file are uint32: each second uint16 is then 0."""
    for split in present_splits(folder):
        path = folder / f"{split}.bin"
        head = np.fromfile(path, DTYPES["uint16"], count=4096)
        if len(head) >= 64 and head[::2].any() and not head[1::2].any():
            raise UserError(
                f"{path} looks like uint32, not uint16: add meta.json beside it with "
                '{"vocab_size": …, "dtype": "uint32"}'
            )


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values only. It looks up no name, so no code can run."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """Refuses every name."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _read_pickle(path: Path) -> dict:
    """Reads nanoGPT's meta.pkl; UserError unless it is a dict of plain values."""
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        if not isinstance(meta, dict):
            raise pickle.UnpicklingError(f"it is a {type(meta).__name__}")
    except Exception as error:  # A damaged pickle can raise almost any of them.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is refused ({reason}), it must be a pickled dict of plain values: "
            'write meta.json instead, {"vocab_size": …}'
        ) from error
    return meta
