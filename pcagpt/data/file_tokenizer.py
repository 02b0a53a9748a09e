"""A tokenizer of the package `tokenizers` that pcagpt can use as one of tiktoken's."""

import contextlib
import functools
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.vocabulary_files import DAMAGED
from pcagpt.errors import OF_NO_FILE, UserError

_LOST = "\ufffd"  # stands for bytes that are no character
_LACKING = "\0lacking"  # is no token
_SAYING_LACKING = (_LACKING, "`unk_id` is missing")  # errors of the package


class Lacking(UserError):
    """A tokenizer has no token for a character of a text, nor one for unknown text."""


class FileTokenizer:
    """The part of `tiktoken.Encoding` that pcagpt uses, of a `tokenizers.Tokenizer`.

    A method raises UserError if the tokenizer fails.

    The package leaves out a character if a byte-pair vocabulary has no token for it and
    none for unknown text. Such a text is refused here. What a tokenizer drops before it
    looks for tokens, such as accents and white space, is left out.
    """

    def __init__(
        self, file: Path, tokenizer: Any, ids: Collection[int], eot_token: int | None
    ):
        """ids: that have a text; eot_token: separates documents; None without one."""
        self.ids, self.n_vocab, self.eot_token = ids, max(ids) + 1, eot_token
        self._file, self._tokenizer = file, tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._has_mark = any(token.content == END_OF_TEXT for token in added)
        # Then the package raises an error instead.
        self._loses = getattr(tokenizer.model, "unk_token", "") is None
        if self._loses:
            tokenizer.model.unk_token = _LACKING

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text; `encode_batch` of a single one."""
        return self.encode_batch([text], allowed_special=allowed_special)[0]

    def encode_batch(
        self, texts: Sequence[str], allowed_special: Collection[str] = (), **_: Any
    ) -> list[list[int]]:
        """The ids of several texts.

        Special tokens in a text are always taken for themselves. If `<|endoftext|>` is
        allowed and none of them, it becomes `eot_token`, and the texts on its sides are
        encoded one by one, as documents are. Raises Lacking if a text has a character
        without a token.
        """
        has_end = self.eot_token is not None and not self._has_mark
        is_cut = has_end and END_OF_TEXT in allowed_special
        parts = [text.split(END_OF_TEXT) if is_cut else [text] for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        with naming(self._file), self._refusing(flat):
            encoded = self._tokenizer.encode_batch(flat, add_special_tokens=False)
        ids_of, found = iter(encoded), []
        for of_text in parts:
            ids = next(ids_of).ids
            for one in itertools.islice(ids_of, len(of_text) - 1):
                ids += [self.eot_token, *one.ids]
            found.append(ids)
        return found

    @contextlib.contextmanager
    def _refusing(self, texts: Sequence[str]) -> Iterator[None]:
        """An error of the package for a character without a token becomes Lacking."""
        try:
            yield
        except Exception as error:
            if not any(mark in str(error) for mark in _SAYING_LACKING):
                raise
            place = self._first_lacking(texts)
            raise Lacking(
                f"{self._file} has no token for {place}: leave it out"
            ) from None

    def _first_lacking(self, texts: Sequence[str]) -> str:
        """The first character without a token, and the text around it."""
        found = self._naming_unknown
        lacking = found.token_to_id(_LACKING)
        for text in texts:
            encoded = found.encode(text, add_special_tokens=False)
            for number, (at, _) in zip(encoded.ids, encoded.offsets, strict=True):
                if number == lacking:
                    around = text[max(at - 20, 0) : at + 20]
                    return f"{text[at : at + 1]!r}, as in {around!r}"
        return "a character of the text"

    @functools.cached_property
    def _naming_unknown(self) -> Any:
        """The tokenizer with a token for unknown text."""
        whole = self.whole()
        model = whole["model"]
        if isinstance(model["vocab"], list):  # of a unigram model
            model["unk_id"] = len(model["vocab"])
            model["vocab"].append([_LACKING, 0.0])
        else:
            model["unk_token"] = _LACKING
            model["vocab"][_LACKING] = 1 << 31  # Not an id of an added token.
        return type(self._tokenizer).from_str(json.dumps(whole))

    @functools.cached_property
    def unknown(self) -> int | None:
        """The id for text without a token; None if no token is only for such text."""
        model = self.whole()["model"]
        number = model.get("unk_id")
        if model.get("unk_token") is not None:
            number = self._tokenizer.token_to_id(model["unk_token"])
        return None if number == self.eot_token else number

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included.

        What is no character becomes U+FFFD, and the characters beside it stay.
        """
        with naming(self._file):
            whole = self._of_characters(ids)
            return self._tokenizer.decode(whole, skip_special_tokens=False)

    def _of_characters(self, ids: Iterable[int]) -> list[int]:
        """The ids with the bytes of U+FFFD in place of bytes that are no character.

        The package would give up all bytes around them, such as a whole text in
        Japanese that is cut within a character.
        """
        byte_of, found = self._byte_of_id, []
        id_of = {byte: number for number, byte in byte_of.items()}
        for are_bytes, run in itertools.groupby(ids, byte_of.__contains__):
            if are_bytes:
                text = bytes(map(byte_of.__getitem__, run)).decode("utf-8", "replace")
                run = map(id_of.__getitem__, text.encode())
            found += run
        return found

    @functools.cached_property
    def _byte_of_id(self) -> dict[int, int]:
        """The tokens that stand for single bytes, as in Llama 2; {} without such."""
        ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        lost = [ids[byte] for byte in _LOST.encode()]
        if None in ids or self._tokenizer.decode(lost, False) != _LOST:
            return {}
        return {number: byte for byte, number in enumerate(ids)}

    @property
    def end_of_text(self) -> str | None:
        """The text of `eot_token`."""
        end = self.eot_token
        return None if end is None else self._tokenizer.id_to_token(end)

    def whole(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        content = json.loads(self._tokenizer.to_str())
        if self._loses:
            content["model"]["unk_token"] = None
        return content


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """An error of the package becomes a UserError that names the tokenizer's file."""
    try:
        yield
    except (Lacking, *OF_NO_FILE):
        raise
    # The package raises Exception itself.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is damaged ({reason}): {DAMAGED}") from None
