"""Frequency bands: cut, given ranks, and never over their budget."""

import itertools

import numpy as np
import pytest

from pcagpt import factorize
from pcagpt.factorize import (
    Weighting,
    allocate_ranks,
    banded,
    budget_of_rank,
    frequency_bands,
    solve,
    table_of_rank,
)

V, D = 700, 12
RANDOM = np.random.default_rng(2)
WEIGHTS = 1.0 / np.arange(1, V + 1)
RANDOM.shuffle(WEIGHTS)
TABLE = RANDOM.normal(size=(V, D)) @ np.diag(np.linspace(3, 0.3, D))
TABLE = TABLE @ np.linalg.qr(RANDOM.normal(size=(D, D)))[0] + 1.0
WEIGHTING = Weighting(
    token_weights=WEIGHTS,
    metric=np.diag(np.linspace(0.5, 2, D)),
    mean=WEIGHTS @ TABLE / WEIGHTS.sum(),
)


def error(table):
    """Weighted squared error of a banded table."""
    difference = table.dense() - TABLE
    return float(
        np.einsum("v,vd,de,ve->", WEIGHTS, difference, WEIGHTING.metric, difference)
    )


def test_bands_hold_every_token_once_by_falling_weight():
    bands = frequency_bands(WEIGHTS, 4)
    order = np.concatenate(bands)
    assert sorted(order) == list(range(V))
    assert (np.diff(WEIGHTS[order]) <= 0).all()
    assert [len(band) for band in bands][0] == 64
    assert len(bands) == 4


def test_one_band_holds_all():
    (band,) = frequency_bands(WEIGHTS, 1)
    assert len(band) == V


def test_a_single_band_is_the_plain_factorization():
    factors = solve(TABLE, WEIGHTING)
    for rank in (1, 5, 11):
        found = banded(TABLE, WEIGHTING, 1, budget_of_rank(V, D, rank))
        wanted = table_of_rank(factors, rank)
        assert (found.ranks, found.sizes) == ((rank,), (V,))
        np.testing.assert_allclose(found.dense(), wanted.dense(), atol=1e-6)


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_bands_lose_less_than_one_rank_at_the_same_budget(count, rank):
    budget = budget_of_rank(V, D, rank)
    found = banded(TABLE, WEIGHTING, count, budget + V)  # The order comes on top.
    assert found.parameters <= budget + V
    assert error(found) < error(table_of_rank(solve(TABLE, WEIGHTING), rank))


@pytest.mark.parametrize("budget", [1600, 2000, 3333, 5000, 9000, 20_000])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_budget_is_never_exceeded_and_what_is_counted_is_stored(count, budget):
    table = banded(TABLE, WEIGHTING, count, budget)
    stored = sum(
        array.size for band in table.bands for array in band if array is not None
    )
    stored += V if len(table.bands) > 1 else 0
    assert table.parameters == stored <= budget
    assert sorted(table.order) == list(range(V))
    assert sum(table.sizes) == V


def test_a_budget_for_all_gives_the_table_itself():
    table = banded(TABLE, WEIGHTING, 3, V * D + V)
    assert set(table.ranks) == {0}
    np.testing.assert_allclose(table.dense(), TABLE, atol=1e-9)


def test_a_budget_below_rank_1_is_an_error():
    with pytest.raises(ValueError, match="too small for 4 bands"):
        banded(TABLE, WEIGHTING, 4, V + V + 4 * D - 1)


def test_regrouping_lowers_the_error(monkeypatch):
    budget = budget_of_rank(V, D, 4)
    regrouped = error(banded(TABLE, WEIGHTING, 5, budget))
    monkeypatch.setattr(factorize.bands, "REGROUPINGS", 0)
    assert regrouped < error(banded(TABLE, WEIGHTING, 5, budget))


def test_greedy_ranks_are_the_best_of_all_within_the_budget():
    """Against every choice of ranks, at each budget that greedy spends in full."""
    random, width, tried = np.random.default_rng(0), 5, 0
    for _ in range(30):
        sizes = [int(n) for n in random.integers(20, 60, 3)]
        spectra = [np.sort(random.exponential(size=width))[::-1] for _ in sizes]
        whole = sum(size * width for size in sizes)
        budget = int(random.integers(sum(sizes) + 3 * width, whole))
        ranks, _ = allocate_ranks(spectra, sizes, width, budget)

        def cost(ranks, sizes=sizes):
            return sum(
                n * width if rank == 0 else rank * (n + width)
                for rank, n in zip(ranks, sizes, strict=True)
            )

        def left(ranks, spectra=spectra):
            return sum(
                s[rank:].sum() if rank else 0
                for rank, s in zip(ranks, spectra, strict=True)
            )

        spent = cost(ranks)
        assert spent <= budget
        options = [range(0, width)] * 3  # Rank `width` costs more than full width.
        best = min(left(r) for r in itertools.product(*options) if cost(r) <= spent)
        tried += left(ranks) == pytest.approx(best)
    # Greedy may lose where the last rank does not fit the budget, and only there.
    assert tried >= 24


def test_the_price_is_what_the_last_number_removes():
    ranks, price = allocate_ranks(
        [np.array([9.0, 4.0, 1.0]), np.array([3.0, 2.0, 1.5])], [10, 40], 3, 13 * 2 + 43
    )
    assert ranks == (2, 1)
    assert price == pytest.approx(4.0 / 13)


def test_a_single_band_has_the_tokens_in_the_order_of_their_ids():
    """So few tokens that all are in the first band: a model then keeps no order."""
    random = np.random.default_rng(0)
    table = random.normal(size=(30, 6))
    weighting = factorize.Weighting(random.dirichlet(np.ones(30)))
    made = factorize.banded(table, weighting, 3, 4 * (30 + 6))
    assert made.sizes == (30,)
    np.testing.assert_array_equal(made.order, np.arange(30))
    factors = factorize.solve(table, weighting)
    single = factorize.table_of_rank(factors, made.ranks[0])
    np.testing.assert_allclose(made.dense(), single.dense(), atol=1e-9)


def weighted_error(table, weighting, made):
    """Squared error of a table in bands under token weights, no metric."""
    error = made.dense() - table
    return float(weighting.token_weights @ np.square(error).sum(axis=1))


@pytest.mark.parametrize("seed", range(12))
def test_bands_never_leave_more_error_than_one_band_of_the_same_size(seed):
    """Flat spectra too, where bands gain nothing and their order costs numbers."""
    random = np.random.default_rng(seed)
    size, width = int(random.integers(70, 200)), int(random.integers(4, 12))
    table = random.normal(size=(size, width))
    weights = random.dirichlet(np.full(size, random.choice([0.1, 100.0])))
    weighting = factorize.Weighting(weights)
    rank = int(random.integers(3, width))
    budget = factorize.budget_of_rank(size, width, rank)
    made = factorize.banded(table, weighting, int(random.integers(2, 5)), budget)
    single = factorize.table_of_rank(factorize.solve(table, weighting), rank)
    assert made.parameters <= budget
    error, least = (weighted_error(table, weighting, t) for t in (made, single))
    assert error <= least * (1 + 1e-9)


def test_rows_in_bands_are_refitted_to_their_contexts():
    """Band by band as `truncate` refits them, and not as they are without contexts."""
    random = np.random.default_rng(3)
    table, contexts = random.normal(size=(2, 200, 8)) * np.geomspace(3, 0.1, 8)
    plain = factorize.Weighting(random.dirichlet(np.full(200, 0.05)))
    weighting = plain._replace(contexts=contexts)
    budget = factorize.budget_of_rank(200, 8, 5)
    made = factorize.banded(table, weighting, 3, budget)
    assert len(made.sizes) > 1
    start = 0
    for part, size, rank in zip(made.bands, made.sizes, made.ranks, strict=True):
        rows = made.order[start : start + size]
        start += size
        if rank:
            factors = factorize.solve(table, weighting, rows)
            wanted = factorize.truncate(factors, rank)
            np.testing.assert_allclose(part.wte, wanted.wte, atol=1e-9)
    other = factorize.banded(table, plain, 3, budget)
    assert not np.allclose(made.dense(), other.dense(), atol=1e-3)
    logits = [
        np.abs(np.einsum("vd,vd->v", t.dense() - table, contexts)).mean()
        for t in (made, other)
    ]
    assert logits[0] < logits[1]
