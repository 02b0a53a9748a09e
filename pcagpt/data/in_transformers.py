"""Whether transformers makes the tokens of a text with a folder as pcagpt does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.data import vocabulary
from pcagpt.data.file_tokenizer import Lacking
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.errors import UserError, reason_of, warn_once

# Classes differ in spaces, cases, digits, marks, and letters of two parts.
_TEXTS = (
    "The people", " Two  people ", "PEOPLE don't", "the\tend\n\nA", "1776.5", "e\u0301",
)  # fmt: skip
_SAMPLED = 256  # ids of the vocabulary that make a text
_MARKS = 64  # special tokens that are tried


def compare(folder: Path) -> None:
    """Warns if transformers makes other tokens with a model's folder than pcagpt.

    It may choose a class by the kind of the model, whatever tokenizer.json says, and
    its classes obey fields of tokenizer_config.json in ways of their own. Nothing is
    compared without this package, or without a tokenizer that pcagpt can use.
    """
    if (name := vocabulary.in_folder(folder)) is None:
        return
    try:
        import transformers

        own = vocabulary.load(name)
    except (ImportError, UserError):  # Commands that need it say why it cannot be used.
        return
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        # Without an answer it would ask whether it may run the code of the folder.
        theirs = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        texts = list(_texts(own, theirs))
        found = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    except Exception as error:
        warn_once(
            f"AutoTokenizer of transformers does not open the tokenizer in {folder}: "
            f"{reason_of(error)}"
        )
        return
    finally:
        transformers.logging.set_verbosity(level)
    for text, ids in zip(texts, found, strict=True):
        try:
            is_same = ids == own.encode(text, allowed_special={END_OF_TEXT})
        except Lacking:  # transformers drops such characters.
            continue
        if not is_same:
            warn_once(
                f"AutoTokenizer of transformers opens the tokenizer in {folder} as "
                f"{type(theirs).__name__}, which makes other tokens of {text[:40]!r} "
                "than its main file, which pcagpt uses: save the model's own tokenizer "
                "there again (save_pretrained of PreTrainedTokenizerFast obeys a "
                "tokenizer.json)"
            )
            return


def _texts(own: vocabulary.Tokenizer, theirs: Any) -> Iterator[str]:
    """Some texts, one of the vocabulary, and one with each special token."""
    yield from _TEXTS
    ids = np.flatnonzero(vocabulary.ids_with_text(own))
    yield own.decode(ids[:: max(len(ids) // _SAMPLED, 1)].tolist())
    marks = sorted({*theirs.all_special_tokens, *theirs.get_added_vocab()})
    yield from (f"The {mark} people{mark}" for mark in marks[:_MARKS])
