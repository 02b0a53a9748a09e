"""The packaged byte-pair vocabularies as tiktoken encodings."""

import base64
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import tiktoken

from pcagpt.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern with possessive quantifiers: the same pieces without backtracking.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


class RankFile(NamedTuple):
    """A vocabulary in pcagpt/assets; its last id is `<|endoftext|>`."""

    file: str
    sha256: str
    vocab_size: int


RANKS = {
    "gpt2": RankFile(
        "gpt2.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        50257,
    ),
    "sotu4096": RankFile(
        "sotu4096.tiktoken",
        "e770fd9744a9162ba6181dde40376c67430f22dd3d338ba0c652d31794765acf",
        4096,
    ),
}


def rank_file(name: str) -> RankFile:
    """The entry of RANKS; UserError if the tokenizer is unknown."""
    if name not in RANKS:
        raise UserError(
            f"unknown tokenizer '{name}': set --config.data.tokenizer to 'auto' or to "
            f"one of {', '.join(RANKS)}"
        )
    return RANKS[name]


def packaged_bytes(file: str, sha256: str) -> bytes:
    """Content of a file in pcagpt/assets; UserError if its hash differs."""
    path = ASSETS / file
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"packaged file {path} is {'damaged' if content else 'missing'}: restore "
            f"it with: git checkout -- pcagpt/assets/{file}"
        )
    return content


def encoding_from_ranks(
    name: str, ranks: dict[bytes, int], vocab_size: int
) -> tiktoken.Encoding:
    """An encoding like GPT-2's: ranks 0..vocab_size-2, then `<|endoftext|>`."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )


@functools.lru_cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding `name` of RANKS; UserError if it is unknown or damaged."""
    file, sha256, vocab_size = rank_file(name)
    # Each line is `base64(token) rank`. tiktoken's own loader is not used: it deletes
    # the file if its hash differs.
    rows = map(bytes.split, packaged_bytes(file, sha256).splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    return encoding_from_ranks(name, ranks, vocab_size)


def tokenizer_sha256(name: str) -> str:
    """sha256 of the rank file, which identifies the vocabulary."""
    return rank_file(name).sha256
