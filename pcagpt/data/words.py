"""The words of a text that is read in pieces."""


class WordCounter:
    """Counts as WikiText does: whitespace separates words, each line end is one more.

    Its raw validation text has 217,646.
    """

    def __init__(self) -> None:
        self.count = 0
        self._is_open = False  # Whether a word may go on in the next piece.

    def add(self, text: str) -> None:
        """Counts a piece of text that follows the last one."""
        self.count += len(text.split()) + text.count("\n")
        self.count -= self._is_open and bool(text[:1].strip())
        self._is_open = bool(text[-1:].strip()) if text else self._is_open

    def end(self) -> None:
        """Ends a word: what follows is another text."""
        self._is_open = False
