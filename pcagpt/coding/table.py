"""A coded token table: integers, and the dense table that they stand for.

Shape letters: V vocabulary, D model width, K directions, n tokens of a class.
"""

import dataclasses
import math

import numpy as np

from pcagpt.coding.basis import Basis
from pcagpt.coding.quantize import class_steps
from pcagpt.factorization import FLOAT_BYTES
from pcagpt.factorization.chunks import chunks
from pcagpt.factorization.table import sha256_of_arrays


class InexactSums(ValueError):
    """The integers of a table are too large for exact sums."""


LARGEST_SUM = 2.0**53  # Sums of integers below this are exact in float64, in any order.


@dataclasses.dataclass(frozen=True)
class CodedTable:
    """Row v is step_v * (symbols[:, v] @ basis[:-1]) + basis[-1]."""

    symbols: np.ndarray  # [K, V] int16
    classes: np.ndarray  # [V] int8: step_v = step * 2^(class / 2)
    step: float
    basis: Basis  # [K + 1, D]; the last row is the mean
    # A model reads the dense table, which is one band at full width.
    ranks, blocks, constants = (0,), (), None

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        return len(self.classes), self.basis.integers.shape[1]

    @property
    def sizes(self) -> tuple[int]:
        """(V,)."""
        return (len(self.classes),)

    @property
    def memory(self) -> int:
        """Bytes of the dense table."""
        return FLOAT_BYTES * math.prod(self.shape)

    @property
    def sha256(self) -> str:
        """Hash of all values."""
        steps = np.float64(self.step), self.classes
        return sha256_of_arrays(self.symbols, *steps, *self.basis)

    def dense(self) -> np.ndarray:
        """The table, float32 [V, D], the same bits on every machine.

        Sums are of integers, so their order does not matter; what follows is a fixed
        sequence of single float64 operations. InexactSums if a sum may be inexact.
        """
        integers_KD, rows_K, columns_D = self.basis
        mean_D = np.ldexp(integers_KD[-1].astype(np.float64), rows_K[-1] + columns_D)
        # The sums are in units of the row with the finest step.
        lowest = min(rows_K[:-1], default=rows_K[-1])
        shifts_K = (rows_K[:-1] - lowest)[:, None]
        integers_KD = np.ldexp(integers_KD[:-1].astype(np.float64), shifts_K)
        units_D = np.ldexp(1.0, lowest + columns_D)
        largest_K = np.abs(integers_KD).max(axis=1, initial=0)
        dense_VD = np.empty(self.shape, np.float32)
        for name in np.unique(self.classes):
            tokens = np.flatnonzero(self.classes == name)
            for part in chunks(len(tokens)):
                symbols_Kn = self.symbols[:, tokens[part]]
                used = np.flatnonzero(symbols_Kn.any(axis=1))
                symbols_Kn = symbols_Kn[used].astype(np.float64)
                size = np.abs(symbols_Kn).max(axis=1) @ largest_K[used]
                if not size < LARGEST_SUM:
                    raise InexactSums("its integers are too large for exact sums")
                sums_nD = symbols_Kn.T @ integers_KD[used]
                scaled_nD = sums_nD * units_D * class_steps(name, self.step)
                dense_VD[tokens[part]] = scaled_nD + mean_D
        return dense_VD
