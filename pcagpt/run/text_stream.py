"""Text from tokens as they are drawn, in pieces that can be shown at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence

# Decoding writes this sign for bytes that are no whole character. The bytes of a
# character that is still incomplete are shown as at most three of them.
_BROKEN, _MOST_BROKEN = "\ufffd", 3


def texts_of(
    tokens: Iterable[int],
    decode: Callable[[list[int]], str],
    before: Sequence[int] = (),
) -> Iterator[str]:
    """The text of tokens in pieces of whole characters; together, what they decode to.

    A character of which the last tokens give only a part is left out.

    Args:
      tokens: read one by one.
      decode: of a tokenizer. The text of some tokens may only depend on the tokens
        before them by the space between words and by characters cut in two.
      before: the last tokens of the text that these ones continue.
    """
    # The earlier tokens stay with the new ones until these end with a whole character.
    known, new = list(before), []
    shown = _whole(decode(known)) if known else 0
    for token in tokens:
        new.append(token)
        text = decode(known + new)
        whole = _whole(text)
        if whole > shown:
            yield text[shown:whole]
            shown = whole
        if whole == len(text):
            known, new = new, []
            shown = len(decode(known))


def _whole(text: str) -> int:
    """The length of a text without signs that may become a character."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    return len(text) - min(broken, _MOST_BROKEN)


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of the pieces before the first of some strings that is complete.

    What may be the beginning of such a string is held back until it is not.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for text in stop if (at := held.find(text)) >= 0]
        if found:
            if held := held[: min(found)]:
                yield held
            return
        begun = (
            size
            for text in stop
            for size in range(1, len(text))
            if held.endswith(text[:size])
        )
        safe = len(held) - max(begun, default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held
