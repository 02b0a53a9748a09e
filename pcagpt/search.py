"""Ways to compress a table, tried one by one: the rows of a sweep.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from pcagpt import factorize
from pcagpt.factorize import BandedTable, LowRank, SecondOrder
from pcagpt.quantize import quantize

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compress a table.

    method: a name in `factorize.METHODS`, or 'baseline' for the table as it is; bands:
    frequency bands to start from, 1 for none; budget: numbers that may be stored;
    rank: whose budget that is in a single band (0 for the baseline); bits: of a stored
    number, 32 (float32), 8 or 4.
    """

    method: str
    bands: int
    budget: int
    rank: int
    bits: int = 32

    @property
    def name(self) -> str:
        """As in 'context, 12 bands, int8'."""
        bands = f", {self.bands} bands" if self.bands > 1 else ""
        return f"{self.method}{bands}" + (f", int{self.bits}" if self.bits < 32 else "")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compressed table: what is stored (None for the baseline), and what it is worth.

    dense: [V, D], what is computed with; parameters, bytes: stored; second_order: the
    loss it will add, to second order; seconds: that making it took.
    """

    recipe: Recipe
    table: BandedTable | None
    dense: np.ndarray
    parameters: int
    bytes: int
    second_order: SecondOrder
    seconds: float


class Compressor:
    """Carries recipes out on one table."""

    def __init__(
        self, table_VD: np.ndarray, statistics: factorize.Statistics, split: float = 0.0
    ):
        """Takes the table [V, D] and the statistics of its model."""
        self._table_VD, self._statistics, self._split = table_VD, statistics, split
        self._predict = factorize.Predictor(table_VD, statistics)
        self._factors: dict[str, factorize.Factors] = {}

    def __call__(self, recipe: Recipe) -> Candidate:
        """The candidate of a recipe.

        Raises:
          ValueError: the budget is too small for the bands, or the rank too high.
        """
        began = time.monotonic()
        table = None if recipe.method == "baseline" else self._make(recipe)
        if recipe.bits == 32:
            dense_VD = self._table_VD if table is None else table.dense()
            stored = self._table_VD.size if table is None else table.parameters
            size = stored * FLOAT_BYTES
        else:
            dense_VD, stored, size = quantized(self._table_VD, table, recipe.bits)
        seconds = time.monotonic() - began
        second_order = self._predict(dense_VD)
        return Candidate(recipe, table, dense_VD, stored, size, second_order, seconds)

    def _make(self, recipe: Recipe) -> BandedTable:
        weighting = factorize.METHODS[recipe.method](self._table_VD, self._statistics)
        if recipe.bands > 1:
            return factorize.banded(
                self._table_VD, weighting, recipe.bands, recipe.budget, self._split
            )
        if recipe.method not in self._factors:  # All ranks come from one solve.
            self._factors = {recipe.method: factorize.solve(self._table_VD, weighting)}
        factors = self._factors[recipe.method]
        rank = recipe.budget // sum(self._table_VD.shape)
        return factorize.single_band(factors, rank, self._split)


def quantized(
    table_VD: np.ndarray, table: BandedTable | None, bits: int
) -> tuple[np.ndarray, int, int]:
    """(dense table [V, D], numbers stored, bytes stored) at 8 or 4 bits."""
    if table is None:
        stored = quantize(table_VD, bits)
        return stored.dense(), table_VD.size, stored.bytes
    size, rounded = (FLOAT_BYTES * len(table.order) if len(table.tables) > 1 else 0), []
    for part in table.tables:
        if isinstance(part, LowRank):
            wte, scale = quantize(part.wte, bits), quantize(part.scale, bits)
            rounded.append(part._replace(wte=wte.dense(), scale=scale.dense()))
            size += wte.bytes + scale.bytes
        else:
            rows = quantize(part, bits)
            rounded.append(rows.dense())
            size += rows.bytes
    return table._replace(tables=tuple(rounded)).dense(), table.parameters, size


def recipes(
    vocab_size: int,
    width: int,
    methods: Sequence[str],
    ranks: Sequence[int],
    bands: Sequence[int],
    bits: Sequence[int],
) -> Iterator[Recipe]:
    """Every method x bands x rank, and the baseline and the last method at fewer bits.

    Plain 'svd' and 'pca' weigh no tokens and come in one band only. Bands that a
    rank's budget is too small for are left out.
    """
    for count in bands:
        for method in methods:
            for rank in ranks:
                budget = factorize.budget_of_rank(vocab_size, width, rank)
                least = vocab_size + (vocab_size + count * width if count > 1 else 0)
                if budget >= least and (
                    count == 1 or factorize.needs_statistics(method)
                ):
                    yield Recipe(method, count, budget, rank)
    for bit in bits:
        yield Recipe("baseline", 1, vocab_size * width, 0, bit)
        for rank in ranks:
            budget = factorize.budget_of_rank(vocab_size, width, rank)
            yield Recipe(methods[-1], max(bands), budget, rank, bit)


class Calibration:
    """From second order to the added loss: fitted to a few measured tables.

    log(added loss) = a + b log(second order), by least squares.
    """

    def __init__(self, pairs: Sequence[tuple[SecondOrder, float]]):
        """Takes (second order, measured added loss) of at least two tables."""
        points = np.array(
            [
                (math.log(sum(second_order)), math.log(measured))
                for second_order, measured in pairs
                if measured > 0 and sum(second_order) > 0
            ]
        ).reshape(-1, 2)
        self._slope, self._offset = 1.0, 0.0
        if len(points) > 1:
            self._slope, self._offset = np.polyfit(*points.T, 1)

    def __call__(self, second_order: SecondOrder) -> float:
        """The predicted added loss in nats per token."""
        total = sum(second_order)
        if total <= 0:
            return 0.0
        return math.exp(self._offset + self._slope * math.log(total))
