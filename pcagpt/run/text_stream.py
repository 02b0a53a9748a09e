"""Text from tokens as they are drawn, in pieces that can be shown at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence

# Decoding writes this sign for bytes that are no whole character. A character has at
# most four bytes, so that three tokens or signs may stand for one that is not complete.
_BROKEN, _MOST_BROKEN = "\ufffd", 3


def texts_of(
    tokens: Iterable[int],
    decode: Callable[[list[int]], str],
    before: Sequence[int] = (),
) -> Iterator[str]:
    """The text of tokens in pieces of whole characters; together, what they decode to.

    A character at the end that is not complete is left out.

    Args:
      tokens: read one by one.
      decode: of a tokenizer. The text of some tokens may only depend on the tokens
        before them by the space between words and by characters cut in two.
      before: the last tokens of the text that these ones continue.
    """
    # The earlier tokens stay with the new ones until these end with a whole character.
    known, new, text = list(before), [], decode(list(before))
    shown = len(text.rstrip(_BROKEN))
    for token in tokens:
        new.append(token)
        text = decode(known + new)
        broken = len(text) - len(text.rstrip(_BROKEN))
        if broken and len(new) <= _MOST_BROKEN:
            continue
        whole = len(text) - min(broken, _MOST_BROKEN)
        if whole > shown:
            yield text[shown:whole]
            shown = whole
        if not broken:
            known, new, text = new, [], decode(new)
            shown = len(text)
    if rest := text[shown:].rstrip(_BROKEN):
        yield rest


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
