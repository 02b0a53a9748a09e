"""A corpus: token files of the splits train, val and test.

Tokenizing text keeps it byte for byte and puts `<|endoftext|>` before every document. A
document is one address in `sotu`, a whole split in `wikitext103`, and a whole file in a
folder of text files.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcagpt.data.sources import find_source
from pcagpt.data.token_files import DTYPES, CorpusInfo, present_splits, read_meta
from pcagpt.data.tokenize import write_token_folder
from pcagpt.data.tokenizer import load_tokenizer, tokenizer_sha256
from pcagpt.errors import UserError

_RECIPE = 1  # part of a cache folder's name; raise it if the code changes the tokens
_CHUNK_TOKENS = 1 << 20


class TextSize(NamedTuple):
    """Size of a split's text.

    As in WikiText, whitespace separates words and each line end is one more word (its
    raw validation text has 217,646).
    """

    words: int
    bytes: int


@dataclass(frozen=True)
class Corpus(CorpusInfo):
    """A folder of token files, `<split>.bin`: little-endian ids without a header."""

    folder: Path

    def tokens(self, split: str) -> np.ndarray:
        """Token ids of a split, memory-mapped and read-only: uint16 or uint32 [n].

        The first call in a process reads the whole file to check every id. Raises
        UserError if the file is missing, empty, truncated or holds an id >= vocab_size.
        """
        tokens, status = self._map(split), self._path(split).stat()
        _check_ids(self, split, (status.st_ino, status.st_size, status.st_mtime_ns))
        return tokens

    def count_tokens(self, split: str) -> np.ndarray:
        """Number of occurrences of each token id in a split: int64 [V]."""
        return count_tokens(self.tokens(split), self.vocab_size)

    def text_size(self, split: str) -> TextSize | None:
        """Words and UTF-8 bytes of a split's text; None if the tokenizer is unknown.

        `<|endoftext|>` ends a word and is not part of the text.
        """
        if self.tokenizer is None:
            return None
        encoding = load_tokenizer(self.tokenizer)
        end = encoding.eot_token
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        words = byte_count = 0
        in_word = False
        for chunk in _chunks(self.tokens(split)):
            documents = np.split(chunk, np.flatnonzero(chunk == end))
            raw = b" ".join(
                encoding.decode_bytes(ids[ids != end].tolist()) for ids in documents
            )
            byte_count += len(raw) - (len(documents) - 1)
            text = decoder.decode(raw)
            words += len(text.split()) + text.count("\n")
            # A word that continues from the last chunk was already counted.
            words -= in_word and bool(text[:1].strip())
            in_word = bool(text[-1:].strip())
        return TextSize(words, byte_count)

    def fingerprint(self) -> str:
        """sha256 of the vocabulary size and of samples of the train and val splits.

        A sample is 64 evenly spaced runs of 4,096 tokens: the cost does not depend on
        the size of the corpus.
        """
        digest = hashlib.sha256(f"{self.vocab_size}".encode())
        for split in ("train", "val"):
            tokens = self._map(split)
            digest.update(f" {split} {len(tokens)} ".encode())
            for start in np.linspace(0, max(len(tokens) - 4096, 0), 64).astype(int):
                digest.update(tokens[start : start + 4096].tobytes())
        return digest.hexdigest()

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"

    def _map(self, split: str) -> np.memmap:
        """Maps a split without checking its ids."""
        path, dtype = self._path(split), DTYPES[self.dtype]
        if not path.is_file():
            present = ", ".join(present_splits(self.folder)) or "none"
            raise UserError(
                f"no '{split}' split in {self.folder} (present: {present}): "
                f"add {path.name}, or ask for a split that is there"
            )
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(
                f"{path} is empty or truncated: it has {size} bytes, which must be a "
                f"positive multiple of {dtype.itemsize}, the size of a {self.dtype}; "
                "write its tokens again"
            )
        return np.memmap(path, dtype=dtype, mode="r")


@functools.lru_cache
def _check_ids(corpus: Corpus, split: str, version: tuple) -> None:
    """Raises UserError for an invalid id; the cache skips an unchanged file."""
    for number, chunk in enumerate(_chunks(corpus._map(split))):
        if chunk.max() >= corpus.vocab_size:
            at = int(np.argmax(chunk >= corpus.vocab_size))
            raise UserError(
                f"{corpus._path(split)} holds id {chunk[at]} at position "
                f"{number * _CHUNK_TOKENS + at}, but the vocabulary size is "
                f"{corpus.vocab_size}: correct vocab_size or dtype (now "
                f"{corpus.dtype}) in meta.json beside it, or write the tokens again"
            )


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Number of occurrences of each token id: int64 [vocab_size].

    `tokens` [n] may be a memory map of any size.
    """
    # np.bincount of all tokens at once would make an int64 copy: 8 bytes per token.
    count_V = np.zeros(vocab_size, np.int64)
    for chunk in _chunks(tokens):
        count_V += np.bincount(chunk, minlength=vocab_size)
    return count_V


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive pieces of an array of tokens, small enough to convert."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]


def describe_corpus(source: str, tokenizer: str = "auto") -> CorpusInfo:
    """Describes the corpus of `open_corpus` without tokenizing; same errors."""
    found = find_source(source)
    if isinstance(found, Path):
        return read_meta(found, tokenizer)
    return found.info(tokenizer)


def open_corpus(source: str, cache_dir: Path, tokenizer: str = "auto") -> Corpus:
    """Opens a corpus. Text is tokenized once, into a folder of its own in `cache_dir`.

    Args:
      source: 'sotu' (in the package), 'wikitext103' (needs the package `datasets`), or
        a folder. The folder holds .bin files in nanoGPT's format, or text files with
        train, val, valid, validation or test as a word of their names. .bin files
        without meta.json or meta.pkl must hold GPT-2's tokens.
      cache_dir: folder for the token files of text.
      tokenizer: a name in RANKS, or 'auto': sotu4096 for sotu, gpt2 for other text,
        and the tokenizer in the folder's meta file for token files.

    Raises:
      UserError: the source cannot be read as one of these.
    """
    found = find_source(source)
    if isinstance(found, Path):
        folder = found
    else:
        info = found.info(tokenizer)
        recipe = [_RECIPE, found.fingerprint(), tokenizer_sha256(info.tokenizer)]
        key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
        folder = Path(cache_dir) / f"{info.name}-{info.tokenizer}-{key}"
        if not folder.is_dir():
            write_token_folder(folder, found, info)
    return Corpus(**asdict(read_meta(folder, tokenizer)), folder=folder)
