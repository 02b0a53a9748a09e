"""Recipes, predictions, and the search for a table that keeps a bound."""

import numpy as np
import pytest

from pcagpt.compress.candidates import (
    Advisor,
    Calibration,
    Candidate,
    Compressor,
    Recipe,
    anchors,
    quantized,
    recipes,
)
from pcagpt.factorize import (
    BandFactors,
    FactorizedTable,
    SecondOrder,
    Statistics,
)
from pcagpt.factorize.quantize import quantize


def test_recipes_are_every_method_rank_and_number_of_bands_that_fits():
    tried = list(recipes(1000, 20, ["svd", "kl"], [4, 8], [1, 3], [8]))
    names = [(r.method, r.bands, r.rank, r.bits) for r in tried]
    assert names == [
        *(("svd", 1, 4, 32), ("svd", 1, 8, 32), ("kl", 1, 4, 32), ("kl", 1, 8, 32)),
        *(("kl", 3, 4, 32), ("kl", 3, 8, 32)),
        *(("baseline", 1, 0, 8), ("kl", 3, 4, 8), ("kl", 3, 8, 8)),
    ]
    assert {r.budget for r in tried if r.rank == 4} == {4 * 1020}
    # The order of the tokens and rank 1 in each of many bands are too much for rank 2.
    assert not list(recipes(1000, 20, ["kl"], [2], [3], []))


def test_anchors_are_the_extremes_of_each_method():
    tried = list(recipes(1000, 20, ["svd", "kl"], [4, 6, 8], [1, 3, 5], [8]))
    found = {(r.method, r.bands, r.rank) for r in anchors(tried)}
    assert found == {
        *(("svd", 1, 4), ("svd", 1, 8), ("kl", 1, 4), ("kl", 1, 8)),
        *(("kl", 3, 4), ("kl", 3, 8)),
    }


def test_a_power_law_is_found_for_each_method_and_shared_by_others():
    def added(method, total):
        return {"a": 2.0, "b": 0.5}[method] * total**0.7

    measured = [
        (method, SecondOrder(total / 2, total / 2), added(method, total))
        for method in "ab"
        for total in (0.01, 0.3)
    ]
    calibration = Calibration(measured)
    for method in "ab":
        predicted = calibration(method, SecondOrder(0.05, 0.02))
        assert predicted == pytest.approx(added(method, 0.07), rel=1e-6)
    smallest = added("b", 0.01)  # Of what was not measured, in proportion to this.
    assert calibration("c", SecondOrder(0.07, 0)) == pytest.approx(7 * smallest)
    assert calibration("a", SecondOrder(0, 0)) == 0
    assert Calibration([])("a", SecondOrder(0.1, 0.2)) == pytest.approx(0.3)
    single = Calibration([("a", SecondOrder(0.1, 0), 0.2)])
    assert single("a", SecondOrder(0.2, 0)) == pytest.approx(0.4)


def world(exponent, factor):
    """(a maker of candidates, what measures them): loss falls as a power of size.

    Two bands are better than one; five are too many for small budgets.
    """

    def make(recipe: Recipe) -> Candidate:
        if recipe.bands == 5 and recipe.budget < 2000:
            raise ValueError("too small")
        gain = {1: 1.0, 2: 0.5, 5: 0.6}[recipe.bands]
        loss = gain * (recipe.budget / 1000) ** -exponent
        return Candidate(
            recipe,
            None,
            np.zeros(0),
            recipe.budget - 3,
            recipe.budget * recipe.bits // 8,
            SecondOrder(loss, 0),
            0.0,
        )

    return make, lambda candidate: factor * candidate.second_order.head**1.1


@pytest.mark.parametrize("exponent", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5])
def test_the_smallest_table_within_a_loss_is_found_in_a_few_trials(bound, exponent):
    make, measure = world(exponent, 1.7)
    advisor = Advisor(make, measure, "kl", [1, 2, 5])
    least, most = 100, 10_000_000
    chosen = advisor.smallest(bound, least, most)
    assert chosen.added <= bound
    assert chosen.candidate.recipe.bands == 2
    needed = 1000 * (0.5 / (bound / 1.7) ** (1 / 1.1)) ** (1 / exponent)
    assert chosen.candidate.parameters <= 1.35 * needed
    assert len(advisor.trials) <= Advisor.TRIALS
    last = advisor.trials[-1]
    if len(advisor.trials) > 2:
        assert last.predicted == pytest.approx(last.added, rel=0.01)


def test_a_loss_that_no_table_keeps_has_none():
    make, measure = world(1.0, 1e9)
    assert Advisor(make, measure, "kl", [1]).smallest(1e-3, 100, 10_000) is None


def test_of_several_sizes_and_bits_the_best_is_taken():
    make, measure = world(1.0, 1.0)
    advisor = Advisor(make, measure, "kl", [1, 2])
    chosen = advisor.best([(1000, 32), (4000, 8), (3000, 4)])
    assert (chosen.candidate.recipe.budget, chosen.candidate.recipe.bits) == (4000, 8)
    within = advisor.best([], max_bytes=3999)
    assert (within.candidate.recipe.budget, within.candidate.recipe.bits) == (3000, 4)
    assert advisor.best([], max_bytes=10) is None


def test_more_bands_than_any_small_budget_holds_are_passed_over():
    """What is too small to be made is left behind, not tried."""
    make, measure = world(0.7, 20.0)

    def choosy(recipe):
        if recipe.budget < 3000:
            raise ValueError("too small")
        return make(recipe)

    found = Advisor(choosy, measure, "m", (5,)).smallest(1.0, 10, 40_000)
    assert found is None or found.added <= 1.0

    def never(recipe):
        raise ValueError("too small")

    assert Advisor(never, measure, "m", (5,)).smallest(1.0, 10, 40_000) is None


def test_a_quantized_table_in_bands_counts_the_order_of_its_tokens():
    random = np.random.default_rng(0)
    parts = tuple(BandFactors(random.normal(size=(n, 4)), None) for n in (3, 5))
    order = np.array([7, 0, 3, 1, 2, 4, 5, 6], np.int32)
    _, _, numbers, size = quantized(None, FactorizedTable(order, parts, None), 8)
    assert numbers == 8 * 4 + 8
    assert size == sum(quantize(part.wte, 8).bytes for part in parts) + 4 * 8


def test_a_budget_beyond_the_full_rank_is_the_full_rank():
    random = np.random.default_rng(0)
    table = random.normal(size=(30, 6)).astype(np.float32)
    flat = np.full(30, 1 / 30)
    eye = np.eye(6)
    known = Statistics(flat, flat, np.zeros(6), eye, eye, eye)
    made = Compressor(table, known)(Recipe("kl", 1, 10_000, 0))
    assert made.parameters == 6 * (30 + 6)
    np.testing.assert_allclose(made.dense, table, atol=1e-5)
