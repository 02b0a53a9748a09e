"""Finds files that hold a tokenizer of the package."""

import functools
from pathlib import Path
from typing import Any

from pcagpt.data import gguf_header, gguf_tokenizer
from pcagpt.data.tokenizer import END_OF_TEXT, RANKS, load_tokenizer
from pcagpt.data.tokenizer_settings import disagreement, is_plain_end
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    MERGES,
    OTHER_JOINS,
    RANK_ENDING,
    VOCAB,
    fields_of,
    ids_by_text,
    letters_of,
    lines_of_merges,
)
from pcagpt.file_hashes import read_once, sha256_of_file, stamp_of
from pcagpt.json_files import read_json


def known_name(file: Path) -> str | None:
    """The name in RANKS of the same tokenizer; None without one.

    Raises UserError if the file is damaged.
    """
    is_pair = file.name == VOCAB
    name = _name_by_content(file, is_pair and stamp_of(file.with_name(MERGES)))
    return None if name and disagreement(file) else name  # `load` refuses it.


@read_once
def _name_by_content(file: Path, _: object) -> str | None:
    """As `known_name`, whatever else is beside a file, or a pair of files.

    The stamp of the second file has it read again if that one changes.
    """
    if file.suffix == RANK_ENDING:
        sha256 = sha256_of_file(file)
        return next((name for name, of in RANKS.items() if of.sha256 == sha256), None)
    if not (merges := _merges_of_gpt2s_kind(file)):
        return None
    own = ids_by_text(file)
    parts = (one if isinstance(one, list) else [one] for one in merges)
    made = ["".join(map(str, one)).replace(" ", "") for one in parts]
    fitting = (name for name, of in RANKS.items() if of.vocab_size == len(own))
    same = next((name for name in fitting if own == ids_by_text_of(name)), None)
    # Merges make all tokens but the bytes and the end of text, in the order of ids.
    return same if same and made == list(ids_by_text_of(same))[256:-1] else None


def _merges_of_gpt2s_kind(file: Path) -> list[Any] | None:
    """The merges in a file that cuts and joins a text as GPT-2 does; None in others."""
    if file.name == VOCAB:
        return lines_of_merges(file)
    if file.suffix == gguf_header.ENDING:
        fields = gguf_header.tokenizer_fields(file)
        return fields.merges if gguf_tokenizer.is_gpt2s_kind(fields) else None
    whole = fields_of(file)
    model, cut = (
        part if isinstance(part := whole.get(name), dict) else {}
        for name in ("model", "pre_tokenizer")
    )
    is_cut_so = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    is_changed = cut.get("add_prefix_space") or whole.get("normalizer")
    is_joined_so = not any(map(model.get, OTHER_JOINS))
    added = whole.get("added_tokens")
    # Another added token would be found in a text before it is cut.
    has_end = isinstance(added, list) and added and all(map(is_plain_end, added))
    if not (model and is_cut_so and not is_changed and is_joined_so and has_end):
        return None
    model = (read_json(file, DAMAGED) or {}).get("model")  # It may be another by now.
    merges = model.get("merges") if isinstance(model, dict) else None
    return merges if isinstance(merges, list) else None


@functools.cache
def ids_by_text_of(name: str) -> dict[str, int]:
    """vocab.json of a tokenizer of the package."""
    encoding = load_tokenizer(name)
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    found = {letters_of(token): number for number, token in enumerate(tokens)}
    return found | {END_OF_TEXT: encoding.eot_token}
