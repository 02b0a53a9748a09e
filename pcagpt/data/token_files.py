"""Folders of token files in nanoGPT's format, and their meta files."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.data.tokenizer import RANKS, rank_file
from pcagpt.errors import UserError
from pcagpt.files import read_json

SPLITS = ("train", "val", "test")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class CorpusInfo:
    """Description of a corpus, known before its tokens are read."""

    name: str
    vocab_size: int
    dtype: str  # a key of DTYPES
    tokenizer: str | None  # a name in RANKS, or None if unknown


def present_splits(folder: Path) -> tuple[str, ...]:
    """The splits that have a token file in the folder."""
    return tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def read_meta(folder: Path, tokenizer: str) -> CorpusInfo:
    """Reads meta.json or nanoGPT's meta.pkl, and checks it against the token files.

    meta.json has vocab_size and, optionally, name, dtype ('uint16' or 'uint32'),
    tokenizer, tokenizer_sha256 and tokens (the number of tokens of each split).

    Args:
      folder: has at least one token file.
      tokenizer: a name in RANKS, or 'auto'.

    Raises:
      UserError: the meta file is damaged, or contradicts `tokenizer` or the files.
    """
    if tokenizer != "auto":
        rank_file(tokenizer)
    path = folder / "meta.json"
    if path.is_file():
        meta = read_json(path, 'write it again, e.g. {"vocab_size": 50257}')
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
    name = meta.get("name")
    return CorpusInfo(
        name if isinstance(name, str) and name else folder.resolve().name,
        vocab_size,
        dtype,
        _agreed_tokenizer(path, meta, vocab_size, tokenizer),
    )


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
        return None  # A model can train on such ids, but they cannot become text.
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


def _check_lengths(folder: Path, counts: Any, itemsize: int) -> None:
    """Raises if the size of a file contradicts its number of tokens in meta.json."""
    if not isinstance(counts, dict):
        raise UserError(
            f"{folder / 'meta.json'} is damaged: 'tokens' is {counts!r}, but it must "
            "give the number of tokens of each split"
        )
    for split in present_splits(folder):
        path, stated = folder / f"{split}.bin", counts.get(split)
        size = path.stat().st_size
        if stated is not None and size / itemsize != stated:
            raise UserError(
                f"{path} is truncated or belongs to other tokens: it has {size} bytes, "
                f"but meta.json says {stated!r} tokens of {itemsize} bytes; remove "
                f"{folder} and make it again"
            )


def _refuse_wide_ids(folder: Path) -> None:
    """Raises if a file seems to hold uint32: every second uint16 is 0."""
    for split in present_splits(folder):
        path = folder / f"{split}.bin"
        head = np.fromfile(path, DTYPES["uint16"], count=4096)
        if len(head) >= 64 and head[::2].any() and not head[1::2].any():
            raise UserError(
                f"{path} looks like uint32, not uint16: add meta.json beside it with "
                '{"vocab_size": …, "dtype": "uint32"}'
            )


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values. It refuses to look up any name, so no code can run."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """Refuses every name."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _read_pickle(path: Path) -> dict:
    """Reads nanoGPT's meta.pkl; UserError unless it is a dict of plain values."""
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        if not isinstance(meta, dict):
            raise TypeError(f"it is a {type(meta).__name__}")
    except Exception as error:  # A damaged pickle can raise almost any error.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is refused: it must be a pickled dict of plain values ({reason}); "
            'write meta.json instead: {"vocab_size": …}'
        ) from error
    return meta
