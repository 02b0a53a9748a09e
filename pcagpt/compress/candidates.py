"""Ways to compress a table, tried one by one: the rows of a sweep.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pcagpt import factorize
from pcagpt.factorize import BandFactors, FactorizedTable, SecondOrder
from pcagpt.factorize.quantize import quantize

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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compressed table: what is stored (None for the baseline), and what it is worth.

    dense: [V, D], what is computed with; parameters, bytes: stored; second_order: the
    loss it will add, to second order; seconds: that making it took.
    """

    recipe: Recipe
    table: FactorizedTable | None
    dense: np.ndarray
    parameters: int
    bytes: int
    second_order: SecondOrder
    seconds: float

    @property
    def as_bands(self) -> FactorizedTable:
        """What is stored; of the baseline, its one band at full width."""
        return self.table or FactorizedTable.of_one_band(BandFactors(self.dense, None))


class Compressor:
    """Carries recipes out on one table."""

    def __init__(
        self, table_VD: np.ndarray, statistics: factorize.Statistics, split: float = 0.0
    ):
        """Takes the table [V, D] and the statistics of its model."""
        self._table_VD, self._statistics, self._split = table_VD, statistics, split
        self._predict = factorize.Predictor(table_VD, statistics)
        self._made_for = ""

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
            table, dense_VD, stored, size = quantized(
                self._table_VD, table, recipe.bits
            )
        seconds = time.monotonic() - began
        second_order = self._predict(dense_VD)
        return Candidate(recipe, table, dense_VD, stored, size, second_order, seconds)

    def _make(self, recipe: Recipe) -> FactorizedTable:
        if self._made_for != recipe.method:  # All ranks come from one solve.
            self._made_for = recipe.method
            self._make_table = factorize.Factorizer(
                self._table_VD, recipe.method, self._statistics, self._split
            )
        return self._make_table(recipe.budget, recipe.bands)


def quantized(
    table_VD: np.ndarray, table: FactorizedTable | None, bits: int
) -> tuple[FactorizedTable | None, np.ndarray, int, int]:
    """(table as rounded, dense [V, D], numbers, bytes stored) at 8 or 4 bits."""
    if table is None:
        stored = quantize(table_VD, bits)
        return None, stored.dense(), table_VD.size, stored.bytes
    size, rounded = (FLOAT_BYTES * len(table.order) if len(table.bands) > 1 else 0), []
    for band in table.bands:
        codes = [None if array is None else quantize(array, bits) for array in band]
        rounded.append(BandFactors(*(code and code.dense() for code in codes)))
        size += sum(code.bytes for code in codes if code)
    table = table._replace(bands=tuple(rounded))
    return table, table.dense(), table.parameters, size


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

    def fitting(method: str, count: int, bit: int) -> Iterator[Recipe]:
        for rank in ranks:
            budget = factorize.budget_of_rank(vocab_size, width, rank)
            # Rank 1 in each of several bands, and the order of the tokens.
            least = 2 * vocab_size + count * width
            if count == 1 or budget >= least:
                yield Recipe(method, count, budget, rank, bit)

    for count in bands:
        for method in methods:
            if count == 1 or factorize.METHODS[method].needs_statistics:
                yield from fitting(method, count, 32)
    for bit in bits:
        yield Recipe("baseline", 1, vocab_size * width, 0, bit)
        most = max(bands) if factorize.METHODS[methods[-1]].needs_statistics else 1
        yield from fitting(methods[-1], most, bit)


class Calibration:
    """From second order to the added loss, by what a few measured tables add.

    log(added loss) = a + b log(second order), by least squares for each method: second
    order is too much where errors are large, and too little for a method that makes it
    smaller than any other would. What none was measured of is taken to be proportional
    to second order, as the smallest that was.
    """

    def __init__(self, measured: Sequence[tuple[str, SecondOrder, float]]):
        """Takes (method, second order, added loss) of each measured table."""
        points: dict[str, list[tuple[float, float]]] = {}
        for method, second_order, added_loss in measured:
            if added_loss > 0 and sum(second_order) > 0:
                point = math.log(sum(second_order)), math.log(added_loss)
                points.setdefault(method, []).append(point)
        self._lines = {method: _line(found) for method, found in points.items()}
        x, y = min(sum(points.values(), []), default=(0.0, 0.0))
        self._default = 1.0, y - x

    def __call__(self, method: str, second_order: SecondOrder) -> float:
        """The predicted added loss in nats per token."""
        if sum(second_order) <= 0:
            return 0.0
        slope, offset = self._lines.get(method, self._default)
        return math.exp(offset + slope * math.log(sum(second_order)))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, offset) through points; of slope 1 through a single place."""
    x, y = np.array(points or [(0.0, 0.0)]).T
    if np.ptp(x) < 1e-3:
        return 1.0, float(np.mean(y - x))
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)


def anchors(tried: Sequence[Recipe]) -> set[Recipe]:
    """The recipes to calibrate on: of each method the smallest and the largest size.

    In one band and in the fewest of several, where these are tried.
    """
    found = set()
    for method in {recipe.method for recipe in tried}:
        own = [r for r in tried if r.method == method and r.bits == 32]
        for is_banded in (False, True):
            kind = [recipe for recipe in own if (recipe.bands > 1) == is_banded]
            fewest = min((recipe.bands for recipe in kind), default=0)
            kind = [recipe for recipe in kind if recipe.bands == fewest]
            if kind:
                found.add(min(kind, key=lambda recipe: recipe.budget))
                found.add(max(kind, key=lambda recipe: recipe.budget))
    return found


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate with what it was predicted to add, and what it adds."""

    candidate: Candidate
    predicted: float
    added: float


class Advisor:
    """Finds the table that keeps a bound, by predicting first and measuring then."""

    # Measurements at most, and how close to its bound the found one may stop.
    TRIALS, SLACK = 6, 0.1

    def __init__(
        self,
        compressor: Compressor,
        measure: Callable[[Candidate], float],
        method: str,
        bands: Sequence[int],
    ):
        """Takes what makes a candidate, and what measures the loss it adds."""
        self._make, self._measure = compressor, measure
        self._method, self._bands = method, bands
        self.trials: list[Measured] = []

    def smallest(self, max_added_loss: float, least: int, most: int) -> Measured | None:
        """The smallest table within a loss, of least..most numbers; None: none is.

        Added loss is taken for a power of the budget: from one trial to the next the
        budget moves along the line through those that lie around the bound.
        """
        low, high = math.log(least), math.log(most)
        place = (low + high) / 2
        for _ in range(self.TRIALS):
            recipe = self._best_recipe(round(math.exp(place)), 32)
            if recipe is None:  # Too small for any of the numbers of bands.
                low, place = place, (place + high) / 2
                continue
            trial = self._try(recipe)
            met = trial.added <= max_added_loss
            low, high = (low, place) if met else (place, high)
            if met and trial.added >= (1 - self.SLACK) * max_added_loss:
                break
            if high - low < 0.02:
                break
            place = self._crossing(max_added_loss * (1 - self.SLACK / 2), low, high)
        kept = [t for t in self.trials if t.added <= max_added_loss]
        return min(kept, key=lambda t: t.candidate.parameters, default=None)

    def best(
        self, budgets: Sequence[tuple[int, int]], max_bytes: int = 0
    ) -> Measured | None:
        """Of (numbers, bits) to choose from, the table that adds least.

        Budgets below rank 1 are passed over, and tables of more than `max_bytes`
        (0: any number); None if that leaves none. Within bytes, the table as it is at
        as many bits may be it, too.
        """
        for budget, bits in budgets:
            recipe = self._best_recipe(budget, bits)
            if recipe is not None and max_bytes and bits < 32:
                recipe = self._filling(recipe, max_bytes)
            if recipe is not None:
                self._try(recipe)
            whole = Recipe("baseline", 1, 0, 0, bits)
            if max_bytes and bits < 32 and self._make(whole).bytes <= max_bytes:
                self._try(whole)
        most = max_bytes or math.inf
        kept = [trial for trial in self.trials if trial.candidate.bytes <= most]
        return min(kept, key=lambda trial: trial.added, default=None)

    def _filling(self, recipe: Recipe, max_bytes: int) -> Recipe:
        """The recipe at the budget whose table takes almost as many bytes as it may."""
        fitting = recipe
        for _ in range(2):  # Bytes are all but proportional to numbers.
            size = self._make(recipe).bytes
            if size <= max_bytes:
                fitting = recipe
            budget = int(recipe.budget * 0.995 * max_bytes / size)
            recipe = dataclasses.replace(recipe, budget=budget)
        try:
            return recipe if self._make(recipe).bytes <= max_bytes else fitting
        except ValueError:
            return fitting

    def _best_recipe(self, budget: int, bits: int) -> Recipe | None:
        """The number of bands with the least second order at a budget, if any fits."""
        options = []
        for bands in self._bands:
            recipe = Recipe(self._method, bands, budget, 0, bits)
            try:
                options.append((sum(self._make(recipe).second_order), recipe))
            except ValueError:  # Too small for that many bands.
                continue
        return min(options, key=lambda option: option[0])[1] if options else None

    def _try(self, recipe: Recipe) -> Measured:
        candidate = self._make(recipe)
        calibration = Calibration(
            [
                (
                    trial.candidate.recipe.method,
                    trial.candidate.second_order,
                    trial.added,
                )
                for trial in self.trials
            ]
        )
        predicted = calibration(recipe.method, candidate.second_order)
        trial = Measured(candidate, predicted, self._measure(candidate))
        self.trials.append(trial)
        return trial

    def _crossing(self, wanted: float, low: float, high: float) -> float:
        """The log budget at which the loss should be as wanted, between two others."""
        points = sorted(
            (math.log(t.candidate.parameters), math.log(max(t.added, 1e-6)))
            for t in self.trials
        )
        middle = (low + high) / 2
        if len(points) < 2:
            return middle
        near = sorted(points, key=lambda point: abs(point[1] - math.log(wanted)))[:2]
        (x0, y0), (x1, y1) = near
        if abs(y1 - y0) < 1e-9:
            return middle
        place = x0 + (math.log(wanted) - y0) * (x1 - x0) / (y1 - y0)
        margin = 0.05 * (high - low)
        return min(max(place, low + margin), high - margin)
