"""Tokens of one tokenizer as text, so that another one can encode them."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np

from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.meta import has_text
from pcagpt.data.sources import Document, TextSource
from pcagpt.data.text_stream import texts_of
from pcagpt.data.token_array import TokenArray, pieces
from pcagpt.errors import UserError

_PART = 1 << 14  # tokens that are decoded at a time
_WAY = 2  # of decoding: caches of another one hold other tokens


class Tokens(Protocol):
    """What is read of a `corpus.Corpus`."""

    name: str
    folder: Path
    splits: tuple[str, ...]
    tokenizer: str | None
    tokenizer_sha256: str | None
    characters: tuple[str, ...] | None

    def tokens(self, split: str) -> TokenArray:
        """Token ids of a split: [n]."""

    def tokens_sha256(self, split: str) -> str:
        """Hash of all ids of a split."""


def as_text(corpus: Tokens, tokenizer: str) -> TextSource:
    """The text of a corpus's tokens, for a tokenizer with another numbering.

    What lies between two tokens `<|endoftext|>` is a document. The tokens are read when
    the text is. Raises UserError if nothing tells their text.
    """
    own = corpus.tokenizer or ("its meta file" if corpus.characters else None)
    if own is None:
        raise UserError(
            f"{corpus.folder} holds tokens of another tokenizer than {tokenizer}, and "
            "its meta file does not tell their text: give the text as "
            "--config.data.source"
        )

    lost = sum(not has_text(text) for text in corpus.characters or ())
    without = f"; {lost} of the ids stand for no text and are lost" if lost else ""

    def fingerprints() -> tuple[str]:
        hashes = {split: corpus.tokens_sha256(split) for split in corpus.splits}
        parts = json.dumps([hashes, corpus.tokenizer_sha256, _WAY])
        return (hashlib.sha256(parts.encode()).hexdigest(),)

    return TextSource(
        re.sub(r"[^\w.-]+", "_", corpus.name),
        tokenizer,
        fingerprints,
        {split: partial(_documents, corpus, split) for split in corpus.splits},
        f"the tokens in {corpus.folder} are those of {own}: they are decoded, and "
        f"encoded again by {tokenizer}{without}",
    )


def _documents(corpus: Tokens, split: str) -> Iterator[Document]:
    """The documents of a split, each as blocks of text."""
    decode, end = _decoder(corpus)
    parts = _parts(corpus.tokens(split), end)
    for _, parts_of_one in itertools.groupby(parts, itemgetter(0)):
        yield _texts(decode, (ids for _, ids in parts_of_one))


def _parts(tokens: TokenArray, end: int | None) -> Iterator[tuple[int, list[int]]]:
    """(number of the document, a part of its ids), without the ends of documents.

    An end at the very end begins an empty document only if they stand before documents.
    """
    number, seen, stand_before = 0, 0, end in tokens[:1].tolist()
    for chunk in pieces(tokens):
        ends = [] if end is None else np.flatnonzero(chunk == end)
        for place, part in enumerate(np.split(chunk, ends)):
            number += place > 0
            seen += len(part)
            ids = part[place > 0 :]
            if place and (stand_before or len(ids) or seen < len(tokens)):
                yield number, []  # Otherwise, an empty document would be lost.
            for start in range(0, len(ids), _PART):
                yield number, ids[start : start + _PART].tolist()


def _decoder(corpus: Tokens) -> tuple[Callable[[list[int]], str], int | None]:
    """(what decodes the ids of a corpus, the id that ends documents)."""
    if corpus.tokenizer is None:
        return CharacterTokenizer(corpus.characters or ()).decode, None
    tokenizer = vocabulary.load(corpus.tokenizer)
    return tokenizer.decode, tokenizer.eot_token


def _texts(
    decode: Callable[[list[int]], str], parts: Iterable[list[int]]
) -> Iterator[str]:
    """All text of the parts of a document."""
    yield (yield from texts_of(parts, decode))
