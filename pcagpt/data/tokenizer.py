"""Rank files shipped with the package -> tiktoken encodings, checked by hash."""

import base64
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from pcagpt.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern with possessive quantifiers: the same pieces, without backtracking.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


@dataclass(frozen=True)
class RankFile:
    """One packaged byte-pair vocabulary; `<|endoftext|>` is always its last id."""

    file: str
    sha256: str
    vocab_size: int  # the last id is <|endoftext|>


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
    """Return the entry of RANKS; UserError when the tokenizer is unknown."""
    if name not in RANKS:
        known = ", ".join(RANKS)
        raise UserError(
            f"unknown tokenizer '{name}': it must be one of {known} (or 'auto'), "
            "set by --config.data.tokenizer"
        )
    return RANKS[name]


def packaged_bytes(file: str, sha256: str) -> bytes:
    """Return the bytes of a file in pcagpt/assets; UserError unless its hash holds."""
    path = ASSETS / file
    restore = f"restore it with: git checkout -- pcagpt/assets/{file}"
    if not path.is_file():
        raise UserError(f"packaged file {path} is missing; {restore}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"packaged file {path} is damaged: its sha256 is {found[:12]}…, not "
            f"{sha256[:12]}…; {restore}"
        )
    return content


def encoding_from_ranks(
    name: str, ranks: dict[bytes, int], vocab_size: int
) -> tiktoken.Encoding:
    """Build a GPT-2 style encoding: ranks 0..vocab_size-2, then `<|endoftext|>`."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )


def dump_ranks(ranks: dict[bytes, int]) -> bytes:
    """Write ranks in tiktoken's format: a line `base64(token) rank` per token."""
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()
    )


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Read ranks from tiktoken's format, the inverse of `dump_ranks`."""
    # tiktoken's own loader keeps a cache that deletes files on a mismatch: not used.
    rows = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in rows}


@functools.lru_cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the encoding `name` of RANKS; UserError when unknown or damaged."""
    entry = rank_file(name)
    ranks = parse_ranks(packaged_bytes(entry.file, entry.sha256))
    return encoding_from_ranks(name, ranks, entry.vocab_size)


def tokenizer_sha256(name: str) -> str:
    """Return the sha256 of the rank file, which identifies the vocabulary."""
    return rank_file(name).sha256
