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


class Numbering(NamedTuple):
    """A vocabulary, such as NAME.tiktoken in pcagpt/assets.

    vocab_size: the highest id + 1; added_from: the first added token; text has these
    only if it spells them out. `vocab_size` or None: no added tokens.
    """

    vocab_size: int
    sha256: str
    added_from: int | None = None

    @property
    def rows_needed(self) -> int:
        """The rows that a table needs to read most texts."""
        return min(self.vocab_size, self.added_from or self.vocab_size)


RANKS = {
    "gpt2": Numbering(
        50257, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    ),
    "sotu4096": Numbering(
        4096, "e770fd9744a9162ba6181dde40376c67430f22dd3d338ba0c652d31794765acf"
    ),
}


def rank_file(name: str) -> Numbering:
    """Looks a name up in RANKS; UserError if it is unknown."""
    if name not in RANKS:
        raise UserError(
            f"unknown tokenizer '{name}': set --config.data.tokenizer to 'auto' or to "
            f"one of {', '.join(RANKS)}, or to a file: tokenizer.json, vocab.json with "
            "merges.txt beside it, .gguf or .tiktoken"
        )
    return RANKS[name]


def how_to_name_tokens(vocab_size: int) -> str:
    """What a person can do so that ids of a vocabulary stand for text."""
    names = [name for name, one in RANKS.items() if one.vocab_size <= vocab_size]
    return (
        f"set --config.data.tokenizer={' or '.join([*names, 'FILE'])} if it made them, "
        'or give the text of each id as "itos" in the meta.json of the corpus'
    )


def packaged_bytes(file: str, sha256: str) -> bytes:
    """Reads a file in pcagpt/assets; UserError if its hash differs."""
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
    """Returns an encoding like GPT-2's: vocab_size - 1 ranks, then `<|endoftext|>`."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )


@functools.lru_cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """Builds an encoding of RANKS; UserError if it is unknown or damaged."""
    vocab_size, sha256, _ = rank_file(name)
    # Each line is `base64(token) rank`. tiktoken's own loader would delete the file if
    # its hash differs.
    rows = map(bytes.split, packaged_bytes(f"{name}.tiktoken", sha256).splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    return encoding_from_ranks(name, ranks, vocab_size)
