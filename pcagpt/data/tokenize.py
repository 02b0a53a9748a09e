"""Text -> a folder of token files."""

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken

from pcagpt import process
from pcagpt.data import vocabulary
from pcagpt.data.file_tokenizer import Lacking
from pcagpt.data.meta import DTYPES, CorpusInfo, narrowest
from pcagpt.data.sources import Document, TextSource
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.words import WordCounter
from pcagpt.errors import UserError
from pcagpt.file_hashes import sha256_of_file
from pcagpt.files import sync, write_file
from pcagpt.json_files import write_json

_PIECE_CHARACTERS = 1 << 16
# GPT-2's pattern never matches across this cut, so both parts encode to the same ids as
# the whole. Python's \S excludes every space that the pattern's \s matches.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)
_EDGE = re.compile(r"\b")  # of a word: where other tokenizers may allow a cut
# Characters on each side of a cut that are compared; the second if the first keep fewer
# tokens than `_FEWEST`. `_TRIED` characters have cuts to try.
_CONTEXTS, _FEWEST, _TRIED = (64, 1024), 8, 1024
_LONGEST_PIECE = 1 << 22  # characters
Cut = tuple[int, int]  # the end of one piece and the start of the next


class _Piece(NamedTuple):
    """A part of a document that is encoded at once.

    left_out: the space behind it that is in no piece, or nothing.
    """

    text: str
    left_out: str = ""
    is_first: bool = False


def write_token_folder(
    folder: Path, source: TextSource, info: CorpusInfo, fingerprints: tuple[str, ...]
) -> None:
    """Tokenizes every split of `source` into `folder`, with progress on stderr.

    The folder appears only when it is complete. If several processes write it at the
    same time, the first one wins, and removes all drafts, also those of killed ones.
    UserError if the text no longer has the `fingerprints` from which the folder's name
    was made, or if the tokenizer has no token for a character.
    """
    # Only the hash at the end: the folder's name may be as long as a name can be.
    start = f".{folder.name.rpartition('-')[2]}."
    draft = folder.with_name(f"{start}{secrets.token_hex(4)}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.mkdir()
        try:
            _write_splits(draft, source, info)
            is_same = source.fingerprints() == fingerprints
        except UnicodeDecodeError:  # It was UTF-8 when its fingerprints were taken.
            is_same = False
        if not is_same:
            raise UserError(
                f"the text {source.name} changed while it was read: run the command "
                "again"
            )
        draft.rename(folder)
        sync(folder.parent)
    except (OSError, UserError):
        if not folder.is_dir():  # No other process wrote it first.
            raise
    finally:
        drafts = folder.parent.glob(f"{start}*") if folder.is_dir() else [draft]
        for path in drafts:
            shutil.rmtree(path, ignore_errors=True)
        # A failure leaves no empty folder behind.
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _write_splits(folder: Path, source: TextSource, info: CorpusInfo) -> None:
    """Writes `<split>.bin` of every split, then meta.json."""
    counts = dict.fromkeys(source.documents, 0)
    unknown, unended, text_bytes = dict(counts), dict(counts), dict(counts)
    words = {split: WordCounter() for split in counts}
    dtype = narrowest(info.vocab_size)
    characters, reported = 0, time.monotonic()

    def write(split: str, file: BinaryIO) -> None:
        nonlocal characters, reported
        tokenizer = vocabulary.load(info.tokenizer)
        of_unknown, end = getattr(tokenizer, "unknown", None), tokenizer.eot_token
        ends = 0
        for ids, piece, without in _encode(source.documents[split](), tokenizer):
            if not counts[split] and ids[:1] != [end]:  # No model predicts it.
                text_bytes[split] -= len(tokenizer.decode(ids[:1]).encode())
            file.write(np.asarray(ids, DTYPES[dtype]).tobytes())
            counts[split] += len(ids)
            if of_unknown is not None:
                unknown[split] += ids.count(of_unknown)
            text_bytes[split] += _count_text(piece, words[split], end is not None)
            characters += len(piece.text)
            ends += without
            if process.shows_progress() and time.monotonic() - reported > 2:
                reported = time.monotonic()
                print(
                    f"tokenizing {source.name}: {characters / 1e6:.1f} million "
                    f"characters so far, now in {split}",
                    file=sys.stderr,
                )

        unended[split] = max(ends - 1, 0)  # Nothing comes after the last document.

    for split in source.documents:
        try:
            write_file(folder / f"{split}.bin", partial(write, split))
        except Lacking as error:
            raise UserError(f"the {split} split of {source.name}: {error}") from None
    meta = {
        "name": info.name,
        "vocab_size": info.vocab_size,
        "dtype": dtype,
        "tokenizer": info.tokenizer,
        "tokenizer_sha256": info.tokenizer_sha256,
        "tokens": counts,
        "unknown_tokens": unknown,
        "unended_documents": unended,
        "text_words": {split: counter.count for split, counter in words.items()},
        "text_bytes": text_bytes,
        "tokens_sha256": {
            split: sha256_of_file(folder / f"{split}.bin") for split in counts
        },
    }
    write_json(folder / "meta.json", meta)


def _count_text(piece: _Piece, words: WordCounter, has_ends: bool) -> int:
    """Adds the words of a piece to `words` and returns its UTF-8 bytes.

    has_ends: whether `<|endoftext|>` is a token, which is not part of the text.
    """
    text = piece.text + piece.left_out
    texts = text.split(END_OF_TEXT) if has_ends else [text]
    for number, one in enumerate(texts):
        if number or piece.is_first:
            words.end()
        words.add(one)
    return sum(len(one.encode()) for one in texts)


def _encode(
    documents: Iterable[Document], encoding: vocabulary.Tokenizer
) -> Iterator[tuple[list[int], _Piece, int]]:
    """Yields (ids, piece, ends without a token) of each piece.

    What ends a text starts a document. `<|endoftext|>` inside a document is the same
    token, as in GPT-2's own corpora.
    """
    allowed = {END_OF_TEXT}
    encode = partial(encoding.encode, allowed_special=allowed)
    cut = partial(_checked_cut, encode)
    # Only GPT-2's pattern is known to allow cuts.
    is_known = isinstance(encoding, tiktoken.Encoding)
    pieces_of = partial(_pieces, cut=_known_cut if is_known else cut)
    pieces = (
        piece._replace(is_first=number == 0)
        for document in documents
        for number, piece in enumerate(pieces_of(document))
    )
    mark = [] if encoding.eot_token is None else [encoding.eot_token]
    threads = os.cpu_count() or 1
    # tiktoken encodes the texts of a batch in parallel threads.
    while batch := list(islice(pieces, 8 * threads)):
        texts = [piece.text for piece in batch]
        encoded = encoding.encode_batch(
            texts, num_threads=threads, allowed_special=allowed
        )
        for piece, ids in zip(batch, encoded, strict=True):
            # A text that marks its documents itself gets no second mark.
            is_marked = ids[:1] == mark
            lost = 0 if mark else piece.is_first + piece.text.count(END_OF_TEXT)
            yield mark * (piece.is_first and not is_marked) + ids, piece, lost


def _pieces(document: Document, cut: Callable[[str], Cut | None]) -> Iterator[_Piece]:
    """Cuts a document into pieces that encode to the ids of the whole document."""
    blocks, size, enough = [], 0, _PIECE_CHARACTERS
    for block in document:
        blocks.append(block)
        size += len(block)
        if size < enough:
            continue
        text = "".join(blocks)
        if found := cut(text):
            end, start = found
            yield _Piece(text[:end], text[end:start])
            text = text[start:]
        blocks, size = [text], len(text)
        # Doubling keeps the work linear if the text has no place to cut.
        enough = max(_PIECE_CHARACTERS, 2 * size)
    if blocks:  # Tokens have empty documents, files without a line are none.
        yield _Piece("".join(blocks))


def _known_cut(text: str) -> Cut | None:
    """The last place where GPT-2's pattern allows a cut."""
    found = _LAST_CUT.match(text)
    return found and (found.end(), found.end())


def _checked_cut(encode: Callable[[str], list[int]], text: str) -> Cut | None:
    """The last place that changes no id around it, for any tokenizer.

    A tokenizer that puts a mark for a space before each text needs this space left out.
    A very long text without such a place is cut at its end, so that memory is bounded.
    """
    last = len(text) - _CONTEXTS[0]
    edges = [m.start() for m in _EDGE.finditer(text, max(last - _TRIED, 1), last)]
    for end in reversed(edges):
        for start in (end, end + 1) if text[end] == " " else (end,):
            if _keeps_ids(encode, text, end, start):
                return end, start
    return (len(text), len(text)) if len(text) >= _LONGEST_PIECE else None


def _keeps_ids(
    encode: Callable[[str], list[int]], text: str, end: int, start: int
) -> bool:
    """Whether a cut changes no id around it.

    Tokenizers may drop characters, such as white space at the ends of a text. Only what
    is left of each side shows what the cut does.
    """
    for context in _CONTEXTS:
        begin, stop = max(end - context, 0), start + context
        try:
            left, right = encode(text[begin:end]), encode(text[start:stop])
            if left + right != encode(text[begin:stop]):
                return False
        except Lacking:  # Perhaps of a part of a special token, or an accent alone.
            return False
        if min(len(left), len(right)) >= _FEWEST:
            return True
    return False
