"""Frequency bands: a rank of its own for each group of tokens, within a budget.

Shape letters: V vocabulary, D model width, G bands, K rank. A band of n tokens at rank
k stores k * (n + D) numbers, at full width n * D.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pcagpt.factorize.methods import Weighting
from pcagpt.factorize.solve import metric_roots, principal, solve, truncate
from pcagpt.factorize.table import BandFactors, FactorizedTable

FIRST_BAND = 64  # tokens: the most frequent ones
REGROUPINGS = 3  # times that tokens may change to the band that suits them best


def budget_of_rank(vocab_size: int, width: int, rank: int) -> int:
    """Numbers that one band for all tokens stores at a rank."""
    return rank * (vocab_size + width)


def frequency_bands(weights_V: np.ndarray, count: int) -> list[np.ndarray]:
    """Tokens cut into bands by falling weight, each a constant factor longer.

    Returns:
      `count` arrays of token ids (fewer for a small vocabulary).
    """
    order = np.argsort(-weights_V, kind="stable")
    first = min(FIRST_BAND, len(order))
    ends = np.geomspace(first, len(order), count) if count > 1 else [len(order)]
    ends = np.unique(np.round(ends).astype(int))
    return np.split(order, ends[:-1])


def allocate_ranks(
    spectra: Sequence[np.ndarray], sizes: Sequence[int], width: int, budget: int
) -> tuple[tuple[int, ...], float]:
    """Ranks that leave the smallest sum of errors within a budget.

    Greedy: the next rank goes where it removes most error for a stored number, which is
    optimal as long as errors fall more and more slowly, as spectra do. A band whose
    rank would store as much as its full rows stores these.

    Args:
      spectra: for each band, the squared singular values, descending.
      sizes: tokens of each band.
      width: D.
      budget: numbers that may be stored.

    Returns:
      (rank of each band, 0 for full width; error removed by the last number stored).

    Raises:
      ValueError: the budget does not suffice for rank 1 in every band.
    """
    ranks = [1] * len(sizes)
    left = budget - sum(size + width for size in sizes)
    if left < 0:
        raise ValueError(f"a budget of {budget} is too small for {len(sizes)} bands")

    def gain(band: int) -> tuple[float, int] | None:
        next_rank = ranks[band]
        if not 0 < next_rank < len(spectra[band]):
            return None
        return -float(spectra[band][next_rank]) / (sizes[band] + width), band

    queue = [entry for band in range(len(sizes)) if (entry := gain(band))]
    heapq.heapify(queue)
    price = 0.0
    while queue:
        negative_price, band = heapq.heappop(queue)
        full, so_far = sizes[band] * width, ranks[band] * (sizes[band] + width)
        cost = min(sizes[band] + width, full - so_far)
        if cost > left:
            continue  # Another band's rank may cost less.
        left -= cost
        price = -negative_price
        ranks[band] = 0 if so_far + cost == full else ranks[band] + 1
        if entry := gain(band):
            heapq.heappush(queue, entry)
    return tuple(ranks), price


def banded(
    table_VD: np.ndarray,
    weighting: Weighting,
    count: int,
    budget: int,
    split: float = 0.0,
) -> FactorizedTable:
    """A table in bands, cut, regrouped and given ranks so that little is lost.

    Starts from bands of equal frequency, as GroupReduce (Chen et al. 2018) does, and
    then lets each token change to the band in which its weighted error, plus the price
    of what it stores there, is smallest.

    Args:
      table_VD: the table.
      weighting: of any method but with token weights.
      count: bands to start from.
      budget: numbers that may be stored, scale matrices and token order included.
      split: as for `truncate`.

    Raises:
      ValueError: the budget is too small for that many bands.
    """
    vocab_size, width = table_VD.shape
    weights_V = weighting.token_weights
    if weights_V is None:
        weights_V = np.ones(vocab_size)
        weighting = weighting._replace(token_weights=weights_V)
    metric_DD = np.eye(width) if weighting.metric is None else weighting.metric
    roots = metric_roots(metric_DD)
    mean_D = weighting.mean
    if mean_D is not None:
        mean_D = mean_D.astype(table_VD.dtype)
    rows_VD = table_VD if mean_D is None else table_VD - mean_D
    whitened_VD = rows_VD @ roots[0].astype(table_VD.dtype)
    bands, attempts = frequency_bands(weights_V, count), []
    for remaining in reversed(range(REGROUPINGS + 1)):
        if len(bands) == 1:
            break
        bases, attempt, price = _ranked(
            whitened_VD, weights_V, bands, budget - vocab_size
        )
        attempts.append(attempt)
        if remaining:
            kept = [basis[:, :k] for basis, k in zip(bases, attempt.ranks, strict=True)]
            bands = _regrouped(whitened_VD, weights_V, kept, attempt.ranks, price)
    # One band stores no order: it has the tokens in that of their ids.
    whole = [np.arange(vocab_size)]
    attempts.append(_ranked(whitened_VD, weights_V, whole, budget)[1])
    _, bands, ranks = min(attempts, key=lambda attempt: attempt.error)
    tables = tuple(
        truncate(solve(table_VD, weighting, rows, roots), rank, split)
        if rank
        else BandFactors(rows_VD[rows], None)
        for rows, rank in zip(bands, ranks, strict=True)
    )
    order = np.concatenate(bands).astype(np.int32)
    return FactorizedTable(order, tables, mean_D)


class _Attempt(NamedTuple):
    """Bands and their ranks, and the weighted squared error that they leave."""

    error: float
    bands: list[np.ndarray]
    ranks: tuple[int, ...]


def _ranked(whitened_VD, weights_V, bands, budget):
    """(directions of each band, the best ranks within a budget, their price)."""
    spectra, bases = zip(
        *(principal(whitened_VD[rows], weights_V[rows]) for rows in bands),
        strict=True,
    )
    width = whitened_VD.shape[1]
    ranks, price = allocate_ranks(spectra, [len(rows) for rows in bands], width, budget)
    left = sum(s[k:].sum() for s, k in zip(spectra, ranks, strict=True) if k)
    return bases, _Attempt(float(left), bands, ranks), price


def _regrouped(whitened_VD, weights_V, bases, ranks, price):
    """Each token in the band of least error plus price; bands may grow and shrink."""
    vocab_size, width = whitened_VD.shape
    norm_V = np.einsum("vd,vd->v", whitened_VD, whitened_VD)
    cost_VG = np.empty((vocab_size, len(bases)))
    for band, (basis_DK, rank) in enumerate(zip(bases, ranks, strict=True)):
        kept_V = norm_V
        if rank:
            scores_VK = whitened_VD @ basis_DK
            kept_V = np.einsum("vk,vk->v", scores_VK, scores_VK)
        error_V = np.maximum(norm_V - kept_V, 0)
        cost_VG[:, band] = weights_V * error_V + price * (rank or width)
    choice_V = cost_VG.argmin(axis=1)
    found = [np.flatnonzero(choice_V == band) for band in range(len(bases))]
    kept = [rows for rows in found if len(rows) > 1]
    lost = [rows for rows in found if len(rows) == 1]
    if lost:  # A band of one token is none: it joins the first.
        kept[0] = np.sort(np.concatenate([kept[0], *lost]))
    # Most frequent first, as the model's own bands are.
    return sorted(kept, key=lambda rows: -weights_V[rows].mean())
