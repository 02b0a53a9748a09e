"""The statistics of one table of an untied model weight its errors, and no others."""

import numpy as np
import pytest

from pcagpt.coding import loss_weighting
from pcagpt.compression.candidates import Compressor
from pcagpt.compression.rivals import MAKERS
from pcagpt.compression.sides import INPUT, OUTPUT, seen_by
from pcagpt.factorization import Statistics, gptq, product_quantize
from pcagpt.methods import CODES, METHODS, RIVALS
from pcagpt.rows import Recipe

VOCAB, WIDTH = 40, 6
OF_INPUT = ("frequency", "gradient_moment")


def moment(chance):
    rows = chance.normal(size=(30, WIDTH))
    return rows.T @ rows / 30


@pytest.fixture
def found():
    """(a table, statistics of a model that has it)."""
    chance = np.random.default_rng(0)
    shares = (chance.dirichlet(np.ones(VOCAB)) for _ in range(2))
    mean, *moments = chance.normal(size=WIDTH), *(moment(chance) for _ in range(3))
    return chance.normal(size=(VOCAB, WIDTH)), Statistics(*shares, mean, *moments)


def with_another(side, statistics):
    """Other statistics of the side that is not `side`."""
    chance = np.random.default_rng(1)
    others = [n for n in Statistics._fields if (n in OF_INPUT) != (side == INPUT)]
    changed = {}
    for name in others:
        shape = getattr(statistics, name).shape
        changed[name] = chance.dirichlet(np.ones(VOCAB)) if shape == (VOCAB,) else None
        if changed[name] is None:
            changed[name] = moment(chance) if len(shape) > 1 else chance.normal(size=6)
    return statistics._replace(**changed)


@pytest.mark.parametrize("side", [INPUT, OUTPUT])
@pytest.mark.parametrize("method", [*METHODS, "codes"])
def test_no_weight_depends_on_the_other_side(method, side, found):
    table, statistics = found
    weigh = loss_weighting if method == "codes" else METHODS[method].weigh
    first = weigh(table, seen_by(side, statistics))
    again = weigh(table, seen_by(side, with_another(side, statistics)))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rivals_have_the_weights_of_fisher(found):
    chance, vocab = np.random.default_rng(2), 600  # More tokens than centroids.
    table = chance.normal(size=(vocab, WIDTH)).astype(np.float32)
    frequency, probability = chance.dirichlet(np.ones(vocab), 2)
    statistics = found[1]._replace(frequency=frequency, probability=probability)
    fisher = METHODS["fisher"].weigh(table, statistics)
    for method, budget, wanted in (
        ("gptq", vocab * WIDTH, gptq(table, 4, fisher.metric)),
        ("pq", vocab * 2, product_quantize(table, 2, fisher.token_weights)),
    ):
        made = MAKERS[method].make(table, statistics, Recipe(method, 1, budget, 0, 4))
        np.testing.assert_array_equal(made.dense(), wanted.dense())


@pytest.mark.parametrize("side", [INPUT, OUTPUT])
@pytest.mark.parametrize("method", ["context", *CODES, *RIVALS])
def test_no_table_and_no_prediction_depends_on_the_other_side(method, side, found):
    table, statistics = found
    table = table.astype(np.float32)
    budget = {"context": 100, "coded": 900, "packed": 4800, "pq": VOCAB * 2}
    recipe = Recipe(method, 1, budget.get(method, VOCAB * WIDTH), 0, 4)
    made = [
        Compressor(table, given, 0.0, side)(recipe)
        for given in (statistics, with_another(side, statistics))
    ]
    np.testing.assert_array_equal(made[0].dense, made[1].dense)
    assert made[0].second_order == made[1].second_order
    head, input_ = made[0].second_order
    assert (head == 0, input_ == 0) == (side == INPUT, side == OUTPUT)
    assert head + input_ > 0


def test_each_side_has_the_weights_of_its_second_order_loss(found):
    table, statistics = found
    weighting = METHODS["fisher"].weigh(table, seen_by(INPUT, statistics))
    np.testing.assert_array_equal(weighting.metric, statistics.gradient_moment)
    mean = 0.1 * statistics.frequency.mean()
    np.testing.assert_allclose(weighting.token_weights, statistics.frequency + mean)
    weighting = METHODS["fisher"].weigh(table, seen_by(OUTPUT, statistics))
    np.testing.assert_array_equal(weighting.metric, statistics.hidden_moment)
    mean = 0.1 * statistics.probability.mean()
    np.testing.assert_allclose(weighting.token_weights, statistics.probability + mean)
    weighting = METHODS["context"].weigh(table, seen_by(OUTPUT, statistics))
    own = METHODS["context"].weigh(table, statistics)
    np.testing.assert_array_equal(weighting.contexts, own.contexts)
    assert seen_by("", statistics) is statistics
