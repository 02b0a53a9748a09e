"""Writes a tokenizer as the files that Hugging Face's programs read."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from pcagpt.data import gguf_header, tokenizer_files, vocabulary
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.tokenizer_settings import (
    CONFIG,
    GPT2,
    class_beside,
    config_beside,
)
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    MERGES,
    VOCAB,
    WHOLE,
    added_tokens,
    fields_of,
    letters_of,
)
from pcagpt.files import write_text
from pcagpt.json_files import read_json, write_json, write_plain_json

_OTHERS = (MERGES, CONFIG, "special_tokens_map.json", "added_tokens.json")
# What a tokenizer may consist of.
FILES = (WHOLE, VOCAB, "tokenizer.model", *_OTHERS)
# What a person's folder may have beside the main file.
_BESIDE = (*_OTHERS, "chat_template.jinja", "chat_template.json", "tokenizer.model")
_OF_PACKAGED = (WHOLE, VOCAB, *_BESIDE[:-1])
GENERAL = "PreTrainedTokenizerFast"  # a class of transformers that obeys the file


def write(
    folder: Path, name: str, length: int | None, own: Mapping[str, Any] | None = None
) -> None:
    """Writes the tokenizer with a name of `vocabulary` for texts of `length` tokens.

    None: of any length. `own`: `own_files` of the files that it came with, for a
    tokenizer of the package. No other files are written then.
    """
    encoding = vocabulary.load(name)
    if not isinstance(encoding, tiktoken.Encoding):
        file = Path(name)
        if file.suffix == gguf_header.ENDING:
            write_plain_json(folder / WHOLE, encoding.whole())
            config = {
                "tokenizer_class": GENERAL,
                "eos_token": encoding.end_of_text,
                "model_max_length": length,
            }
            write_plain_json(folder / CONFIG, config)
            return
        beside = (file.with_name(other) for other in _BESIDE)
        for path in (file, *filter(Path.is_file, beside)):
            shutil.copyfile(path, folder / path.name)
        _name_class(folder, file, encoding.end_of_text, length)
        return
    tokens = list(map(encoding.decode_single_token_bytes, range(encoding.eot_token)))
    pairs = [" ".join(map(letters_of, pair)) for pair in _merges(tokens)]
    vocab = {letters_of(token): number for number, token in enumerate(tokens)}
    vocab |= {END_OF_TEXT: encoding.eot_token}
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
        },
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    plain = {VOCAB: {}, MERGES: {}, WHOLE: whole, CONFIG: config}
    for file, content in (own or plain).items():
        if file == MERGES:
            content = "\n".join(["#version: 0.2", *pairs, ""])
        elif file == VOCAB:
            content = vocab
        elif file == WHOLE:
            model = content["model"] | {"vocab": vocab, "merges": pairs}
            content = content | {"model": model}
        write = write_text if isinstance(content, str) else write_plain_json
        write(folder / file, content)


def _name_class(
    folder: Path, file: Path, end_of_text: str | None, length: int | None
) -> None:
    """Names the class of a person's tokenizer in an export if its own files do not.

    transformers would choose one by the kind of the model. Those of GPT-2 and Qwen, for
    example, take the vocabulary of a tokenizer.json and cut texts in their own way.
    """
    own = read_json(file.with_name(CONFIG), DAMAGED) or {}
    if own.get("tokenizer_class"):
        return
    kind = class_beside(file) or (GPT2 if file.name == VOCAB else GENERAL)
    more: dict[str, Any] = {"tokenizer_class": kind}
    if not own:  # Settings without a length do not cut texts.
        more["model_max_length"] = length
    if end_of_text in [one["content"] for one in added_tokens(file)]:
        more["eos_token"] = end_of_text
    stated = {name for name, of in config_beside(file).items() if of is not None}
    more = {name: of for name, of in more.items() if name not in stated}
    write_plain_json(folder / CONFIG, own | more)


def own_files(folder: Path) -> dict[str, Any]:
    """{name: content} of the files of a tokenizer of the package in a folder.

    Its vocabulary and its merges are left out: the package has them. All else is kept,
    such as a token before each text and the template of a chat.
    """
    main = tokenizer_files.file_of(folder)
    if main is None or main.name not in (WHOLE, VOCAB):
        return {}
    found: dict[str, Any] = {}
    for file in filter(Path.is_file, (folder / name for name in _OF_PACKAGED)):
        if file.name in (VOCAB, MERGES):
            found[file.name] = {}
        elif file.name == WHOLE:
            found[file.name] = fields_of(file)
        elif file.suffix == ".json":
            found[file.name] = read_json(file, DAMAGED)
        else:
            found[file.name] = file.read_bytes().decode("utf-8", "replace")
    # The config.json of an export may be one that tells transformers no class.
    config = found.get(CONFIG, {})
    kind = config.get("tokenizer_class") or class_beside(main) or GPT2
    return found | {CONFIG: config | {"tokenizer_class": kind}}


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
