"""Meta files: they describe the token files in their folder."""

import dataclasses
import hashlib
import itertools
import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pcagpt.data import vocabulary
from pcagpt.data.tokenizer import RANKS
from pcagpt.errors import OF_NO_FILE, UserError, unreadable, warn_once
from pcagpt.files import odd_kind, refuse_odd
from pcagpt.json_files import read_json

SPLITS = ("train", "val", "test")
MOST_TOKENS = 10**8  # of a vocabulary; known ones have less than 10**6
META_FILES = ("meta.json", "meta.pkl")
_TEXTS = ("itos", "stoi")
_PICKLED_FIELDS = ("vocab_size", *_TEXTS)
_NAMED = 8  # ids in a warning
# {field of CorpusInfo: numbers of each split in a meta file}
_BY_SPLIT = {
    "counts": "tokens",
    "unknown": "unknown_tokens",
    "unended": "unended_documents",
    "text_words": "text_words",
    "text_bytes": "text_bytes",
}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """Description of a corpus, known before its tokens are read.

    splits: those that it has; tokenizer: a `vocabulary.name_of`, or None for any
    other; is_assumed: neither a meta file nor a knob named the tokenizer;
    tokenizer_sha256: differs between numberings of tokens, None if the numbering is
    unknown; characters: the text of each id, from the `itos` or `stoi` of a meta file,
    or None if it is unknown or none has a text; dtype: a key of DTYPES, or None if the
    meta file names none; counts: number of tokens of each split, as far as the meta
    file states it. If pcagpt tokenized it, of each split: hashes: sha256 of the file;
    unknown: number of tokens that stand for unknown text; unended: ends of documents
    without a token; text_words and text_bytes: as `Corpus.text_size` counts them.
    """

    name: str
    splits: tuple[str, ...]
    vocab_size: int
    tokenizer: str | None
    is_assumed: bool = False
    tokenizer_sha256: str | None = None
    characters: tuple[str, ...] | None = None
    dtype: str | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)
    unended: dict[str, int] = dataclasses.field(default_factory=dict)
    text_words: dict[str, int] = dataclasses.field(default_factory=dict)
    text_bytes: dict[str, int] = dataclasses.field(default_factory=dict)


def narrowest(vocab_size: int) -> str:
    """The key of DTYPES with the fewest bits that hold every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def present_splits(folder: Path) -> tuple[str, ...]:
    """The splits that have a token file in the folder."""
    return tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def odd_splits(folder: Path, splits: Iterable[str] = SPLITS) -> str:
    """'; train.bin is a named pipe' for what is no file, but named as a split's."""
    odd = {path for split in splits for path in folder.glob(f"*{split}*")}
    return "".join(
        f"; {path.name} is {kind}" for path in sorted(odd) if (kind := odd_kind(path))
    )


def read_meta(folder: Path, tokenizer: str) -> CorpusInfo:
    """Reads meta.json and nanoGPT's meta.pkl, but no token file.

    meta.json has vocab_size and, optionally, name, dtype ('uint16' or 'uint32'),
    tokenizer, tokenizer_sha256, itos or stoi (the text of each id, or the id of each
    text), and tokens (the number of tokens of each split). What it lacks comes from
    the meta.pkl beside it.

    Args:
      folder: has at least one token file.
      tokenizer: as for `vocabulary.name_of`, or 'auto'.

    Raises:
      UserError: a meta file is damaged, or contradicts the other one or `tokenizer`.
    """
    if tokenizer != "auto":
        tokenizer = vocabulary.name_of(tokenizer)
    path, pickled = (folder / name for name in META_FILES)
    for file in (path, pickled):
        refuse_odd(file)
    is_assumed = False
    if path.is_file():
        meta = read_json(path, 'write it again, e.g. {"vocab_size": 50257}')
        meta = _with_pickle(path, meta, pickled) if pickled.is_file() else meta
    elif pickled.is_file():
        path, meta = pickled, _read_pickle(pickled)
    else:
        # nanoGPT writes no meta file for GPT-2's tokens.
        name = "gpt2" if tokenizer == "auto" else tokenizer
        meta = {"vocab_size": vocabulary.describe(name).vocab_size, "tokenizer": name}
        is_assumed = tokenizer == "auto"
    vocab_size = meta.get("vocab_size")
    if type(vocab_size) is not int or not 1 <= vocab_size <= MOST_TOKENS:
        raise UserError(
            f"{path} gives vocab_size {vocab_size!r}: it must be a whole number from 1 "
            f"to {MOST_TOKENS}"
        )
    dtype = meta.get("dtype")
    if dtype is not None and dtype not in list(DTYPES):
        raise UserError(f"{path} gives dtype {dtype!r}: it must be uint16 or uint32")
    hashes = meta.get("tokens_sha256", {})
    numbers = {field: meta.get(name, {}) for field, name in _BY_SPLIT.items()}
    if not (
        all(
            _is_by_split(entry, int) and min(entry.values(), default=0) >= 0
            for entry in numbers.values()
        )
        and _is_by_split(hashes, str)
    ):
        raise UserError(
            f"{path} is damaged: 'tokens' must give the number of tokens of each split "
            "as whole numbers, as must 'unknown_tokens', 'unended_documents', "
            "'text_words' and 'text_bytes', and 'tokens_sha256' the hash of its file "
            "as text"
        )
    name = meta.get("name")
    agreed = _agreed_tokenizer(path, meta, vocab_size, tokenizer)
    text_of_id = {} if agreed else _vocabulary(path, meta)
    is_whole = text_of_id.keys() == set(range(vocab_size))
    if not (agreed or is_whole):
        _name_gaps(path, meta, text_of_id, vocab_size)
    is_text = is_whole and any(map(has_text, text_of_id.values()))
    return CorpusInfo(
        name=name if isinstance(name, str) and name else folder.resolve().name,
        splits=present_splits(folder),
        vocab_size=vocab_size,
        tokenizer=agreed,
        is_assumed=is_assumed,
        tokenizer_sha256=(
            vocabulary.describe(agreed).sha256
            if agreed
            else _numbering_sha256(meta, text_of_id)
        ),
        characters=tuple(map(text_of_id.get, range(vocab_size))) if is_text else None,
        dtype=dtype,
        hashes=hashes,
        **numbers,
    )


def _with_pickle(path: Path, meta: dict, pickled: Path) -> dict:
    """The fields of meta.json, and those of meta.pkl that it lacks.

    UserError if they state two sizes of the vocabulary, or other texts of its ids.
    """
    try:
        known = _read_pickle(pickled)
    except UserError:
        if "vocab_size" in meta:  # It was written in place of the damaged file.
            return meta
        raise
    sizes = [said["vocab_size"] for said in (meta, known) if "vocab_size" in said]
    if sizes[1:] and sizes[0] != sizes[1]:
        raise UserError(
            f"{path} gives vocab_size {sizes[0]!r}, but {pickled.name} beside it "
            f"{sizes[1]!r}: correct one of them, or remove meta.pkl"
        )
    texts, others = _vocabulary(path, meta), _vocabulary(pickled, known)
    for number in sorted(texts.keys() & others.keys()):
        if texts[number] != others[number]:
            raise UserError(
                f"{path} gives id {number} the text {texts[number]!r}, but "
                f"{pickled.name} beside it {others[number]!r}: correct one of them, or "
                "remove meta.pkl"
            )
    if meta.keys() & {"tokenizer", "tokenizer_sha256", "itos", "stoi"}:
        return {"vocab_size": known.get("vocab_size")} | meta
    return known | meta


def _is_by_split(value: object, kind: type) -> bool:
    """Whether a value is a dict with entries of one type."""
    return isinstance(value, dict) and all(type(e) is kind for e in value.values())


def _vocabulary(path: Path, meta: dict) -> dict[int, str]:
    """{id: text} from `itos` and `stoi`; UserError unless they are one to one.

    JSON has the ids of `itos` as a list or as text. Entries of other types, and texts
    that UTF-8 cannot write, are left out.
    """
    itos, stoi = meta.get("itos"), meta.get("stoi")
    pairs = list(enumerate(itos)) if isinstance(itos, (list, tuple)) else []
    pairs += itos.items() if isinstance(itos, dict) else []
    pairs += [(i, text) for text, i in stoi.items()] if isinstance(stoi, dict) else []
    found: dict[int, str] = {}
    for number, text in pairs:
        is_number = type(number) is int or (
            isinstance(number, str) and re.fullmatch("[0-9]{1,10}", number)
        )
        if not is_number or not isinstance(text, str) or _SURROGATE.search(text):
            continue
        if found.setdefault(int(number), text) != text:
            raise UserError(
                f"{path} gives id {number} two texts, {found[int(number)]!r} and "
                f"{text!r}: correct its itos and stoi"
            )
    id_of: dict[str, int] = {}
    for number, text in found.items():
        # Several ids may be no text, or a part of a character.
        if id_of.setdefault(text, number) != number and has_text(text):
            raise UserError(
                f"{path} gives ids {id_of[text]} and {number} the same text {text!r}: "
                "correct its itos"
            )
    return found


def _name_gaps(
    path: Path, meta: dict, text_of_id: dict[int, str], vocab_size: int
) -> None:
    """Warns if the ids of a vocabulary are not those that have a text."""
    field = next((name for name in _TEXTS if meta.get(name)), None)
    if field is None:
        return
    lacking = (number for number in range(vocab_size) if number not in text_of_id)
    beyond = (number for number in text_of_id if not 0 <= number < vocab_size)
    outside = f", which its vocab_size {vocab_size} does not have"
    said = []
    for what, numbers, why in (
        ("no text for", lacking, ""),
        ("texts for", beyond, outside),
    ):
        if first := [str(number) for number in itertools.islice(numbers, _NAMED + 1)]:
            noun = "ids" if len(first) > 1 else "id"
            more = ", ..." if len(first) > _NAMED else ""
            said.append(f"{what} {noun} {', '.join(first[:_NAMED])}{more}{why}")
    warn_once(
        f"{path.parent}: the {field} of its meta file has {', and '.join(said)}: its "
        f"ids are not shown as text; correct {field} or vocab_size"
    )


def has_text(text: str) -> bool:
    """Whether an id's text is neither empty nor only a part of a character."""
    return bool(text.strip("\ufffd"))


def _numbering_sha256(meta: dict, text_of_id: dict[int, str]) -> str | None:
    """Hash of the known part of an unknown tokenizer; None if nothing is known."""
    stated = meta.get("tokenizer_sha256")
    if isinstance(stated, str) and stated:
        return stated
    known = sorted(text_of_id.items()) or meta.get("tokenizer")
    if not known:
        return None
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _agreed_tokenizer(
    path: Path, meta: dict, vocab_size: int, asked: str
) -> str | None:
    """The tokenizer that fits both the meta file and the request; None if unknown."""
    stated, made = meta.get("tokenizer"), meta.get("tokenizer_sha256")
    if isinstance(stated, str) and stated not in RANKS:
        beside = str((path.parent / stated).absolute())  # Not in the current folder.
        if vocabulary.is_known(beside):
            stated = vocabulary.name_of(beside)
        elif asked == "auto":
            return None
    # A file may have been moved since.
    is_same = asked != "auto" and made == vocabulary.describe(asked).sha256
    if stated is not None and asked not in ("auto", stated) and not is_same:
        raise UserError(
            f"{path} says that the tokens were made by {stated!r}, not '{asked}': set "
            "--config.data.tokenizer=auto"
        )
    name = stated if asked == "auto" else asked
    if not vocabulary.is_known(name):
        return None  # A model can train on such ids, but they cannot become text.
    known = vocabulary.describe(name)
    if known.vocab_size != vocab_size:
        raise UserError(
            f"{path} gives vocab_size {vocab_size}, but tokenizer '{name}' has "
            f"{known.vocab_size}: correct one of them"
        )
    if made not in (None, known.sha256):
        raise UserError(
            f"{path} says that another version of tokenizer '{name}' made the tokens: "
            "give their text as --config.data.source to have it tokenized again, and "
            f"if pcagpt made the folder {path.parent}, delete it before"
        )
    return name


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles plain values. It refuses to look up any name, so no code can run."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """Refuses every name."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _read_pickle(path: Path) -> dict:
    """The fields of nanoGPT's meta.pkl; UserError unless it has plain values only."""
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        if not isinstance(meta, dict):
            raise TypeError(f"it is a {type(meta).__name__}")
    except OF_NO_FILE:
        raise
    except Exception as error:  # A damaged pickle can raise almost any error.
        if found := unreadable(error, path):
            raise found from None
        reason = " ".join(str(error).split()) or "it is damaged"
        raise UserError(
            f"{path} is refused, it must be a pickled dict of plain values ({reason}): "
            'write meta.json instead, {"vocab_size": …}'
        ) from error
    return {name: v for name, v in meta.items() if name in _PICKLED_FIELDS}
