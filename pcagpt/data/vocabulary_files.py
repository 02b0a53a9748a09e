"""What the main file of a tokenizer says: its tokens with their ids, and its merges."""

import base64
import binascii
import functools
import re
from pathlib import Path
from typing import Any

from pcagpt.data import gguf_header
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.errors import UserError, warn_once
from pcagpt.file_hashes import read_once, sha256_of_file, stamp_of
from pcagpt.json_files import read_json

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
RANK_ENDING = ".tiktoken"
DAMAGED = "restore it, or download it again"
_BIG = ("vocab", "merges")  # take seconds to read, and much memory
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token, as in Llama 2
# Fields of a model in tokenizer.json with which it joins bytes in another way.
OTHER_JOINS = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# Rank files of OpenAI's whose patterns are not GPT-2's.
_OTHER_PATTERNS = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}


@read_once
def ids_by_text(file: Path) -> dict[str, int]:
    """{text as the file writes it: id} of a tokenizer of Hugging Face's."""
    if file.suffix == gguf_header.ENDING:
        tokens = gguf_header.tokenizer_fields(file).tokens
        return {text: number for number, text in enumerate(tokens)}
    content = read_json(file, DAMAGED) or {}
    if file.name == VOCAB:
        vocabulary, added = content, ()
    else:
        model, added = content.get("model"), content.get("added_tokens") or ()
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):  # A unigram model's have scores.
            vocabulary = {str(pair[0]): n for n, pair in enumerate(vocabulary)}
        found = dict(vocabulary) | {one["content"]: one["id"] for one in added}
    except (TypeError, ValueError, LookupError):
        found = {}
    if not found or any(type(number) is not int for number in found.values()):
        raise UserError(f"{file} is damaged (it has no vocabulary): {DAMAGED}")
    text_of: dict[int, str] = {}
    for text, number in found.items():
        if text_of.setdefault(number, text) != text:
            raise UserError(
                f"{file} is damaged (id {number} has two texts, {text_of[number]!r} "
                f"and {text!r}): {DAMAGED}"
            )
    return found


@read_once
def fields_of(whole: Path) -> dict[str, Any]:
    """What a tokenizer.json says besides its vocabulary and merges."""
    content = read_json(whole, DAMAGED) or {}
    if isinstance(model := content.get("model"), dict):
        content["model"] = {n: of for n, of in model.items() if n not in _BIG}
    return content


def added_tokens(file: Path) -> list[dict[str, Any]]:
    """The added tokens that a tokenizer.json states; [] for another file."""
    return (fields_of(file) if file.name == WHOLE else {}).get("added_tokens") or []


@read_once
def added_from(file: Path, size: int) -> int | None:
    """The first id of the added tokens at the end; `size` without any.

    None for a file of another kind, which does not name them.
    """
    if file.name != WHOLE:
        return None
    added = {one["id"] for one in added_tokens(file)}
    first = size
    while first - 1 in added:
        first -= 1
    return first


@read_once
def ranks_in(file: Path) -> tuple[dict[bytes, int], int]:
    """({token: rank}, number of ids with `<|endoftext|>`) of a rank file.

    The special token has the id after the last rank.
    """
    if name := _OTHER_PATTERNS.get(sha256_of_file(file)):
        raise UserError(
            f"{file} is {name}, which cuts text in another way than GPT-2: give its "
            f"{WHOLE} instead"
        )
    try:
        rows = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error):
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(
            f"{file} is damaged: it must have lines of base64 tokens and their ranks, "
            "0, 1, 2 and so on"
        )
    return ranks, len(ranks) + 1


def lines_of_merges(vocab: Path) -> list[str]:
    """The merges in the merges.txt beside a vocab.json."""
    lines = vocab.with_name(MERGES).read_text("utf-8", "replace").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def check_merges(file: Path) -> None:
    """UserError if no merge makes most tokens; a warning if it is so of a few.

    Then merges were cut off, and texts get other tokens. In the intact files of Llama
    2 and 3, Gemma 3, Qwen 3, DeepSeek-V3, gpt-oss and Claude, merges make all tokens
    but letters, bytes and added tokens. Others may have some more special tokens.
    """
    place = file.with_name(MERGES) if file.name == VOCAB else file
    lacking, size = _unmade(file, stamp_of(place))
    said = f"no merge makes {len(lacking):,} of {size:,} tokens"
    if 2 * len(lacking) > size:
        raise UserError(f"{place} is damaged ({said}): {DAMAGED}")
    if lacking:
        warn_once(
            f"{place}: {said}, such as {lacking[0]!r}; if the file was cut off, texts "
            f"get other tokens than the model knows: {DAMAGED}"
        )


@read_once
def _unmade(file: Path, _: object) -> tuple[list[str], int]:
    """(tokens that no merge makes although they need one, how many need one).

    The stamp of merges.txt has a pair of files read again if that one changes.
    """
    if file.name == VOCAB:
        model, merges, added = {}, lines_of_merges(file), ()
    else:
        whole = read_json(file, DAMAGED) or {}
        model, added = whole.get("model"), whole.get("added_tokens") or ()
        merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):  # It joins no letters.
        return [], 0
    start, end = (model.get(name) or "" for name in OTHER_JOINS[1:])
    pairs = (one if isinstance(one, list) else str(one).split(" ") for one in merges)
    made = {str(one[0]) + str(one[-1]).removeprefix(start) for one in pairs if one}
    texts = ids_by_text(file)
    known = {END_OF_TEXT, *(one["content"] for one in added)}
    needing = [
        text
        for text in texts
        if len(text.removeprefix(start).removesuffix(end)) > 1
        and not (text in known or _BYTE.fullmatch(text))
    ]
    return [text for text in needing if text not in made], len(needing)


@functools.cache
def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's files, in its order of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{byte: chr(byte) for byte in plain},
        **{byte: chr(256 + number) for number, byte in enumerate(others)},
    }


def letters_of(token: bytes) -> str:
    """A token as GPT-2's files write it: a letter for each byte."""
    return "".join(map(byte_letters().__getitem__, token))
