"""The tokenizer of a corpus whose meta file gives the text of each id."""

import dataclasses
import functools
from collections.abc import Collection, Iterable

from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer:
    """The part of `tiktoken.Encoding` that sampling uses.

    texts: the text of each id, mostly a single character.
    """

    texts: tuple[str, ...]

    @property
    def n_vocab(self) -> int:
        """The number of ids."""
        return len(self.texts)

    @property
    def ids(self) -> Collection[int]:
        """The ids that have a text."""
        return [number for number, text in enumerate(self.texts) if text]

    @property
    def eot_token(self) -> int | None:
        """The id of `<|endoftext|>`; None if no id stands for it."""
        return self._id_of_text.get(END_OF_TEXT)

    @functools.cached_property
    def _id_of_text(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts) if text}

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text, the longest match first; UserError if it has none.

        `<|endoftext|>` is a text like others, so `allowed_special` has no effect.
        """
        longest, found, at = max(map(len, self._id_of_text), default=0), [], 0
        while at < len(text):
            pieces = (text[at : at + size] for size in range(longest, 0, -1))
            piece = next((p for p in pieces if p in self._id_of_text), None)
            if piece is None:
                raise UserError(
                    f"sample.prompt holds {text[at]!r}, but it is not one of the "
                    f"{self.n_vocab} characters that the model was trained on: leave "
                    "it out"
                )
            found.append(self._id_of_text[piece])
            at += len(piece)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return "".join(self.texts[number] for number in ids)
