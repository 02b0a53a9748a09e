"""Text source -> a folder of token files, whole or not at all."""

import contextlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

from pcagpt.data.sources import Document, TextSource
from pcagpt.data.token_files import DTYPES
from pcagpt.data.tokenizer import tokenizer_sha256
from pcagpt.files import write_json

_PIECE_CHARACTERS = 1 << 16
# GPT-2's pattern never matches across this place, so that text cut there encodes as
# the whole does. Python's \S excludes every space of the pattern's \s, and a few more.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def write_token_folder(
    folder: Path, source: TextSource, encoding: tiktoken.Encoding
) -> None:
    """Tokenize every split of `source` into `folder`, which appears whole or not.

    Any number of processes may do so at the same time: the first to end wins. Says
    how far it is on stderr every two seconds.
    """
    # A name that no other process has, on this host or another.
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    made = [parent for parent in draft.parents if not parent.exists()]
    try:
        draft.mkdir(parents=True)
        _write_splits(draft, source, encoding)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster and wrote the same; anything else is an error.
            if not folder.is_dir():
                raise
            shutil.rmtree(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: of use to someone else
            for parent in made:
                parent.rmdir()
        raise


def _write_splits(
    folder: Path, source: TextSource, encoding: tiktoken.Encoding
) -> None:
    """Write `<split>.bin` of every split, then meta.json."""
    dtype = "uint16" if encoding.n_vocab <= 1 << 16 else "uint32"
    counts = dict.fromkeys(source.documents, 0)
    characters, said = 0, time.monotonic()
    for split, documents in source.documents.items():
        with (folder / f"{split}.bin").open("wb") as file:
            for ids, length in _encode(documents(), encoding):
                file.write(np.asarray(ids, DTYPES[dtype]).tobytes())
                counts[split] += len(ids)
                characters += length
                if time.monotonic() - said > 2:
                    said = time.monotonic()
                    print(
                        f"tokenizing {source.name}: {characters / 1e6:.1f} million "
                        f"characters, now in {split}",
                        file=sys.stderr,
                    )
    meta = {
        "name": source.name,
        "vocab_size": encoding.n_vocab,
        "dtype": dtype,
        "tokenizer": encoding.name,
        "tokenizer_sha256": tokenizer_sha256(encoding.name),
        "tokens": counts,
    }
    write_json(folder / "meta.json", meta)


def _encode(
    documents: Iterable[Document], encoding: tiktoken.Encoding
) -> Iterator[tuple[list[int], int]]:
    """Yield consecutive (ids, characters read), `<|endoftext|>` first in a document."""
    pieces = (
        (number == 0, piece)
        for document in documents
        for number, piece in enumerate(_pieces(document))
    )
    threads = os.cpu_count() or 1
    while batch := list(islice(pieces, 8 * threads)):
        texts = [text for _, text in batch]
        encoded = encoding.encode_ordinary_batch(texts, num_threads=threads)
        for (first, text), ids in zip(batch, encoded, strict=True):
            yield [encoding.eot_token] * first + ids, len(text)


def _pieces(document: Document) -> Iterator[str]:
    """Cut a document into pieces that encode, one by one, as the whole would."""
    parts: list[str] = []
    size, enough = 0, _PIECE_CHARACTERS
    for block in document:
        parts.append(block)
        size += len(block)
        if size < enough:
            continue
        text = "".join(parts)
        cut = _LAST_CUT.match(text)
        if cut:
            yield cut.group()
            text = text[cut.end() :]
        parts, size = [text], len(text)
        # Doubling keeps the work linear where there is no place to cut.
        enough = max(_PIECE_CHARACTERS, 2 * size)
    if size:
        yield "".join(parts)
