"""Weights that were never written: a file of full size with zeros in it.

A long run of zeros is a hole if it begins or ends within a row of a matrix, and the row
beside is not zero there.

Programs that download set the size of a file first. What is lacking is then zero: the
end, or a part in the middle if several parts are fetched at once. Such a part begins
and ends anywhere in a row. Zeros that are meant are whole rows, such as padding, or the
same columns of several rows, such as masks.

So that other zeros that are meant are no holes either, a row may also be cut if
- few of its bytes are zero: with zeros at random, some are next to a row of zeros;
- it is mostly zero outside the run, too: it has a few numbers, next to rows of zeros;
- the whole run is in it, and goes to its edge: each row has padding of its own;
- the whole run is in it, and the row on the other side is zero there: the last row of a
  block of zeros.

Rows of zeros beside a row that is half zero, and half full, still look like a hole. If
rows are short, one hole in ten or twenty is not seen, because it begins and ends near
the edges of rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pcagpt.errors import UserError, warn_once
from pcagpt.file_hashes import read_once

_CHUNK = 1 << 20
_LONG = 1 << 16  # bytes of the shortest run that counts
_BLOCK = _LONG // 2  # Each long run holds a whole block, wherever it begins.
_SHORTEST = 16  # bytes of a row that tells a hole
_FEW = 256  # bytes, or 1/4 of a row: by chance, more are not zero at its edge.
# The bytes from one place to another: uint8 [any number].
_Read = Callable[[int, int], np.ndarray]


class Place(NamedTuple):
    """Where a tensor is: its shape, its first byte in the file, the byte after it."""

    shape: tuple[int, ...]
    start: int
    stop: int


def refuse_unfilled(path: Path, places: Mapping[str, Place]) -> None:
    """UserError if a file ends in zeros over a matrix, or has a hole in one.

    Also if a program that downloads it has not finished.

    Whole rows count only at the end: elsewhere, a matrix may have been set to zero on
    purpose. So may vectors: biases, and norms that add 1. A table's last rows may be
    padding: as many as `_padding`, in less than 1 MiB or 1/20 of the table. A warning
    names more than 1/100 of them.
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
        if len(shape) < 2 or not size or zeros <= 0:
            continue
        rows = math.prod(shape[:-1])
        empty = zeros * rows // size
        most = min(_padding(rows) * size // rows, max(_CHUNK, size // 20))
        if zeros == size or zeros > most:
            meant = (
                f"; if its last {empty:,} of {rows:,} rows are meant to be zero, cut"
            )
            meant = "" if zeros == size else f"{meant} them off"
            raise UserError(
                f"{path} ends in {end - filled:,} bytes of zeros, in which {name} is, "
                f"like a download that was not finished: download it again{meant}"
            )
        if empty > 1 + rows // 100:
            warn_once(
                f"{path}: the last {empty:,} of {rows:,} rows of {name} are zero; if "
                "they are not meant to be, such as padding, the file was not finished"
            )
    begin = min((one.start for one in places.values()), default=0)
    runs = _runs_in(path, begin, end)
    with path.open("rb") as file:
        _refuse_holes(path, places, runs, _reader(file))


def _padding(rows: int) -> int:
    """The most rows of zeros that are taken for padding.

    Padding to a multiple of 128 adds up to 127 rows, to one of 64 up to 63. Of a small
    matrix, that may be most of it.
    """
    return max(1, rows // 20, min(127, rows // 4), min(63, (rows - 1) // 2))


def refuse_holes(path: Path, name: str, array: np.ndarray) -> None:
    """UserError for a hole in an array of any shape and dtype, a tensor of a file."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    places = {name: Place(array.shape, 0, content.size)}

    def read(start: int, stop: int) -> np.ndarray:
        return content[start:stop]

    _refuse_holes(path, places, _runs(read, 0, content.size), read)


def _refuse_holes(
    path: Path, places: Mapping[str, Place], runs: list[tuple[int, int]], read: _Read
) -> None:
    """UserError if one of the `runs` of zeros is a hole in a tensor."""
    for run in runs:
        for name, place in places.items():
            if any(
                not _is_meant(run, place, row, way, read)
                for row, way in _cut_rows(run, place)
            ):
                raise UserError(
                    f"{path} has {run[1] - run[0]:,} bytes of zeros that begin or end "
                    f"within a row of {name}, like a download that was not finished: "
                    "download it again"
                )


def _cut_rows(run: tuple[int, int], place: Place) -> Iterator[tuple[range, int]]:
    """(bytes of a row that a run cuts, way to the row beside it).

    The row beside is the one before the begin of the run, or after its end. Rows at the
    border of the tensor have none, and are left out.
    """
    (first, last), (shape, start, stop) = run, place
    if len(shape) < 2 or last <= start or stop <= first or start == stop:
        return
    size = (stop - start) // math.prod(shape[:-1])
    before, after = (first - start) % size, (last - start) % size
    if first - before - size >= start and before:
        yield range(first - before, first - before + size), -size
    if last - after + 2 * size <= stop and after:
        yield range(last - after, last - after + size), size


def _is_meant(
    run: tuple[int, int], place: Place, row: range, way: int, read: _Read
) -> bool:
    """Whether a program may have written zeros that cut a row so."""
    if len(row) < _SHORTEST:  # A few zeros at its edge are no sign.
        return True
    begin, end = max(run[0], row.start), min(run[1], row.stop)
    few = min(_FEW, len(row) // 4)
    if end - begin <= few or _is_mostly_zero(read(begin + way, end + way)):
        return True
    rest = np.concatenate([read(row.start, begin), read(end, row.stop)])
    if np.count_nonzero(rest) <= few // 4 or _is_mostly_zero(rest):
        return True
    if run[0] < row.start - few or run[1] > row.stop + few:
        return False
    if begin - row.start <= few or row.stop - end <= few:
        return True
    has_other = place.start <= row.start - way and row.stop - way <= place.stop
    return has_other and _is_mostly_zero(read(begin - way, end - way))


def _is_mostly_zero(content: np.ndarray) -> bool:
    """Whether 3/4 of some bytes are. Of float32 that was bfloat16, 1/2 are."""
    return 4 * np.count_nonzero(content) <= len(content)


@read_once
def _runs_in(path: Path, begin: int, end: int) -> list[tuple[int, int]]:
    """`_runs` of a file."""
    with path.open("rb") as file:
        return _runs(_reader(file), begin, end)


def _reader(file: BinaryIO) -> _Read:
    def read(start: int, stop: int) -> np.ndarray:
        file.seek(start)
        return np.frombuffer(file.read(stop - start), np.uint8)

    return read


def _runs(read: _Read, begin: int, end: int) -> list[tuple[int, int]]:
    """(first byte, the byte after the last) of all long runs of zeros in a range."""
    blocks: list[int] = []
    for start in range(begin, end, _CHUNK):
        part = read(start, min(start + _CHUNK, end))
        part = part[: len(part) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        blocks += [
            start + n * _BLOCK
            for n in np.flatnonzero(~part[:, :64].any(axis=1)).tolist()
            if not part[n].any()
        ]
    found = []
    for group in np.split(blocks, np.flatnonzero(np.diff(blocks) > _BLOCK) + 1):
        if not len(group):
            continue
        first, last = int(group[0]), int(group[-1]) + _BLOCK
        before = read(max(first - _BLOCK, begin), first)
        first -= np.argmax(before[::-1] != 0) if before.any() else len(before)
        after = read(last, min(last + _BLOCK, end))
        last += np.argmax(after != 0) if after.any() else len(after)
        if last - first >= _LONG:
            found.append((int(first), int(last)))
    return found


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
