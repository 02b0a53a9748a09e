"""Folders of token files in nanoGPT's format: opening, checking, mapping."""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcagpt.data.tokenizer import RANKS, rank_file
from pcagpt.errors import UserError

SPLITS = ("train", "val", "test")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_CHUNK_TOKENS = 1 << 20
_PLAIN_TYPES = (str, int, float, bool, type(None))
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Corpus:
    """A folder of token files: `<split>.bin`, little-endian ids and nothing else."""

    name: str
    vocab_size: int
    tokenizer: str | None  # a name in RANKS, or None when unknown
    folder: Path
    dtype: str = "uint16"

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits present, of ('train', 'val', 'test')."""
        return present_splits(self.folder)

    def tokens(self, split: str) -> np.ndarray:
        """Map a split read-only: uint16 or uint32 [n]; UserError when it is unusable.

        Raises for a missing, empty or truncated file, or an id >= vocab_size.
        """
        path = self.folder / f"{split}.bin"
        if not path.is_file():
            present = ", ".join(self.splits) or "none"
            raise UserError(
                f"no '{split}' split in {self.folder} (present: {present}): "
                f"add {path.name}, or ask for a split that is there"
            )
        dtype = DTYPES[self.dtype]
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty: write its tokens again")
        if size % dtype.itemsize:
            raise UserError(
                f"{path} is truncated: {size} bytes is not a multiple of "
                f"{dtype.itemsize}, the size of a {self.dtype}; write it again"
            )
        tokens = np.memmap(path, dtype=dtype, mode="r")
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS]
            if chunk.max() >= self.vocab_size:
                at = int(np.argmax(chunk >= self.vocab_size))
                raise UserError(
                    f"{path} holds id {chunk[at]} at position {start + at}, but the "
                    f"vocabulary size is {self.vocab_size}: it is no file of "
                    f"{self.dtype} tokens of this vocabulary; correct meta.json beside "
                    "it, or write the tokens again"
                )
        return tokens


def fingerprint(corpus: Corpus) -> str:
    """sha256 of the lengths of training and validation split and of a sample of each.

    The sample is of 64 evenly spaced runs of 4,096 tokens: any size costs the same.
    """
    digest = hashlib.sha256(f"{corpus.vocab_size}".encode())
    for split in ("train", "val"):
        path = corpus.folder / f"{split}.bin"
        tokens = np.memmap(path, dtype=DTYPES[corpus.dtype], mode="r")
        digest.update(f" {split} {len(tokens)} ".encode())
        for start in np.linspace(0, max(len(tokens) - 4096, 0), 64).astype(int):
            digest.update(tokens[start : start + 4096].tobytes())
    return digest.hexdigest()


def present_splits(folder: Path) -> tuple[str, ...]:
    """Return the splits of which the folder holds a token file."""
    return tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def open_token_folder(folder: Path, tokenizer: str) -> Corpus:
    """Open a folder by its meta.json, its meta.pkl or, with neither, as GPT-2's tokens.

    meta.json: vocab_size and, optionally, name, dtype ('uint16' or 'uint32'),
    tokenizer, tokenizer_sha256 and tokens (split -> number of tokens, which is
    checked). `tokenizer` is 'auto' or a name in RANKS.
    """
    if tokenizer != "auto":
        rank_file(tokenizer)
    path = folder / "meta.json"
    if path.is_file():
        meta = _read_meta_json(path)
    elif (path := folder / "meta.pkl").is_file():
        meta = {"vocab_size": _read_meta_pickle(path).get("vocab_size")}
    else:
        # nanoGPT writes no meta beside GPT-2's tokens.
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
    return Corpus(
        name=title if isinstance(title, str) and title else folder.resolve().name,
        vocab_size=vocab_size,
        tokenizer=_agreed_tokenizer(path, meta, vocab_size, tokenizer),
        folder=folder,
        dtype=dtype,
    )


def _agreed_tokenizer(
    path: Path, meta: dict, vocab_size: int, asked: str
) -> str | None:
    """Return the tokenizer that meta and the person agree on; None when unknown."""
    stated = meta.get("tokenizer")
    if stated is not None and asked not in ("auto", stated):
        raise UserError(
            f"{path} says that the tokens were made by {stated!r}, not '{asked}': set "
            "--config.data.tokenizer=auto"
        )
    name = stated if asked == "auto" else asked
    if not isinstance(name, str) or name not in RANKS:
        return None  # one can train on such ids, though not turn them into text
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
    """Compare the sizes of the files with the numbers of tokens in meta.json."""
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
                f"{path} is truncated or foreign: it has {size} bytes, and meta.json "
                f"says {stated!r} tokens of {itemsize} bytes; remove {folder} and make "
                "it again"
            )


def _refuse_wide_ids(folder: Path) -> None:
    """Raise when files without meta are uint32: every second uint16 would be zero."""
    for split in present_splits(folder):
        path = folder / f"{split}.bin"
        head = np.fromfile(path, DTYPES["uint16"], count=4096)
        if len(head) >= 64 and head[::2].any() and not head[1::2].any():
            raise UserError(
                f"{path} looks like uint32, not uint16: add meta.json beside it with "
                '{"vocab_size": …, "dtype": "uint32"}'
            )


def _read_meta_json(path: Path) -> dict:
    """Read meta.json; UserError when it is no JSON object."""
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged, it is not JSON ({error}): correct it"
        ) from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} is damaged: it must hold an object, {{…}}")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles values that need no name looked up, so that no code can run."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _read_meta_pickle(path: Path) -> dict:
    """Read nanoGPT's meta.pkl; UserError unless it is a dict of plain values only."""
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        _require_plain(meta)
    except _UNPICKLING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is refused, it must be a pickled dict of plain values ({reason}): "
            'write meta.json instead, {"vocab_size": …}'
        ) from error
    return meta


def _require_plain(meta: object) -> None:
    """Raise TypeError unless `meta` is a dict of containers, strings and numbers."""
    if type(meta) is not dict:
        raise TypeError(f"it is a {type(meta).__name__}")
    waiting, seen = [meta], set()
    while waiting:
        value = waiting.pop()
        if type(value) in _PLAIN_TYPES or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            waiting += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple):
            waiting += value
        else:
            raise TypeError(f"it holds a {type(value).__name__}")
