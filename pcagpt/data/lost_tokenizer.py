"""Compares a tokenizer that a person names with what is left of a model's own one."""

import re
from collections.abc import Iterator
from pathlib import Path

from pcagpt.data import gguf_header, packaged_tokenizers
from pcagpt.data.tokenizer import RANKS
from pcagpt.data.tokenizer_settings import ADDED, CONFIG, PARTS, config_beside
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    RANK_ENDING,
    WHOLE,
    ids_by_text,
    letters_of,
    ranks_in,
)
from pcagpt.errors import UserError, warn_once
from pcagpt.json_files import read_json

_FILLED = re.compile(r"\[PAD\d+\]")  # in GGUF: a row without a token
_FEW = 0.01  # Converters write some added tokens in another way.


def check_is_models(model: Path, name: str) -> None:
    """Compares the texts of ids that the files of a model state with those of `name`.

    A line names a file that cannot be compared, and a text that differs if few do.

    Args:
      model: a folder of a model without a tokenizer that can be used, or a GGUF file.
      name: as `vocabulary.name_of` returns it.

    Raises:
      UserError: the texts are of another tokenizer.
    """
    texts = {number: text for text, number in _ids_by_text(name).items()}
    for file, stated in _stated(model):
        common = [number for number in stated if number in texts]
        differing = [n for n in common if texts[n].strip() != stated[n].strip()]
        if not common:
            warn_once(
                f"{file} is of the tokenizer of {model}, and could not be compared "
                f"with {name}: if it is another one, the results are wrong"
            )
        if not differing:
            continue
        first = min(differing)
        said = (
            f"id {first} is {texts[first]!r} in {name}, and {stated[first]!r} in "
            f"{file}, which came with the model ({len(differing):,} of "
            f"{len(common):,} ids differ)"
        )
        if len(differing) > _FEW * len(common):
            raise UserError(
                f"{said}: name the model's own tokenizer as --config.data.tokenizer"
            )
        warn_once(f"{said}: make sure that {name} is the model's tokenizer")


def _stated(model: Path) -> Iterator[tuple[Path, dict[int, str]]]:
    """(file, texts by id) of all that tells of tokens; {} if it cannot be read."""
    if model.suffix == gguf_header.ENDING and model.is_file():
        texts = gguf_header.tokenizer_fields(model).tokens
        yield model, {n: t for n, t in enumerate(texts) if not _FILLED.fullmatch(t)}
    if not model.is_dir():
        return
    for file in sorted(model.iterdir()):
        if any(map(file.match, PARTS)):
            try:
                yield file, _texts_in(file)
            except (UserError, OSError, UnicodeDecodeError):
                yield file, {}
    decoder = config_beside(model / WHOLE).get("added_tokens_decoder")
    added = decoder.items() if isinstance(decoder, dict) else ()
    texts = {
        int(number): one["content"]
        for number, one in added
        if number.isdecimal() and isinstance(one, dict)
        if isinstance(one.get("content"), str)
    }
    if texts:
        yield model / CONFIG, texts


def _texts_in(file: Path) -> dict[int, str]:
    if file.name == "vocab.txt":
        return dict(enumerate(file.read_text("utf-8").splitlines()))
    if file.name == ADDED:
        ids = read_json(file, DAMAGED) or {}
    else:
        ids = _ids_by_text(str(file)) if file.suffix in (".json", RANK_ENDING) else {}
    return {number: text for text, number in ids.items() if type(number) is int}


def _ids_by_text(name: str) -> dict[str, int]:
    """{text as the files of such a tokenizer write it: id}."""
    if name in RANKS:
        return packaged_tokenizers.ids_by_text_of(name)
    file = Path(name)
    if file.suffix == RANK_ENDING:
        return {letters_of(token): rank for token, rank in ranks_in(file)[0].items()}
    return ids_by_text(file)
