"""Weights that were never written: a file of full size that ends in zeros.

Programs that download set the size of a file first. What is lacking is then zero.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pcagpt.errors import UserError

_CHUNK = 1 << 20


class Place(NamedTuple):
    """Where a tensor is: its shape, its first byte in the file, the byte after it."""

    shape: tuple[int, ...]
    start: int
    stop: int


def refuse_unfilled(path: Path, places: Mapping[str, Place]) -> None:
    """UserError if the tensors of a file end in zeros over a matrix.

    Also if a program that downloads it has not finished.

    Only the end counts: elsewhere, a matrix may have been set to zero on purpose. So
    may vectors: biases, and norms that add 1. A table's last rows may be padding: less
    than 1 MiB, or 1/20 of the table.
    """
    control = path.with_name(f"{path.name}.aria2")
    if control.exists():  # aria2c removes it at the end, and may leave holes before.
        raise UserError(
            f"{path} is a download that was not finished, because {control.name} is "
            "beside it: download it again"
        )
    end = max((one.stop for one in places.values()), default=0)
    filled = _filled(path, end)
    for name, (shape, start, stop) in places.items():
        zeros, size = stop - max(start, filled), stop - start
        is_all = zeros == size > 0
        if len(shape) > 1 and (is_all or zeros > max(_CHUNK, size // 20)):
            raise UserError(
                f"{path} ends in {end - filled:,} bytes of zeros, in which {name} is, "
                "like a download that was not finished: download it again"
            )


def _filled(path: Path, end: int) -> int:
    """The number of bytes before `end` without the zeros at their end."""
    with path.open("rb") as file:
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            if found := file.read(end - start).rstrip(b"\0"):
                return start + len(found)
            end = start
    return 0
