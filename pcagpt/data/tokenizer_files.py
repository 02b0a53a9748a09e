"""Tokenizers in a person's files: Hugging Face's, those in GGUF, or tiktoken's ranks.

Hugging Face's are tokenizer.json, or vocab.json and merges.txt; the package
`tokenizers` runs them. transformers makes one of what a GGUF file has
(`gguf_tokenizer`). Ranks (.tiktoken) must be for GPT-2's pattern.
"""

import hashlib
from pathlib import Path
from typing import Any

import tiktoken

from pcagpt.data import gguf_header, gguf_tokenizer
from pcagpt.data.file_tokenizer import FileTokenizer, naming
from pcagpt.data.tokenizer import END_OF_TEXT, Numbering, encoding_from_ranks
from pcagpt.data.tokenizer_settings import (
    SAVE_WHOLE,
    check_kind,
    disagreement,
    end_beside,
)
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    MERGES,
    RANK_ENDING,
    VOCAB,
    WHOLE,
    added_from,
    check_merges,
    fields_of,
    ids_by_text,
    ranks_in,
)
from pcagpt.errors import UserError
from pcagpt.file_hashes import sha256_of_file
from pcagpt.files import odd_kind

# Normalizers in tokenizer.json that drop no character.
_KEEPING = ("ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend")


def file_of(path: Path) -> Path | None:
    """The main file of the tokenizer in a folder or file; None without one.

    UserError if a file of the folder is a link to nothing.
    """
    if path.is_dir():
        for name in (WHOLE, VOCAB, MERGES):
            if kind := odd_kind(path / name):
                raise UserError(f"{path / name} is {kind}, not a file: {DAMAGED}")
        inside = (path / name for name in (WHOLE, VOCAB))
        return next((file for file in inside if _is_tokenizer(file)), None)
    return path if _is_tokenizer(path) else None


def _is_tokenizer(file: Path) -> bool:
    endings = (RANK_ENDING, gguf_header.ENDING)
    has_ending = file.suffix in endings or file.name == WHOLE
    has_merges = file.name == VOCAB and file.with_name(MERGES).is_file()
    return file.is_file() and (has_ending or has_merges)


def describe(file: Path) -> Numbering:
    """Size and hash of the tokenizer with this main file; UserError if it is damaged.

    Needs no package, except of GGUF.
    """
    if file.suffix == gguf_header.ENDING:
        fields = gguf_header.tokenizer_fields(file)
        sha256 = fields.sha256
        if gguf_tokenizer.is_changed(file):
            # Earlier versions left it as transformers makes it.
            sha256 = hashlib.sha256(f"{sha256} changed".encode()).hexdigest()
        return Numbering(len(fields.tokens), sha256)
    sha256 = sha256_of_file(file)
    if file.name == VOCAB:
        check_kind(file)
        pair = sha256 + sha256_of_file(file.with_name(MERGES))
        sha256 = hashlib.sha256(pair.encode()).hexdigest()
    if file.suffix == RANK_ENDING:
        return Numbering(ranks_in(file)[1], sha256)
    check_merges(file)
    if END_OF_TEXT not in ids_by_text(file):  # Other files name what ends documents.
        pair = f"{sha256} {end_beside(file)}"
        sha256 = hashlib.sha256(pair.encode()).hexdigest()
    if file.name == WHOLE and _changes_texts(file):
        # Earlier versions obeyed the file and made other tokens.
        sha256 = hashlib.sha256(f"{sha256} whole texts".encode()).hexdigest()
    size = max(ids_by_text(file).values()) + 1
    return Numbering(size, sha256, added_from(file, size))


def load(file: Path) -> tiktoken.Encoding | FileTokenizer:
    """The tokenizer with this main file.

    Raises UserError if it is damaged, or needs a package that is not installed.
    """
    if file.suffix == RANK_ENDING:
        ranks, vocab_size = ranks_in(file)
        return encoding_from_ranks(str(file), ranks, vocab_size)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"{file} can only be used with the package `tokenizers`: "
            "pip install 'pcagpt[hf]'"
        ) from None
    if file.suffix == gguf_header.ENDING:
        return gguf_tokenizer.load(file)
    if file.name == VOCAB:
        check_kind(file)
    with naming(file):
        made = _byte_level(tokenizers, file) if file.name == VOCAB else None
        made = made or tokenizers.Tokenizer.from_file(str(file))
        # A file can ask for these; they would change the tokens of a text.
        made.no_truncation()
        made.no_padding()
        if getattr(made.model, "dropout", None):
            made.model.dropout = None
    id_of_text = ids_by_text(file)
    check_merges(file)
    if problem := disagreement(file):
        raise UserError(f"{file} {problem}: {SAVE_WHOLE}")
    texts = (END_OF_TEXT, end_beside(file))
    ends = (id_of_text[text] for text in texts if text in id_of_text)
    return FileTokenizer(file, made, id_of_text.values(), next(ends, None))


def _byte_level(tokenizers: Any, file: Path) -> Any:
    """GPT-2's kind of tokenizer with another vocabulary."""
    merges = str(file.with_name(MERGES))
    model = tokenizers.models.BPE.from_file(str(file), merges)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT])
    return made


def _changes_texts(whole: Path) -> bool:
    """Whether a tokenizer.json asks to cut off, fill up or vary texts."""
    content = fields_of(whole)
    model = content.get("model")
    has_dropout = isinstance(model, dict) and model.get("dropout")
    return bool(content.get("truncation") or content.get("padding") or has_dropout)


def drops_characters(file: Path) -> bool:
    """Whether a normalizer may drop characters, such as spaces at the end of a text."""
    if file.name != WHOLE:  # What is made of other files has none that does.
        return False
    return _drops(fields_of(file).get("normalizer"))


def _drops(normalizer: Any) -> bool:
    """`drops_characters` of a normalizer, or a part of one, in a tokenizer.json."""
    match normalizer:
        case None:
            return False
        case {"type": "Sequence", "normalizers": [*parts]}:
            return any(map(_drops, parts))
        case {"type": "Replace", "pattern": {"String": _}, "content": str(content)}:
            return not content  # Llama's puts a mark for each space.
        case {"type": kind}:
            return kind not in _KEEPING
    return True
