"""Text or token files -> a folder of token files, one per split.

In the token files made here every document is preceded by `<|endoftext|>`. A document
is one address in `sotu`, a whole split in `wikitext103`, a whole file in a folder of
text; its text is kept byte for byte, line ends included.
"""

import codecs
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcagpt.data.sources import find_text, sotu_documents
from pcagpt.data.token_files import SPLITS, Corpus, fingerprint, open_token_folder
from pcagpt.data.tokenize import write_token_folder
from pcagpt.data.tokenizer import load_tokenizer, rank_file, tokenizer_sha256

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusInfo",
    "describe_corpus",
    "fingerprint",
    "open_corpus",
    "sotu_documents",
    "text_counts",
]

_RECIPE = 1  # part of a cache folder's name: raise it when the tokens would change
_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class CorpusInfo:
    """What a source will be as a corpus, known before any text is read."""

    name: str
    vocab_size: int
    tokenizer: str | None  # a name in RANKS, or None when unknown
    splits: tuple[str, ...]


def describe_corpus(source: str, tokenizer: str = "auto") -> CorpusInfo:
    """Say what `source` is, without reading its text or writing anything.

    Sources and errors are those of `open_corpus`.
    """
    text = find_text(source)
    if text is None:
        corpus = open_token_folder(Path(source).expanduser(), tokenizer)
        return CorpusInfo(
            corpus.name, corpus.vocab_size, corpus.tokenizer, corpus.splits
        )
    chosen = text.tokenizer if tokenizer == "auto" else tokenizer
    return CorpusInfo(
        text.name, rank_file(chosen).vocab_size, chosen, tuple(text.documents)
    )


def open_corpus(source: str, cache_dir: Path, tokenizer: str = "auto") -> Corpus:
    """Open a corpus; text is tokenized once, into a folder of its own in `cache_dir`.

    Sources: `sotu` (embedded), `wikitext103` (the `datasets` package), or a local
    folder: of .bin files in nanoGPT's format, with meta.json, meta.pkl or neither
    (then GPT-2's), or else of text files with train, val, valid, validation or test as
    a word of their names. `tokenizer` 'auto' is sotu4096 for sotu, gpt2 for other text,
    what the folder says for tokens. Raises UserError for what can't be read as such.
    """
    text = find_text(source)
    if text is None:
        return open_token_folder(Path(source).expanduser(), tokenizer)
    chosen = text.tokenizer if tokenizer == "auto" else tokenizer
    encoding = load_tokenizer(chosen)
    recipe = [_RECIPE, text.fingerprint(), tokenizer_sha256(chosen)]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"{text.name}-{chosen}-{key}"
    if not folder.is_dir():
        write_token_folder(folder, text, encoding)
    return open_token_folder(folder, chosen)


def text_counts(corpus: Corpus, split: str) -> tuple[int, int] | None:
    """Count (words, UTF-8 bytes) of a split's text; None if the tokenizer is unknown.

    Words are whitespace-separated, plus one for each line end, as WikiText counts them
    (217,646 in its raw validation text). `<|endoftext|>` ends a word and is no text.
    """
    if corpus.tokenizer is None:
        return None
    encoding = load_tokenizer(corpus.tokenizer)
    tokens = corpus.tokens(split)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    words = byte_count = 0
    in_word = False
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS])
        chunk_ends = np.flatnonzero(chunk == encoding.eot_token)
        for number, ids in enumerate(np.split(chunk, chunk_ends)):
            if number > 0:  # a new document, after its <|endoftext|>
                ids, in_word = ids[1:], False
                decoder.reset()
            raw = encoding.decode_bytes(ids.tolist())
            byte_count += len(raw)
            text = decoder.decode(raw)
            words += len(text.split()) + text.count("\n")
            if text:
                # The chunk's border may have cut a word in two.
                words -= in_word and not text[0].isspace()
                in_word = not text[-1].isspace()
    return words, byte_count
