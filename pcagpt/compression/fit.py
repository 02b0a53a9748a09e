"""Finds the table that fits a bound on loss or size."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from pcagpt.compression.candidates import (
    Candidate,
    best_factors,
    counts_of,
    tries_own_table,
)
from pcagpt.factorization import BudgetTooSmall, LossRegression, least_budget
from pcagpt.methods import CODES, FEWEST_FACTOR_BITS, OWN_TABLE
from pcagpt.rows import Recipe, Row, SwapScores


@dataclasses.dataclass(frozen=True)
class Trial:
    """A measured candidate.

    predicted: its added loss, predicted before measuring; None while no earlier trial
    added any.
    """

    candidate: Candidate
    scores: SwapScores
    predicted: float | None

    def row(self) -> Row:
        """The row of advice.json."""
        row = self.candidate.row(self.scores)
        return dataclasses.replace(row, predicted_loss=self.predicted)


class Fit:
    """Searches for the table that meets a bound; `trials` is the log.

    Args:
      make: a `Compressor`.
      codes_bytes: its estimate of the size of a file of `CODES`.
      measure: scores a candidate.
      methods: the allowed ones. Those of `CODES` make codes; the `best_factors` of
        the others make factors.
      bands: numbers of frequency bands to choose from.
      table: (V, D) of the full table.
    """

    TRIALS = 6  # sizes that one search for a loss tries

    def __init__(
        self,
        make: Callable[[Recipe], Candidate],
        codes_bytes: Callable[[str, int, float], int],
        measure: Callable[[Candidate], SwapScores],
        methods: Sequence[str],
        bands: Sequence[int],
        table: tuple[int, int],
    ):
        self._make, self._codes_bytes, self._measure = make, codes_bytes, measure
        self._codes, self._bands = [m for m in CODES if m in methods], bands
        self._method = best_factors(methods, bands)
        counts = counts_of(self._method, bands) if self._method else (1,)
        self._least = min(least_budget(*table, count) for count in counts)
        self._tries_own_table = tries_own_table(methods)
        self._rank_1, self._whole = sum(table), math.prod(table)
        self.trials: list[Trial] = []
        self.refusal = "no method makes one"  # why the last one could not be made

    def within_loss(
        self, max_added_loss: float, bits: Sequence[int] = ()
    ) -> Trial | None:
        """The smallest table found that adds at most this loss, or None.

        It has the first of `CODES` that is allowed, otherwise factors. D's own table at
        one of `bits` takes its place if it is smaller and fits.
        """
        start = math.sqrt(4 * self._rank_1 * self._whole)
        most, slope = self._whole, -1.5
        # The span of codes: from some bytes for each token to four for each value.
        if self._codes:
            start = self._estimated_bytes(self._codes[0], max_added_loss)
            most, slope = 4 * most, -2.0
        span = self._rank_1, min(max(start, self._rank_1), most), most

        def added_loss(budget: int) -> float | None:
            method = self._codes[0] if self._codes else self._method
            made = self._best(method, budget, 0 if self._codes else 32)
            return None if made is None else self._try(made).scores.added_loss

        search(added_loss, max_added_loss, span, slope, 0.1, self.TRIALS)
        found = self._smallest(max_added_loss)
        for bit in bits if self._tries_own_table else ():
            whole = self._own_table(bit)
            if found is None or whole.bytes < found.candidate.bytes:
                self._try(whole)
                found = self._smallest(max_added_loss)
        return found

    def within_bytes(self, max_bytes: int, bits: Sequence[int]) -> Trial | None:
        """The table with the least added loss of at most this many bytes, or None.

        Tries all of `CODES` that are allowed, and factors at each of `bits` (bits per
        stored value). Below 32 bits, it also tries the full table.
        """
        for method in self._codes:
            if made := self._best(method, max_bytes, 0):
                self._try(made)
        for bit in bits:
            if self._method and bit >= FEWEST_FACTOR_BITS:
                self._fill_bytes(max_bytes, bit)
            if self._tries_own_table and bit < 32:
                whole = self._own_table(bit)
                if whole.bytes <= max_bytes:
                    self._try(whole)
        return min(self.trials, key=lambda t: t.scores.added_loss, default=None)

    def least_bytes(self, bits: Sequence[int]) -> int:
        """The smallest bound for which `within_bytes` finds a table."""
        found = [self._estimated_bytes(method, math.inf) for method in self._codes]
        for bit in bits:
            if self._method and bit >= FEWEST_FACTOR_BITS:
                found.append(self._best(self._method, self._least, bit).bytes)
            if self._tries_own_table and bit < 32:
                found.append(self._own_table(bit).bytes)
        return min(found)

    def _smallest(self, max_added_loss: float) -> Trial | None:
        """The smallest table tried that adds at most this loss; of equals, the best."""

        def size_and_loss(trial: Trial) -> tuple[int, float]:
            return trial.candidate.bytes, trial.scores.added_loss

        kept = [t for t in self.trials if t.scores.added_loss <= max_added_loss]
        return min(kept, key=size_and_loss, default=None)

    def _own_table(self, bits: int) -> Candidate:
        """The full table rounded to this many bits."""
        return self._make(Recipe(OWN_TABLE, 1, self._whole, 0, bits))

    def _estimated_bytes(self, method: str, loss: float) -> int:
        counts = counts_of(method, self._bands)
        return min(self._codes_bytes(method, count, loss) for count in counts)

    def _fill_bytes(self, max_bytes: int, bits: int) -> None:
        """Measures the largest table that fits, if any."""
        made: list[Candidate] = []

        def size(budget: int) -> int | None:
            candidate = self._best(self._method, budget, bits)
            if candidate is None:
                return None
            made.append(candidate)
            return candidate.bytes

        most = min(self._whole, max_bytes * 8 // bits)
        if most < self._least:
            return
        # Rounded tables also store scales, so they have room for fewer codes.
        start = most if bits == 32 else max(most / 1.15, self._least)
        search(size, max_bytes, (self._least, start, most), 1.0, 0.02, 3)
        if all(candidate.bytes > max_bytes for candidate in made):
            size(self._least)
        fitting = [candidate for candidate in made if candidate.bytes <= max_bytes]
        if fitting:
            self._try(max(fitting, key=lambda candidate: candidate.bytes))

    def _best(self, method: str, budget: int, bits: int) -> Candidate | None:
        """The candidate of least second-order loss; None if the budget is too small."""
        found = []
        for bands in counts_of(method, self._bands):
            try:
                found.append(self._make(Recipe(method, bands, budget, 0, bits)))
            except BudgetTooSmall as error:
                self.refusal = str(error)
        return min(found, key=lambda made: sum(made.second_order), default=None)

    def _try(self, candidate: Candidate) -> Trial:
        """Measures a candidate, unless the same table was tried for another budget."""
        for trial in self.trials:
            if trial.candidate.is_same_table(candidate):
                return trial
        regression = LossRegression(
            (t.candidate.recipe.method, t.candidate.second_order, t.scores.added_loss)
            for t in self.trials
        )
        predicted = regression(candidate.recipe.method, candidate.second_order)
        self.trials.append(Trial(candidate, self._measure(candidate), predicted))
        return self.trials[-1]


def search(
    value: Callable[[int], float | None],
    bound: float,
    span: tuple[float, float, float],
    slope: float,
    slack: float,
    tries: int,
) -> None:
    """Searches for the budget at which value(budget) is just within a bound.

    The search brackets the budget. log value is nearly linear in log budget, so the
    next budget lies on the line through the two values nearest to the bound. Returns
    nothing: `value` keeps what it computes.

    Args:
      value: a monotone function of the budget; None if the budget is too small.
      bound: the largest value that fits.
      span: the smallest budget, the first one to try, and the largest.
      slope: a first guess of d log value / d log budget, with the right sign.
      slack: the search stops at a value at most this share below the bound.
      tries: largest number of calls of `value`.
    """
    low, place, high = map(math.log, span)
    target, points = math.log(bound * (1 - slack / 2)), []
    rises = slope > 0
    for _ in range(tries):
        reached = value(round(math.exp(place)))
        if reached is None:
            low, place = place, (place + high) / 2
            continue
        fits = reached <= bound
        if fits == rises:
            low = place
        else:
            high = place
        if (fits and reached >= (1 - slack) * bound) or high - low < 0.02:
            return
        # A loss of 0 or less, by rounding, has no logarithm.
        reached = max(reached, min(1e-6, 1e-4 * bound))
        points.append((math.log(reached), place))
        points.sort(key=lambda point: abs(point[0] - target))
        (y0, x0), *others = points
        if others and abs(others[0][0] - y0) > 1e-9:
            slope = (others[0][0] - y0) / (others[0][1] - x0)
        margin = 0.05 * (high - low)
        place = min(max(x0 + (target - y0) / slope, low + margin), high - margin)
