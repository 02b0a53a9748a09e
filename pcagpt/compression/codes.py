"""Makes, reads and writes the tables of `CODES`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pcagpt import coding
from pcagpt.factorization import BudgetTooSmall
from pcagpt.methods import CODED, PACKED


class Codes(Protocol):
    """A table that is stored as codes.

    sha256: hash of all values; sizes, ranks: of its bands (rank 0: full width);
    memory: bytes on a device that computes with it; constants, blocks: the 'constants'
    and `model.band_blocks` of a model that reads the codes in place; None and () if a
    model reads the dense table.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    memory: int
    constants: dict[str, Any] | None
    blocks: tuple[int, ...]
    sha256: str

    def dense(self) -> np.ndarray:
        """The table that the codes stand for: float32 [V, D]."""


class CodeKind(NamedTuple):
    """How the tables of one of `CODES` are made and stored.

    file: its name; in_bands: whether the tokens are in bands; trainable: whether
    training can start from such a table. make(prepared, bands, bytes): the best table
    whose file fits, and the file's size; BudgetTooSmall if none does.
    estimate(prepared, bands, loss): about the size of a file with that second-order
    loss; inf gives the size of the smallest.
    """

    file: str
    in_bands: bool
    trainable: bool
    make: Callable[[coding.Prepared, int, int], tuple[Codes, int]]
    estimate: Callable[[coding.Prepared, int, float], int]
    read: Callable[[Path], tuple[Codes, coding.Description]]
    write: Callable[[Path, Codes, coding.Description], None]


def _coded(prepared, bands, most):
    made = coding.within_bytes(prepared, most)
    return made.table, made.bytes


def _coded_bytes(prepared, bands, loss):
    return coding.estimated_bytes(prepared, loss)


def _packed(prepared, bands, most):
    made = coding.pack(prepared, bands, most)
    if (size := coding.packed_bytes(made)) > most:
        raise BudgetTooSmall(
            f"{most:,} bytes cannot hold a packed table: the smallest takes {size:,}"
        )
    return made, size


def _packed_bytes(prepared, bands, loss):
    if loss == math.inf:
        return coding.packed_bytes(coding.pack(prepared, bands, 0))
    return coding.estimated_packed_bytes(prepared, bands, loss)


KINDS = {
    CODED: CodeKind(
        file="table.pcat",
        in_bands=False,
        trainable=True,
        make=_coded,
        estimate=_coded_bytes,
        read=coding.read,
        write=coding.write,
    ),
    PACKED: CodeKind(
        file="table.npz",
        in_bands=True,
        trainable=False,
        make=_packed,
        estimate=_packed_bytes,
        read=coding.read_packed,
        write=coding.write_packed,
    ),
}
