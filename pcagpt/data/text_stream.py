"""Text from lists of tokens, in pieces that can be shown or used at once."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

_BROKEN = "\ufffd"  # what decoding writes for a part of a character
_CONTEXT = 16  # tokens that decoding the next ones may need


def texts_of(
    parts: Iterable[Sequence[int]],
    decode: Callable[[list[int]], str],
    before: Sequence[int] = (),
) -> Generator[str, None, str]:
    """The text of tokens in pieces of whole characters; together, what they decode to.

    Args:
      parts: lists of tokens, of any size; each is read when its text is asked for.
      decode: of a tokenizer. The text of some tokens may only depend on the tokens
        before them by the space between words and by characters cut in two.
      before: the tokens that these ones continue.

    Returns:
      The end of the text that may be a part of a character: one U+FFFD, or nothing.
    """
    # The last tokens are decoded once more with those that follow them. A character
    # that is cut at their start is the same signs both times.
    held = list(before[-_CONTEXT:])
    text = decode(held)
    is_open = text.endswith(_BROKEN)  # Later tokens may complete its last character.
    shown = len(text) - is_open
    for part in parts:
        held += part
        text = decode(held)
        is_open = text.endswith(_BROKEN)
        if piece := text[shown : len(text) - is_open]:
            yield piece
        last = held[-_CONTEXT:]
        # Tokens without text may have followed the part of a character.
        if not is_open or decode(last).endswith(_BROKEN):
            held = last
        shown = len(decode(held)) - is_open
    return _BROKEN * is_open


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of the pieces before the first of some strings that is complete.

    If several are complete at once, before the longest. What may be the beginning of a
    string is held back until it is not.
    """
    held = ""
    for piece in pieces:
        held += piece
        ends = [(at + len(text), at) for text in stop if (at := held.find(text)) >= 0]
        if ends:
            _, at = min(ends)
            if at:
                yield held[:at]
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
