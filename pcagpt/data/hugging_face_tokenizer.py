"""Writes a tokenizer as the files that Hugging Face's programs read."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from pcagpt.data import gguf_header, vocabulary
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.tokenizer_settings import CONFIG
from pcagpt.data.vocabulary_files import MERGES, VOCAB, WHOLE, letters_of
from pcagpt.files import write_text
from pcagpt.json_files import write_json, write_plain_json

_OTHERS = (MERGES, CONFIG, "special_tokens_map.json", "added_tokens.json")
# What a tokenizer may consist of.
FILES = (WHOLE, VOCAB, "tokenizer.model", *_OTHERS)
# What a person's folder may have beside the main file.
_BESIDE = (*_OTHERS, "chat_template.jinja", "chat_template.json", "tokenizer.model")


def write(
    folder: Path, name: str, length: int | None, own: Mapping[str, Any] | None = None
) -> None:
    """Writes the tokenizer with a name of `vocabulary` for texts of `length` tokens.

    None: of any length. `own`: `tokenizer_files.own_settings` of the files that it came
    with, for a tokenizer of the package.
    """
    encoding = vocabulary.load(name)
    if not isinstance(encoding, tiktoken.Encoding):
        file = Path(name)
        if file.suffix == gguf_header.ENDING:
            write_plain_json(folder / WHOLE, encoding.whole())
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": encoding.end_of_text,
                "model_max_length": length,
            }
            write_plain_json(folder / CONFIG, config)
            return
        beside = (file.with_name(other) for other in _BESIDE)
        for path in (file, *filter(Path.is_file, beside)):
            shutil.copyfile(path, folder / path.name)
        return
    tokens = list(map(encoding.decode_single_token_bytes, range(encoding.eot_token)))
    pairs = [" ".join(map(letters_of, pair)) for pair in _merges(tokens)]
    vocab = {letters_of(token): number for number, token in enumerate(tokens)}
    write_plain_json(folder / VOCAB, vocab | {END_OF_TEXT: encoding.eot_token})
    write_text(folder / MERGES, "\n".join(["#version: 0.2", *pairs, ""]))
    special = {"special": True, "normalized": False, "single_word": False}
    special |= {"id": encoding.eot_token, "lstrip": False, "rstrip": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | {"content": END_OF_TEXT}],
        "normalizer": None,
        "pre_tokenizer": bytes_only | {"use_regex": True},
        "post_processor": bytes_only | {"use_regex": True},
        "decoder": bytes_only | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab | {END_OF_TEXT: encoding.eot_token},
            "merges": pairs,
        },
    }
    write_plain_json(folder / WHOLE, whole)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    write_plain_json(folder / CONFIG, config | (own or {}))


def write_characters(folder: Path, texts: Sequence[str]) -> None:
    """Writes the text of each id as meta.json, which only pcagpt reads."""
    write_json(folder / "meta.json", {"vocab_size": len(texts), "itos": list(texts)})


def _merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair encoding joins, in their order.

    Each token of several bytes is the pair that is left when the joins before it have
    been made.
    """
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            joined = [rank_of.get(a + b, rank) for a, b in pairwise(parts)]
            at = min(range(len(joined)), key=joined.__getitem__)
            if joined[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
