"""Tokenizers by name: those of the package, and those in a person's files."""

from pathlib import Path

import numpy as np
import tiktoken

from pcagpt.data import packaged_tokenizers, tokenizer, tokenizer_files
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.file_tokenizer import FileTokenizer
from pcagpt.data.tokenizer import RANKS, Numbering
from pcagpt.data.vocabulary_files import RANK_ENDING

Tokenizer = tiktoken.Encoding | FileTokenizer


def name_of(asked: str) -> str:
    """A name in RANKS, or the absolute path of a tokenizer's main file.

    Args:
      asked: such a name, or a file or folder. The file of a tokenizer of the package
        has the name of that one.

    Raises:
      UserError: neither is there, or the file is damaged.
    """
    if asked in RANKS:
        return asked
    file = tokenizer_files.file_of(Path(asked))
    if file is None:
        tokenizer.rank_file(asked)
    return packaged_tokenizers.known_name(file) or str(file.absolute())


def in_folder(folder: Path) -> str | None:
    """`name_of` the tokenizer in a folder; None without one."""
    return name_of(str(folder)) if tokenizer_files.file_of(folder) else None


def is_known(name: object) -> bool:
    """Whether a stored name stands for a tokenizer that is there."""
    if not isinstance(name, str):
        return False
    return name in RANKS or tokenizer_files.file_of(Path(name)) is not None


def describe(name: str) -> Numbering:
    """Size and hash of a tokenizer; raises as `name_of` does."""
    name = name_of(name)
    return RANKS[name] if name in RANKS else tokenizer_files.describe(Path(name))


def load(name: str) -> Tokenizer:
    """The tokenizer; UserError as for `name_of`, or if a package is not installed."""
    name = name_of(name)
    if name in RANKS:
        return tokenizer.load_tokenizer(name)
    return tokenizer_files.load(Path(name))


def ids_with_text(tokenizer: Tokenizer | CharacterTokenizer) -> np.ndarray:
    """Whether each id has a text: bool [n_vocab]. The ids in a file may have gaps."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return np.ones(tokenizer.n_vocab, bool)
    has_text = np.zeros(tokenizer.n_vocab, bool)
    has_text[list(tokenizer.ids)] = True
    return has_text


def tells_bytes(name: str) -> bool:
    """Whether the bytes of each token are known: only tiktoken's tell them."""
    return name_of(name) in RANKS or name.endswith(RANK_ENDING)


def drops_characters(name: str) -> bool:
    """Whether a tokenizer may drop characters of a text before it cuts the rest."""
    return name not in RANKS and tokenizer_files.drops_characters(Path(name))


def label(name: str) -> str:
    """A name for files and folders."""
    return name if name in RANKS else Path(name).stem


def are_same(one: str | None, other: str | None) -> bool:
    """Whether two stored names stand for the same tokenizer, as far as it is there."""
    if one == other:
        return True
    if not (is_known(one) and is_known(other)):
        return False
    return describe(one).sha256 == describe(other).sha256
