"""Ways to compress a table, and the tables that they give.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcagpt import coding
from pcagpt.compression.codes import KINDS, Codes
from pcagpt.compression.rivals import MAKERS
from pcagpt.compression.sides import counted_by, seen_by
from pcagpt.factorization import (
    FLOAT_BYTES,
    BandFactors,
    BudgetTooSmall,
    FactorizedTable,
    Factorizer,
    Predictor,
    SecondOrder,
    Statistics,
    Weighting,
    budget_of_rank,
    least_budget,
    quantize,
)
from pcagpt.methods import FEWEST_FACTOR_BITS, METHODS, OWN_TABLE
from pcagpt.rows import Recipe, Row, SwapScores, in_bands

USED = 0.9  # A file that fills less than this share of its bytes gets a note.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compressed table.

    table: factors, or the dense table that codes stand for; codes: how it is stored,
    for `CODES`; dense: [V, D]; bytes: its storage; second_order: estimate of its added
    loss; seconds: time to make the table; stores_mean: as for `Compressor`.
    """

    recipe: Recipe
    table: FactorizedTable
    codes: Codes | None
    dense: np.ndarray
    bytes: int
    second_order: SecondOrder
    seconds: float
    stores_mean: bool = True

    def row(self, scores: SwapScores) -> Row:
        """The row of the candidate in sweep.json, still without a prediction."""
        return Row(
            **self.stored,
            **dataclasses.asdict(scores),
            second_order_head=self.second_order.head,
            second_order_input=self.second_order.input,
        )

    @property
    def stored(self) -> dict[str, Any]:
        """The fields of `Stored`."""
        stored = self.codes or self.table
        is_model = self.recipe.is_codes or self.recipe.is_factors
        params = self.table.parameters
        params += self.table.mean_parameters if self.stores_mean else 0
        return dataclasses.asdict(self.recipe) | {
            "band_sizes": list(stored.sizes),
            "band_ranks": list(stored.ranks),
            "params": params,
            "bytes": self.bytes,
            "memory": self.codes.memory if self.codes else FLOAT_BYTES * params,
            "seconds": self.seconds,
            "table_sha256": self.sha256 if is_model else None,
        }

    @property
    def sha256(self) -> str:
        """Hash of its factors or codes."""
        return (self.codes or self.table).sha256

    def is_same_table(self, other: "Candidate") -> bool:
        """Whether both are stored in the same way, and hold the same numbers."""
        mine, its = (
            (one.recipe.method, one.recipe.bits, one.bytes) for one in (self, other)
        )
        return mine == its and np.array_equal(self.dense, other.dense)

    @property
    def note(self) -> str:
        """A line about bytes that codes leave unused, because none are finer."""
        recipe = self.recipe
        if not recipe.is_codes or self.bytes > USED * recipe.budget:
            return ""
        return (
            f"{in_bands(recipe)}: {recipe.budget:,} bytes are more than such a table "
            f"can use; it takes {self.bytes:,}"
        )


class Compressor:
    """Applies recipes to one table."""

    def __init__(
        self,
        table_VD: np.ndarray,
        statistics: Statistics,
        singular_value_split: float = 0.0,
        side: str = "",
        stores_mean: bool = True,
    ):
        """`side` is as for `sides.seen_by`.

        stores_mean: whether the mean of factors is stored beside them. Otherwise, the
        position embeddings hold it, and it takes no bytes.
        """
        self._table_VD, self._statistics = table_VD, seen_by(side, statistics)
        self._side, self._split = side, singular_value_split
        self._stores_mean = stores_mean
        self._predict = Predictor(table_VD, statistics)
        self._method = ""
        # Of this table only: a program may compress many.
        self._kept_codes = functools.cache(self._make_codes)

    def __call__(self, recipe: Recipe) -> Candidate:
        """Makes the candidate of a recipe; BudgetTooSmall if no table fits."""
        began, codes = time.monotonic(), None
        if recipe.method in KINDS:
            try:
                codes, size = self._codes(recipe)
                table = of_full_width(codes.dense())
            except coding.InexactSums as error:  # Of values that differ extremely.
                raise BudgetTooSmall(f"no {recipe.method} table: {error}") from None
        elif recipe.method in MAKERS:
            maker = MAKERS[recipe.method]
            made = maker.make(self._table_VD, self._statistics, recipe)
            table, size = of_full_width(made.dense()), made.bytes
        else:
            table = self._make(recipe)
            size = table.parameters * FLOAT_BYTES
            if recipe.bits < 32:
                table, size = quantized(table, recipe.bits)
            if self._stores_mean:
                size += FLOAT_BYTES * table.mean_parameters
        dense_VD = table.dense()
        seconds = time.monotonic() - began
        second_order = counted_by(self._side, self._predict(dense_VD))
        made = recipe, table, codes, dense_VD, size, second_order, seconds
        return Candidate(*made, self._stores_mean)

    def codes_bytes(self, method: str, bands: int, loss: float) -> int:
        """About the size of a file of `CODES` with this second-order loss.

        An infinite loss gives the size of the smallest file.
        """
        return KINDS[method].estimate(self._prepared, bands, loss)

    def _codes(self, recipe: Recipe) -> tuple[Codes, int]:
        """`_make_codes`; keeps those that a sweep needs again for its models.

        It needs only the best tables in bands, which are quick to make again.
        """
        in_bands = KINDS[recipe.method].in_bands
        return (self._make_codes if in_bands else self._kept_codes)(recipe)

    def _make_codes(self, recipe: Recipe) -> tuple[Codes, int]:
        """(a table of `CODES`, size of its file)."""
        make = KINDS[recipe.method].make
        return make(self._prepared, recipe.bands, recipe.budget)

    @functools.cached_property
    def _prepared(self) -> coding.Prepared:
        return coding.prepare(self._table_VD, self._weighting)

    @functools.cached_property
    def _weighting(self) -> Weighting:
        return coding.loss_weighting(self._table_VD, self._statistics)

    def gaussian_limit(self) -> list[tuple[float, float]]:
        """`coding.gaussian_limit` of the table."""
        return coding.gaussian_limit(self._table_VD, self._weighting)

    def _make(self, recipe: Recipe) -> FactorizedTable:
        if recipe.method != self._method:  # One solution has all ranks of a method.
            self._method = recipe.method
            self._factorize = Factorizer(
                self._table_VD, recipe.method, self._statistics, self._split
            )
        budget, (vocab_size, width) = recipe.budget, self._table_VD.shape
        if self._stores_mean and self._factorize.has_mean and not recipe.rank:
            # The budget of a search is that of all that is stored.
            least = least_budget(vocab_size, width, recipe.bands)
            budget = max(budget - width, min(budget, least))
        return self._factorize(budget, recipe.bands)


def of_full_width(table_VD: np.ndarray) -> FactorizedTable:
    """A table that is stored as it is, in a single band."""
    return FactorizedTable.of_one_band(BandFactors(table_VD, None))


def quantized(table: FactorizedTable, bits: int) -> tuple[FactorizedTable, int]:
    """The table after rounding its factors to few bits, and their size in bytes."""
    size = FLOAT_BYTES * len(table.order) if len(table.bands) > 1 else 0
    bands = []
    for band in table.bands:
        codes = [None if factor is None else quantize(factor, bits) for factor in band]
        bands.append(BandFactors(*(code and code.dense() for code in codes)))
        size += sum(code.bytes for code in codes if code)
    return table._replace(bands=tuple(bands)), size


def factor_methods(methods: Sequence[str]) -> list[str]:
    """The methods that make factors."""
    return [method for method in methods if method in METHODS]


def counts_of(method: str, bands: Sequence[int]) -> Sequence[int]:
    """The numbers of bands that a method is tried in, of those in `bands`.

    Methods without token weights take only 1. Codes without bands always have 1.
    """
    if method in KINDS:
        return bands if KINDS[method].in_bands else (1,)
    return [n for n in bands if n == 1 or METHODS[method].weighs_tokens]


def left_out(methods: Sequence[str], bands: Sequence[int]) -> list[str]:
    """The methods that make factors, and can use none of these numbers of bands."""
    return [name for name in factor_methods(methods) if not counts_of(name, bands)]


def best_factors(methods: Sequence[str], bands: Sequence[int]) -> str | None:
    """The best method that makes factors in one of these numbers of bands: the last."""
    fitting = [name for name in factor_methods(methods) if counts_of(name, bands)]
    return fitting[-1] if fitting else None


def tries_own_table(methods: Sequence[str]) -> bool:
    """Whether the model's own table is tried at few bits beside these methods."""
    return OWN_TABLE in methods or bool(factor_methods(methods))


def recipes(
    vocab_size: int,
    width: int,
    methods: Sequence[str],
    ranks: Sequence[int],
    bands: Sequence[int],
    bits: Sequence[int],
) -> list[Recipe]:
    """All combinations of method, bands and rank, the most useful ones first.

    Codes come first. The file of a coded table may have as many bytes as the rank's
    factors have values. Then come the best method that makes factors in bands, plain
    SVD, rivals and rounded factors, and the other methods. Methods without token
    weights get a single band, and are left out without 1 in `bands`. Recipes in bands
    are left out if the budget of their rank is too small.
    """
    budgets = {rank: budget_of_rank(vocab_size, width, rank) for rank in ranks}
    least = {count: least_budget(vocab_size, width, count) for count in bands}
    found = [
        Recipe(method, count, budgets[rank], rank, 0)
        for method in KINDS
        if method in methods
        for count in counts_of(method, bands)
        for rank in ranks
    ]
    for rival in MAKERS:
        if rival in methods or (rival == OWN_TABLE and tries_own_table(methods)):
            sizes = MAKERS[rival].sizes((vocab_size, width), bits)
            found += [Recipe(rival, 1, count, 0, bit) for count, bit in sizes]
    kinds = [
        (method, count, 32)
        for method in reversed(factor_methods(methods))
        for count in counts_of(method, bands)
    ]
    if best := best_factors(methods, bands):
        fewer = [bit for bit in bits if bit >= FEWEST_FACTOR_BITS]
        kinds += [(best, max(counts_of(best, bands)), bit) for bit in fewer]
    found += [
        Recipe(method, count, budgets[rank], rank, bit)
        for method, count, bit in kinds
        for rank in ranks
        if budgets[rank] >= least[count]
    ]

    def usefulness(recipe: Recipe) -> tuple[int, int]:
        if recipe.is_codes:
            return 0, 0
        if not recipe.is_factors:
            return 3, 0
        if recipe.method == best and recipe.bands > 1:
            return 1, -recipe.bands
        return (2 if recipe.method == "svd" else 4), -recipe.bands

    return sorted(found, key=usefulness)
