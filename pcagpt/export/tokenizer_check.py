"""Whether transformers makes the tokens of a text with an export as pcagpt does."""

from pathlib import Path

from pcagpt.data import vocabulary
from pcagpt.data.file_tokenizer import Lacking
from pcagpt.errors import reason_of, warn_once

# Classes differ in spaces, cases, digits, marks, and letters of two parts.
_TEXTS = (
    "The people", " Two  people ", "PEOPLE don't", "the\tend\n\nA", "1776.5", "e\u0301",
    "\u4e2d",
)  # fmt: skip


def compare(folder: Path) -> None:
    """Warns if transformers makes other tokens with an export than pcagpt.

    It may choose a class by the kind of the model, whatever the files say. Nothing is
    compared without this package, or without a tokenizer.
    """
    name = vocabulary.in_folder(folder)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    if name is None:
        return
    own = vocabulary.load(name)
    try:
        # Without an answer it would ask whether it may run the code of the folder.
        theirs = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        found = [theirs(one, add_special_tokens=False)["input_ids"] for one in _TEXTS]
    except Exception as error:
        warn_once(
            f"AutoTokenizer of transformers does not open the tokenizer in {folder}: "
            f"{reason_of(error)}"
        )
        return
    for text, ids in zip(_TEXTS, found, strict=True):
        try:
            is_same = ids == own.encode(text)
        except Lacking:  # A small vocabulary, which transformers drops characters for.
            continue
        if not is_same:
            warn_once(
                f"AutoTokenizer of transformers opens the tokenizer in {folder} as "
                f"{type(theirs).__name__}, which makes other tokens of {text!r} than "
                "the model was measured with: PreTrainedTokenizerFast.from_pretrained "
                "obeys tokenizer.json"
            )
            return
