"""One text file without splits: the first 90% are train, then 5% each val and test."""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pcagpt.data.meta import SPLITS
from pcagpt.data.text_files import check
from pcagpt.errors import UserError, naming

PERCENT = {"train": 90, "val": 5, "test": 5}
_BLOCK_BYTES = 1 << 20


def parts(path: Path) -> dict[str, tuple[int, int]]:
    """{split: (first byte, end)}; each split but the last ends with a line.

    The splits end within lines if lines are so long that a split would be empty, or
    that no line ends in the next MB. UserError if a split is empty then, too.
    """
    with naming(path), path.open("rb") as file:
        found = _parts(file, _line_end)
        if any(start == end for start, end in found.values()):
            found = _parts(file, _character_end)
    if empty := [split for split, (start, end) in found.items() if start == end]:
        raise UserError(
            f"{path} is too short to be cut into splits, {empty[0]} would be empty: "
            "give more text, or a folder with train.txt and val.txt"
        )
    return found


def _parts(
    file: BinaryIO, end_at: Callable[[BinaryIO, int], int]
) -> dict[str, tuple[int, int]]:
    size, start, share, found = file.seek(0, 2), 0, 0, {}
    for split in SPLITS:
        share += PERCENT[split]
        end = end_at(file, size * share // 100) if share < 100 else size
        found[split] = start, end
        start = end
    return found


def _line_end(file: BinaryIO, place: int) -> int:
    """The end of the line at a place; of the character, if the line is too long."""
    file.seek(place)
    length = file.read(_BLOCK_BYTES).find(b"\n")
    return place + length + 1 if length >= 0 else _character_end(file, place)


def _character_end(file: BinaryIO, place: int) -> int:
    """The next byte that does not continue a character of UTF-8."""
    file.seek(place)
    block = file.read(4)
    return place + next((n for n, b in enumerate(block) if b & 0xC0 != 0x80), 0)


def read_part(path: Path, start: int, end: int) -> Iterator[str]:
    """The text between two bytes of a UTF-8 file, without a byte order mark."""
    with naming(path), path.open("rb") as file:
        decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
        file.seek(start)
        while block := file.read(min(_BLOCK_BYTES, end - start)):
            start += len(block)
            yield decoder.decode(block)


def text_hash(path: Path) -> str:
    """Changes with the text or its splits; UserError if the file is not UTF-8 text."""
    content, _ = check(path)
    cuts = sorted(parts(path).items())
    return hashlib.sha256(f"{content} {cuts}".encode()).hexdigest()


def notice(path: Path) -> str:
    """As in 'text in input.txt: the first 90% train, then 5% val, then 5% test'."""
    first, *rest = (f"{percent}% {split}" for split, percent in PERCENT.items())
    return f"text in {path}: the first {first}, then {', then '.join(rest)}"
