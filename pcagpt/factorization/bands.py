"""Frequency bands: each group of tokens has its own rank, within one budget.

Shape letters: V vocabulary, D model width, G bands, K rank. A band of n tokens stores
k * (n + D) values at rank k, and n * D at full width.
"""

import functools
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pcagpt.errors import UserError
from pcagpt.factorization.solve import (
    Factors,
    centred,
    energy_kept,
    metric_roots,
    principal,
    solve,
    table_of_rank,
    truncate,
)
from pcagpt.factorization.table import BandFactors, FactorizedTable
from pcagpt.methods import METHODS, Statistics, Weighting

FIRST_BAND = 64  # initial size of the band of the most frequent tokens
REGROUPINGS = 3  # rounds in which tokens move to their best band


class BudgetTooSmall(ValueError):
    """A budget is too small for rank 1 of every band, or for any table of codes."""


def budget_of_rank(vocab_size: int, width: int, rank: int) -> int:
    """Number of values that a single band of this rank stores."""
    return rank * (vocab_size + width)


def least_budget(vocab_size: int, width: int, bands: int) -> int:
    """The smallest budget of a table in bands; `bands` as in `banded`.

    Each band stores at least rank 1; several also store the order of the tokens.
    """
    count = len(_ends_of_bands(vocab_size, bands))
    return (1 if count == 1 else 2) * vocab_size + count * width


class Factorizer:
    """Factorizes one table by one method, into any number of bands at any budget."""

    def __init__(
        self,
        table_VD: np.ndarray,
        method: str,
        statistics: Statistics | None = None,
        singular_value_split: float = 0.0,
    ):
        self._table_VD, self._split = table_VD, singular_value_split
        self._method = method
        self._weighting = METHODS[method].weigh(table_VD, statistics)

    @property
    def has_mean(self) -> bool:
        """Whether the method factorizes the table less a mean row."""
        return self._weighting.mean is not None

    @functools.cached_property
    def factors(self) -> Factors:
        """The factors of a single band, for all ranks.

        Raises UserError if the weighting leaves nothing of the table.
        """
        factors = solve(self._table_VD, self._weighting)
        if not factors.singular_values.any():
            raise UserError(
                f"the table is 0 under the weights and the mean of '{self._method}': "
                "choose another method, such as svd"
            )
        return factors

    def __call__(self, budget: int, bands: int = 1) -> FactorizedTable:
        """A table of at most `budget` values besides the mean; `bands` as in `banded`.

        Raises BudgetTooSmall below `least_budget`.
        """
        table_VD = self._table_VD
        if bands > 1:
            return banded(table_VD, self._weighting, bands, budget, self._split)
        rank = min(budget // sum(table_VD.shape), *table_VD.shape)
        if rank < 1:
            raise BudgetTooSmall(f"a budget of {budget} is too small for rank 1")
        return table_of_rank(self.factors, rank, self._split)

    def of_rank(self, rank: int, bands: int) -> tuple[FactorizedTable, dict]:
        """(a table that is as large as one band of this rank, JSON values about it).

        Raises UserError if the rank is too small for so many bands.
        """
        vocab_size, width = self._table_VD.shape
        if bands == 1:
            kept = energy_kept(self.factors.singular_values)[rank - 1]
            about = {"energy_kept": kept, "relative_error": max(0, 1 - kept) ** 0.5}
            return table_of_rank(self.factors, rank, self._split), about
        try:
            table = self(budget_of_rank(vocab_size, width, rank), bands)
        except BudgetTooSmall:
            raise UserError(
                f"rank {rank} of {vocab_size:,} tokens is too small for {bands} bands: "
                "raise the rank or lower factorize.bands"
            ) from None
        return table, {
            "parameters": table.parameters,
            "band_sizes": table.sizes,
            "band_ranks": table.ranks,
        }


def frequency_bands(weights_V: np.ndarray, count: int) -> list[np.ndarray]:
    """Groups tokens by falling weight into bands whose ends grow geometrically.

    Returns `count` arrays of token ids, or fewer for a small vocabulary.
    """
    order = np.argsort(-weights_V, kind="stable")
    return np.split(order, _ends_of_bands(len(order), count)[:-1])


def _ends_of_bands(vocab_size: int, count: int) -> np.ndarray:
    """Where each of `frequency_bands` ends in the order of the tokens."""
    first = min(FIRST_BAND, vocab_size)
    ends = np.geomspace(first, vocab_size, count) if count > 1 else [vocab_size]
    return np.unique(np.round(ends).astype(int))


def allocate_ranks(
    spectra: Sequence[np.ndarray], sizes: Sequence[int], width: int, budget: int
) -> tuple[tuple[int, ...], float]:
    """Chooses ranks with a small total error within a budget.

    Greedy: the next rank goes to the band where it removes most error per stored value,
    among those that fit. This is optimal if every next rank fits until the budget is
    used up exactly, and no band reaches full width. A band is stored at full width if
    its factors would need as many values.

    Args:
      spectra: squared singular values of each band, descending.
      sizes: number of tokens in each band.
      width: D.
      budget: largest number of stored values; BudgetTooSmall if rank 1 exceeds it.

    Returns:
      (rank of each band, 0 for full width; error per value that the last rank removed).
    """
    ranks = [1] * len(sizes)
    left = budget - sum(size + width for size in sizes)
    if left < 0:
        raise BudgetTooSmall(
            f"a budget of {budget} is too small for {len(sizes)} bands"
        )

    queue, price = [], 0.0

    def enqueue(band: int) -> None:
        """Adds the error per value that the next rank of a band would remove."""
        if 0 < ranks[band] < len(spectra[band]):
            gain = float(spectra[band][ranks[band]]) / (sizes[band] + width)
            heapq.heappush(queue, (-gain, band))

    for band in range(len(sizes)):
        enqueue(band)
    while queue:
        negative_price, band = heapq.heappop(queue)
        full, so_far = sizes[band] * width, ranks[band] * (sizes[band] + width)
        cost = min(sizes[band] + width, full - so_far)
        if cost > left:
            continue  # A rank of another band may cost less.
        left -= cost
        price = -negative_price
        ranks[band] = 0 if so_far + cost == full else ranks[band] + 1
        enqueue(band)
    return tuple(ranks), price


class _Attempt(NamedTuple):
    """Bands of token ids with their best ranks."""

    error: float  # the weighted squared error that remains
    bands: list[np.ndarray]
    ranks: tuple[int, ...]
    bases: tuple[np.ndarray, ...]  # the principal directions of each band: [D, R]
    price: float  # the error that one more stored value would remove


def banded(
    table_VD: np.ndarray,
    weighting: Weighting,
    count: int,
    budget: int,
    split: float = 0.0,
) -> FactorizedTable:
    """Factorizes a table in bands; chooses the bands and ranks with a small error.

    Starts from frequency bands, as GroupReduce (Chen et al. 2018) does. Then each token
    moves to the band where its cost is lowest. The cost is its weighted error plus the
    price of its stored values (the error that the last stored value removed).

    Args:
      table_VD: the table.
      weighting: of any method.
      count: number of bands to start from; the result can have fewer.
      budget: largest number of stored values, including scales and token order, but
        not the mean; BudgetTooSmall below `least_budget`.
      split: as for `truncate`.
    """
    vocab_size, width = table_VD.shape
    weights_V = weighting.token_weights
    if weights_V is None:  # The first bands are then ranges of token ids.
        weights_V = np.ones(vocab_size)
        weighting = weighting._replace(token_weights=weights_V)
    metric_DD = np.eye(width) if weighting.metric is None else weighting.metric
    roots = metric_roots(metric_DD)
    rows_VD, mean_D = centred(table_VD, weighting)
    whitened_VD = rows_VD @ roots[0].astype(table_VD.dtype)
    bands, attempts = frequency_bands(weights_V, count), []
    for remaining in reversed(range(REGROUPINGS + 1)):
        if len(bands) == 1:
            break
        attempt = _ranked(whitened_VD, weights_V, bands, budget - vocab_size)
        attempts.append(attempt)
        if remaining:
            bands = _regrouped(whitened_VD, weights_V, attempt)
    # A single band stores no token order, so it has more budget for its rank.
    whole = [np.arange(vocab_size)]
    attempts.append(_ranked(whitened_VD, weights_V, whole, budget))
    best = min(attempts, key=lambda attempt: attempt.error)
    made = tuple(
        truncate(solve(table_VD, weighting, rows, roots), rank, split)
        if rank
        else BandFactors(rows_VD[rows], None)
        for rows, rank in zip(best.bands, best.ranks, strict=True)
    )
    order = np.concatenate(best.bands).astype(np.int32)
    return FactorizedTable(order, made, mean_D)


def _ranked(whitened_VD, weights_V, bands, budget) -> _Attempt:
    """The bands with their best ranks."""
    found = [principal(whitened_VD[rows], weights_V[rows]) for rows in bands]
    spectra, bases = zip(*found, strict=True)
    sizes, width = [len(rows) for rows in bands], whitened_VD.shape[1]
    ranks, price = allocate_ranks(spectra, sizes, width, budget)
    left = sum(s[k:].sum() for s, k in zip(spectra, ranks, strict=True) if k)
    return _Attempt(float(left), bands, ranks, bases, price)


def _regrouped(whitened_VD, weights_V, attempt: _Attempt) -> list[np.ndarray]:
    """Moves each token to the band with the smallest sum of error and price."""
    width = whitened_VD.shape[1]
    norm_V = np.einsum("vd,vd->v", whitened_VD, whitened_VD)
    costs = []
    for basis_DR, rank in zip(attempt.bases, attempt.ranks, strict=True):
        kept_V = norm_V
        if rank:
            scores_VK = whitened_VD @ basis_DR[:, :rank]
            kept_V = np.einsum("vk,vk->v", scores_VK, scores_VK)
        error_V = np.maximum(norm_V - kept_V, 0)
        costs.append(weights_V * error_V + attempt.price * (rank or width))
    choice_V = np.argmin(costs, axis=0)
    found = [np.flatnonzero(choice_V == band) for band in range(len(costs))]
    kept = [rows for rows in found if len(rows) > 1]
    lost = [rows for rows in found if len(rows) == 1]
    if lost:  # A band of one token saves nothing, so the token joins the first band.
        kept[0] = np.sort(np.concatenate([kept[0], *lost]))
    # The most frequent band comes first, as in a model.
    return sorted(kept, key=lambda rows: -weights_V[rows].mean())
