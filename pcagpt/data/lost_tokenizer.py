"""Compares a named tokenizer, or a corpus, with what is left of a model's own one."""

import re
from collections.abc import Iterator
from pathlib import Path

from pcagpt.data import gguf_header, packaged_tokenizers
from pcagpt.data.tokenizer import RANKS
from pcagpt.data.tokenizer_settings import ADDED, CONFIG, PARTS, config_beside
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    RANK_ENDING,
    ids_by_text,
    letters_of,
    ranks_in,
)
from pcagpt.errors import UserError, warn_once
from pcagpt.json_files import read_json

_FILLED = re.compile(r"\[PAD\d+\]")  # in GGUF: a row without a token
_FEW = 0.01  # Converters write some added tokens in another way.
_UNREADABLE = (UserError, OSError, UnicodeDecodeError)


def check_is_models(
    model: Path, name: str, characters: tuple[str, ...] | None = None
) -> None:
    """Compares the texts of ids that the files of a model state with those of `name`.

    A line names a file that cannot be compared, and a text that differs if few do.

    Args:
      model: a folder of a model without a tokenizer that can be used, or a GGUF file.
      name: as `vocabulary.name_of` returns it; of a corpus if `characters` are given.
      characters: the text of each id of a corpus.

    Raises:
      UserError: the texts are of another tokenizer.
    """
    texts = dict(enumerate(characters or ()))
    for file, stated in _stated(model):
        texts = texts or {number: text for text, number in _ids_by_text(name).items()}
        if characters:
            stated = _as_characters(stated, texts)
        differing = [
            number
            for number, text in stated.items()
            if texts.get(number, "").strip() != text.strip()
        ]
        if not stated:
            warn_once(
                f"{file} is of the tokenizer of {model}, and could not be compared "
                f"with {name}: if it is another one, the results are wrong"
            )
        if not differing:
            continue
        first = min(differing)
        said = (
            f"id {first} is {texts.get(first, '')!r} in {name}, and "
            f"{stated[first]!r} in {file}, which came with the model "
            f"({len(differing):,} of {len(stated):,} ids differ)"
        )
        if len(differing) > max(1, _FEW * len(stated)):
            is_model = file == model
            remedy = "" if is_model else ", or move that file away if it is wrong"
            raise UserError(
                f"{said}: name the model's own tokenizer as "
                f"--config.data.tokenizer{remedy}"
            )
        warn_once(f"{said}: make sure that {name} is the model's tokenizer")


def _as_characters(stated: dict[int, str], texts: dict[int, str]) -> dict[int, str]:
    """What is stated of the ids of a corpus, with its text for the letters of bytes."""
    return {
        number: texts[number] if letters_of(texts[number].encode()) == text else text
        for number, text in stated.items()
        if texts.get(number)
    }


def _stated(model: Path) -> Iterator[tuple[Path, dict[int, str]]]:
    """(file, texts by id) of all that tells of tokens; {} if it cannot be read."""
    if model.is_file():
        if texts := _of_gguf(model):
            yield model, texts
    elif model.is_dir():
        for file in sorted(model.iterdir()):
            if any(map(file.match, PARTS)):
                yield file, _texts_in(file)
        settings = model / CONFIG
        try:
            decoder = config_beside(settings).get("added_tokens_decoder")
        except _UNREADABLE:
            yield settings, {}
        else:
            if texts := _of_decoder(decoder):
                yield settings, texts


def _of_gguf(file: Path) -> dict[int, str]:
    try:
        texts = gguf_header.tokenizer_fields(file).tokens
    except _UNREADABLE:  # It has no tokenizer.
        return {}
    return {n: text for n, text in enumerate(texts) if not _FILLED.fullmatch(text)}


def _of_decoder(decoder: object) -> dict[int, str]:
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return {
        int(number): one["content"]
        for number, one in entries
        if re.fullmatch("[0-9]{1,10}", number) and isinstance(one, dict)
        if isinstance(one.get("content"), str)
    }


def _texts_in(file: Path) -> dict[int, str]:
    try:
        if file.name == "vocab.txt":
            lines = file.read_text("utf-8").removesuffix("\n").split("\n")
            return dict(enumerate(lines))
        if file.name == ADDED:
            ids = read_json(file, DAMAGED) or {}
        else:
            is_known = file.suffix in (".json", RANK_ENDING)
            ids = _ids_by_text(str(file)) if is_known else {}
    except _UNREADABLE:
        return {}
    return {number: text for text, number in ids.items() if type(number) is int}


def _ids_by_text(name: str) -> dict[str, int]:
    """{text as the files of such a tokenizer write it: id}."""
    if name in RANKS:
        return packaged_tokenizers.ids_by_text_of(name)
    file = Path(name)
    if file.suffix == RANK_ENDING:
        return {letters_of(token): rank for token, rank in ranks_in(file)[0].items()}
    return ids_by_text(file)
