"""The ids of a token file, read from the disk where they are used."""

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pcagpt.errors import UserError, naming

_CHUNK_TOKENS = 1 << 20


class TokenArray:
    """Little-endian ids in a file: [n], read-only; every slice is a new array.

    The file stays open: another file of its name changes nothing. It is no memory map,
    because the system ends a process that reads a mapped file after its end is cut off.

    Raises:
      UserError: the file became shorter than a slice needs.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._path = path
        with naming(path):
            self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._length = os.fstat(self._file).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._length)
        assert step == 1, "a slice of a token file takes every id"
        ids = np.empty(max(stop - start, 0), self.dtype)
        left, offset = memoryview(ids).cast("B"), start * self.dtype.itemsize
        while left:  # One call reads at most 2 GiB.
            with naming(self._path):
                count = os.preadv(self._file, [left], offset)
            if not count:
                raise UserError(
                    f"{self._path} became shorter while this command used it: restore "
                    "it, and run the same command again"
                )
            left, offset = left[count:], offset + count
        return ids

    def status(self) -> os.stat_result:
        """That of the open file."""
        with naming(self._path):
            return os.fstat(self._file)

    def sha256(self) -> str:
        """Hash of the ids: as uint16 if all of them fit, as uint32 otherwise."""
        whole, narrow, is_narrow = hashlib.sha256(), hashlib.sha256(), True
        for ids in pieces(self):
            whole.update(ids)
            is_narrow = is_narrow and int(ids.max()) < 1 << 16
            if is_narrow:
                narrow.update(ids.astype("<u2"))
        return (narrow if is_narrow else whole).hexdigest()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def pieces(tokens: np.ndarray | TokenArray) -> Iterator[np.ndarray]:
    """Consecutive pieces of an array of tokens, small enough to convert."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]
