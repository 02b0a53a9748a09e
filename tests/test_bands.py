"""Frequency bands: cut, given ranks, and never above their budget."""

import itertools

import numpy as np
import pytest

from pcagpt.factorization import (
    BudgetTooSmall,
    Factorizer,
    Weighting,
    bands,
    budget_of_rank,
    least_budget,
    solve,
)
from pcagpt.factorization.bands import allocate_ranks, banded, frequency_bands
from pcagpt.factorization.solve import table_of_rank, truncate

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


def error(made, table=TABLE, weighting=WEIGHTING):
    """Weighted squared error of a factorized table."""
    difference = made.dense() - table
    metric = np.eye(table.shape[1]) if weighting.metric is None else weighting.metric
    return float(
        np.einsum(
            "v,vd,de,ve->", weighting.token_weights, difference, metric, difference
        )
    )


def test_bands_hold_every_token_once_by_falling_weight():
    found = frequency_bands(WEIGHTS, 4)
    order = np.concatenate(found)
    assert sorted(order) == list(range(V))
    assert (np.diff(WEIGHTS[order]) <= 0).all()
    assert (len(found), len(found[0])) == (4, 64)
    (whole,) = frequency_bands(WEIGHTS, 1)
    assert len(whole) == V


def test_a_single_band_is_the_plain_factorization():
    factors = solve(TABLE, WEIGHTING)
    for rank in (1, 5, 11):
        found = banded(TABLE, WEIGHTING, 1, budget_of_rank(V, D, rank))
        assert (found.ranks, found.sizes) == ((rank,), (V,))
        wanted = table_of_rank(factors, rank)
        np.testing.assert_allclose(found.dense(), wanted.dense(), atol=1e-6)


@pytest.mark.parametrize(("count", "rank"), [(2, 2), (2, 8), (4, 4), (9, 2), (9, 8)])
def test_bands_lose_less_than_one_rank_at_the_same_budget(count, rank):
    budget = budget_of_rank(V, D, rank) + V  # The order comes on top.
    found = banded(TABLE, WEIGHTING, count, budget)
    assert found.parameters <= budget
    assert error(found) < error(table_of_rank(solve(TABLE, WEIGHTING), rank))


@pytest.mark.parametrize("budget", [1600, 3333, 9000, 20_000])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_budget_is_never_exceeded_and_stored_values_are_counted(count, budget):
    table = banded(TABLE, WEIGHTING, count, budget)
    stored = sum(a.size for band in table.bands for a in band if a is not None)
    stored += V if len(table.bands) > 1 else 0
    assert table.parameters == stored <= budget
    assert sorted(table.order) == list(range(V))
    assert sum(table.sizes) == V


def test_a_budget_for_the_full_table_gives_the_table_itself():
    table = banded(TABLE, WEIGHTING, 3, V * D + V)
    assert set(table.ranks) == {0}
    np.testing.assert_allclose(table.dense(), TABLE, atol=1e-9)


def test_a_failing_computation_is_not_a_rank_that_is_too_small(monkeypatch):
    def fail(*_):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(bands, "banded", fail)
    with pytest.raises(np.linalg.LinAlgError, match="no convergence"):
        Factorizer(TABLE, "svd").of_rank(2, 3)


def test_regrouping_lowers_the_error(monkeypatch):
    budget = budget_of_rank(V, D, 4)
    regrouped = error(banded(TABLE, WEIGHTING, 5, budget))
    monkeypatch.setattr(bands, "REGROUPINGS", 0)
    assert regrouped < error(banded(TABLE, WEIGHTING, 5, budget))


def test_greedy_ranks_are_the_best_of_all_within_the_budget():
    """Compares with every choice of ranks that spends no more than greedy does."""
    random, width, best_found = np.random.default_rng(0), 5, 0
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
        for band, rank in enumerate(ranks):  # No other rank fits what is left.
            more = [*ranks]
            more[band] = rank + 1 if rank + 1 < width else 0
            assert rank == 0 or cost(more) > budget
        options = [range(width)] * 3  # Rank `width` costs more than full width.
        best = min(left(r) for r in itertools.product(*options) if cost(r) <= spent)
        best_found += left(ranks) == pytest.approx(best)
    # Greedy may lose only where the last rank does not fit the budget.
    assert best_found >= 24


def test_the_most_frequent_band_comes_first_after_regrouping():
    rows, weights = np.eye(2)[[0, 0, 1, 1]], np.array([0.1, 0.1, 0.4, 0.4])
    groups, bases = (
        [np.arange(2), np.arange(2, 4)],
        (np.eye(2)[:, :1], np.eye(2)[:, 1:]),
    )
    attempt = bands._Attempt(0.0, groups, (1, 1), bases, 0.0)
    found = bands._regrouped(rows, weights, attempt)
    assert [band.tolist() for band in found] == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("count", "least", "says"),
    [(1, V + D, "for rank 1"), (4, V + V + 4 * D, "for 4 bands")],
)
def test_a_budget_below_rank_1_is_refused(count, least, says):
    factorize = Factorizer(TABLE, "svd")
    assert factorize(least, count).ranks == (1,) * count
    with pytest.raises(BudgetTooSmall, match=f"is too small {says}"):
        factorize(least - 1, count)


@pytest.mark.parametrize(
    ("vocab_size", "width", "count"),
    [(V, D, 1), (V, D, 4), (70, 8, 12), (65, 20, 7), (64, 5, 3), (30, 6, 3), (2, 3, 2)],
)
def test_the_least_budget_is_the_smallest_that_makes_a_table(vocab_size, width, count):
    factorize = Factorizer(RANDOM.normal(size=(vocab_size, width)), "svd")
    least = least_budget(vocab_size, width, count)
    assert factorize(least, count).parameters <= least
    with pytest.raises(BudgetTooSmall):
        factorize(least - 1, count)


def test_the_price_is_the_error_that_the_last_value_removes():
    ranks, price = allocate_ranks(
        [np.array([9.0, 4.0, 1.0]), np.array([3.0, 2.0, 1.5])], [10, 40], 3, 13 * 2 + 43
    )
    assert ranks == (2, 1)
    assert price == pytest.approx(4.0 / 13)


def test_a_vocabulary_of_one_band_keeps_the_order_of_token_ids():
    random = np.random.default_rng(0)
    table = random.normal(size=(30, 6))
    weighting = Weighting(random.dirichlet(np.ones(30)))
    made = banded(table, weighting, 3, 4 * (30 + 6))
    assert made.sizes == (30,)
    np.testing.assert_array_equal(made.order, np.arange(30))
    single = table_of_rank(solve(table, weighting), made.ranks[0])
    np.testing.assert_allclose(made.dense(), single.dense(), atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_bands_never_leave_more_error_than_one_band_of_the_same_size(seed):
    """Also for flat spectra, where bands gain nothing and their order costs values."""
    random = np.random.default_rng(seed)
    size, width = int(random.integers(70, 200)), int(random.integers(4, 12))
    table = random.normal(size=(size, width))
    weighting = Weighting(random.dirichlet(np.full(size, random.choice([0.1, 100]))))
    rank = int(random.integers(3, width))
    budget = budget_of_rank(size, width, rank)
    made = banded(table, weighting, int(random.integers(2, 5)), budget)
    single = table_of_rank(solve(table, weighting), rank)
    assert made.parameters <= budget
    least = error(single, table, weighting)
    assert error(made, table, weighting) <= least * (1 + 1e-9)


def test_rows_in_bands_are_refitted_to_their_contexts():
    random = np.random.default_rng(3)
    table, contexts = random.normal(size=(2, 200, 8)) * np.geomspace(3, 0.1, 8)
    plain = Weighting(random.dirichlet(np.full(200, 0.05)))
    weighting = plain._replace(contexts=contexts)
    budget = budget_of_rank(200, 8, 5)
    made = banded(table, weighting, 3, budget)
    assert len(made.bands) > 1
    groups = np.split(made.order, np.cumsum(made.sizes)[:-1])
    for band, rows in zip(made.bands, groups, strict=True):
        if band.rank:
            wanted = truncate(solve(table, weighting, rows), band.rank)
            np.testing.assert_allclose(band.wte, wanted.wte, atol=1e-9)
    other = banded(table, plain, 3, budget)
    logits = [
        np.abs(np.einsum("vd,vd->v", t.dense() - table, contexts)).mean()
        for t in (made, other)
    ]
    assert logits[0] < logits[1]


def test_a_token_that_is_alone_in_its_band_joins_the_first_band():
    axes = np.eye(4)
    rows_VD = axes[[0, 0, 0, 1, 1, 1, 2]]
    bases = tuple(axes[:, [axis]] for axis in range(3))
    attempt = bands._Attempt(0.0, [np.arange(7)], [1, 1, 1], bases, 0.0)
    found = bands._regrouped(rows_VD, np.ones(7), attempt)
    assert [rows.tolist() for rows in found] == [[0, 1, 2, 6], [3, 4, 5]]
