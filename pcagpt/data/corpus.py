"""A corpus: token files of the splits train, val and test.

In token files made from text, `<|endoftext|>` precedes every document. A document is
one address in `sotu`, a whole split in `wikitext103`, and a whole file in a folder of
text files. The text is kept byte for byte.
"""

import codecs
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcagpt.data import token_files
from pcagpt.data.sources import find_source
from pcagpt.data.tokenize import write_token_folder
from pcagpt.data.tokenizer import load_tokenizer, rank_file, tokenizer_sha256

_RECIPE = 1  # part of a cache folder's name: raise it when the tokens would change


@dataclass(frozen=True)
class CorpusInfo:
    """What is known about a corpus before its text is read."""

    name: str
    vocab_size: int
    tokenizer: str | None  # a name in RANKS, or None if unknown
    splits: tuple[str, ...]


class TextSize(NamedTuple):
    """Size of a split's text.

    Words are separated by whitespace, and each line end counts as one more word. This
    is WikiText's convention (217,646 in its raw validation text).
    """

    words: int
    bytes: int


@dataclass(frozen=True)
class Corpus:
    """A folder of token files and what its ids mean."""

    name: str
    vocab_size: int
    tokenizer: str | None  # a name in RANKS, or None if unknown
    folder: Path
    dtype: str = "uint16"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a token file."""
        return token_files.present_splits(self.folder)

    def tokens(self, split: str) -> np.ndarray:
        """Token ids of a split, memory-mapped and read-only: uint16 or uint32 [n].

        The first call in a process reads the whole file to check every id.

        Raises:
          UserError: the file is missing, empty or truncated, or holds an
            id >= vocab_size.
        """
        tokens = token_files.map_tokens(self.folder, split, self.dtype)
        token_files.check_ids(self.folder, split, self.dtype, self.vocab_size)
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
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        words = byte_count = 0
        in_word = False
        for chunk in token_files.chunks(self.tokens(split)):
            document_starts = np.flatnonzero(chunk == encoding.eot_token)
            for number, ids in enumerate(np.split(chunk, document_starts)):
                if number > 0:  # The first id is <|endoftext|>.
                    ids, in_word = ids[1:], False
                    decoder.reset()
                raw = encoding.decode_bytes(ids.tolist())
                byte_count += len(raw)
                text = decoder.decode(raw)
                words += len(text.split()) + text.count("\n")
                if text:
                    # The border between two chunks may cut a word in two.
                    words -= in_word and not text[0].isspace()
                    in_word = not text[-1].isspace()
        return TextSize(words, byte_count)

    def fingerprint(self) -> str:
        """sha256 of the lengths of the training and validation split and of samples.

        Reads 64 evenly spaced runs of 4,096 tokens from each split, so the cost does
        not depend on the size of the corpus.
        """
        digest = hashlib.sha256(f"{self.vocab_size}".encode())
        for split in ("train", "val"):
            tokens = token_files.map_tokens(self.folder, split, self.dtype)
            digest.update(f" {split} {len(tokens)} ".encode())
            for start in np.linspace(0, max(len(tokens) - 4096, 0), 64).astype(int):
                digest.update(tokens[start : start + 4096].tobytes())
        return digest.hexdigest()


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Number of occurrences of each token id: int64 [vocab_size].

    `tokens` [n] may be a memory map of any size. np.bincount of all of it would make
    an int64 copy: 8 bytes per token.
    """
    count_V = np.zeros(vocab_size, np.int64)
    for chunk in token_files.chunks(tokens):
        count_V += np.bincount(chunk, minlength=vocab_size)
    return count_V


def describe_corpus(source: str, tokenizer: str = "auto") -> CorpusInfo:
    """What `source` is; reads no text and writes nothing.

    Takes the same sources and raises the same errors as `open_corpus`.
    """
    found = find_source(source)
    if isinstance(found, Path):
        meta = token_files.read_meta(found, tokenizer)
        splits = token_files.present_splits(found)
        return CorpusInfo(meta["name"], meta["vocab_size"], meta["tokenizer"], splits)
    chosen = found.tokenizer if tokenizer == "auto" else tokenizer
    splits = tuple(found.documents)
    return CorpusInfo(found.name, rank_file(chosen).vocab_size, chosen, splits)


def open_corpus(source: str, cache_dir: Path, tokenizer: str = "auto") -> Corpus:
    """Opens a corpus; text is tokenized once, into a folder of its own in `cache_dir`.

    Args:
      source: 'sotu' (embedded), 'wikitext103' (needs the package `datasets`), or a
        folder. The folder holds .bin files in nanoGPT's format with meta.json, meta.pkl
        or neither (then GPT-2's tokens are assumed), or text files that have train,
        val, valid, validation or test as a word of their names.
      cache_dir: where the token files of text go.
      tokenizer: a name in RANKS, or 'auto': sotu4096 for sotu, gpt2 for other text,
        and what the folder's meta file says for token files.

    Raises:
      UserError: the source cannot be read as one of these.
    """
    found = find_source(source)
    if isinstance(found, Path):
        return Corpus(folder=found, **token_files.read_meta(found, tokenizer))
    chosen = found.tokenizer if tokenizer == "auto" else tokenizer
    encoding = load_tokenizer(chosen)
    recipe = [_RECIPE, found.fingerprint(), tokenizer_sha256(chosen)]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"{found.name}-{chosen}-{key}"
    if not folder.is_dir():
        write_token_folder(folder, found, encoding)
    return Corpus(folder=folder, **token_files.read_meta(folder, chosen))
