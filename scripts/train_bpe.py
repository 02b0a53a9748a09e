"""Train the packaged vocabulary `sotu4096` on the train split of `sotu`.

    pip install -e '.[dev]' && python scripts/train_bpe.py

This is a byte-level BPE of 4,096 ids with GPT-2's pattern: 256 bytes in GPT-2's order,
then 3,839 merges in the order they were learned, then `<|endoftext|>`. The script is
deterministic and takes seconds. Before it writes the file, it checks two things on
every split: `tokenizers` (used for training) and `tiktoken` (used by the package) give
the same ids, and these ids decode to the same text.
"""

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pcagpt.data.meta import SPLITS
from pcagpt.data.sources import sotu_documents
from pcagpt.data.tokenizer import (
    ASSETS,
    END_OF_TEXT,
    RANKS,
    encoding_from_ranks,
)
from pcagpt.data.vocabulary_files import byte_letters

VOCAB_SIZE = RANKS["sotu4096"].vocab_size


def new_tokenizer(model: models.BPE) -> Tokenizer:
    """A byte-level tokenizer that splits text as GPT-2 does."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def learn_merges(documents: list[str], vocab_size: int) -> list[tuple[str, str]]:
    """Learns vocab_size - 257 merges; each is a pair of strings of byte letters."""
    tokenizer = new_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def rank_tokens(merges: list[tuple[str, str]]) -> dict[bytes, int]:
    """Ranks of the 256 bytes, then of the merged tokens."""
    letters = byte_letters()
    byte_of = {letter: byte for byte, letter in letters.items()}
    words = [*letters.values(), *(left + right for left, right in merges)]
    return {
        bytes(byte_of[letter] for letter in word): n for n, word in enumerate(words)
    }


def verify(ranks: dict[bytes, int], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Compares both libraries on every split; returns each split's token count."""
    if sorted(ranks.values()) != list(range(VOCAB_SIZE - 1)):
        sys.exit(f"training gave {len(ranks)} distinct tokens, not {VOCAB_SIZE - 1}")
    letters = byte_letters()
    vocabulary = {
        "".join(letters[byte] for byte in token): rank for token, rank in ranks.items()
    }
    theirs = new_tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    ours = encoding_from_ranks("sotu4096", ranks, VOCAB_SIZE)
    counts = {}
    for split in SPLITS:
        documents = sotu_documents(split)
        encoded = ours.encode_ordinary_batch(documents)
        for document, ids in zip(documents, encoded, strict=True):
            if theirs.encode(document).ids != ids or ours.decode(ids) != document:
                sys.exit(f"tokenizers and tiktoken differ on {document[:60]!r}")
        counts[split] = sum(map(len, encoded))
    return counts


def main() -> None:
    """Trains, verifies, writes, and prints the sha256 for RANKS."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS / "sotu4096.tiktoken")
    output = parser.parse_args().output
    merges = learn_merges(sotu_documents("train"), VOCAB_SIZE)
    ranks = rank_tokens(merges)
    counts = verify(ranks, merges)
    content = b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()
    )
    output.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    print(f"{output}: sha256 {found}; tokens without {END_OF_TEXT}: {counts}")
    if found != RANKS["sotu4096"].sha256:
        print("RANKS in pcagpt/data/tokenizer.py has another sha256: change it there")


if __name__ == "__main__":
    main()
