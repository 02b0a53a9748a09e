"""The hash of a token file, the highest id at each width, and long series of zeros.

They need the whole file. .pcagpt-content.json beside it, or in the cache folder if that
folder is read-only, keeps the result with the file's size, mtime and ctime. As long as
these three stay the same, the file is not read again. The result of a file that has
just changed is not kept. For a program that imports pcagpt, only the cache folder keeps
it.
"""

import contextlib
import dataclasses
import hashlib
import heapq
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import process
from pcagpt.errors import UserError, naming
from pcagpt.file_hashes import is_settled, read_once, stamp_of
from pcagpt.json_files import read_json, write_json

NAME = ".pcagpt-content.json"
_CHUNK_BYTES = 1 << 22
_WIDTHS = {"uint16": 2, "uint32": 4, "int64": 8}
ZERO_BLOCK = 64  # bytes: a series of zeros is a number of blocks
_MOST_SERIES = 32  # kept, the longest


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a file of little-endian whole numbers of unknown width.

    size: in bytes; sha256: of the bytes; narrow_sha256: hash of the uint32 numbers
    after conversion to uint16, None if one does not fit; highest: the highest number at
    each width, None if the size is not a positive multiple of the width; zeros: the
    longest series of blocks of 64 zero bytes, [first byte, the byte after the last].
    """

    size: int
    sha256: str
    narrow_sha256: str | None
    highest: dict[str, int | None]
    zeros: list[list[int]]


@read_once
def content_of(path: Path, cache_dir: Path) -> Content:
    """The content of a file; .pcagpt-content.json keeps it for the next time."""
    stamp = stamp_of(path)
    if not is_settled(stamp):
        return _read(path)
    place = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:12]
    files = (
        path.parent / NAME,
        cache_dir / f".pcagpt-content-{place}.json",
    )
    for file in files:
        entry = _entries(file).get(path.name)
        if isinstance(entry, dict) and entry.get("stamp") == list(stamp):
            with contextlib.suppress(KeyError, TypeError):  # Another version wrote it.
                return Content(**entry["content"])
    content = _read(path)
    if stamp_of(path) != stamp:
        raise UserError(f"{path} changed while it was read: run the command again")
    entry = {"stamp": stamp, "content": dataclasses.asdict(content)}
    for file in files[process.is_guest() :]:
        with contextlib.suppress(OSError):
            if file.parent == cache_dir:
                cache_dir.mkdir(parents=True, exist_ok=True)
            entries = _entries(file)
            if not entries:  # Nobody needs a damaged cache.
                file.unlink(missing_ok=True)
            write_json(file, {**entries, path.name: entry})
            break
    return content


def _entries(file: Path) -> dict[str, Any]:
    """The entries of .pcagpt-content.json by file; {} if it is missing or damaged."""
    try:
        return read_json(file, "delete it") or {}
    except (UserError, OSError):
        return {}


def _read(path: Path) -> Content:
    """Reads the whole file."""
    whole, narrow = hashlib.sha256(), hashlib.sha256()
    size, is_narrow = 0, True
    highest, zeros = dict.fromkeys(_WIDTHS, 0), []
    with naming(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            zeros = _with_zeros_of(chunk, size, zeros)
            size += len(chunk)
            whole.update(chunk)
            for name, width in _WIDTHS.items():
                found = np.frombuffer(chunk, f"<u{width}", len(chunk) // width)
                highest[name] = max(highest[name], int(found.max(initial=0)))
            is_narrow = is_narrow and highest["uint32"] < 1 << 16
            if is_narrow:
                words = np.frombuffer(chunk, "<u2", len(chunk) // 2)
                narrow.update(words[::2].tobytes())
    return Content(
        size,
        whole.hexdigest(),
        narrow.hexdigest() if is_narrow else None,
        {
            name: None if size == 0 or size % width else highest[name]
            for name, width in _WIDTHS.items()
        },
        zeros,
    )


def _with_zeros_of(chunk: bytes, start: int, known: list[list[int]]) -> list[list[int]]:
    """The longest series of zeros up to the end of a chunk, which begins at `start`."""
    count = len(chunk) // ZERO_BLOCK
    words = np.frombuffer(chunk, np.uint64, count * ZERO_BLOCK // 8)
    is_zero = ~words.reshape(count, ZERO_BLOCK // 8).any(axis=1)
    borders = np.flatnonzero(np.diff(is_zero, prepend=False, append=False))
    found = (start + borders.reshape(-1, 2) * ZERO_BLOCK).tolist()
    if known and found and known[-1][1] == found[0][0]:  # It goes on in this chunk.
        found[0][0] = known.pop()[0]
    longest = heapq.nlargest(_MOST_SERIES, known + found, key=lambda n: n[1] - n[0])
    # The last one may go on, too.
    return sorted(longest + [one for one in found[-1:] if one not in longest])
