"""Weighted factorizations: each minimises its own error."""

import numpy as np
import pytest

from pcagpt.factorization import (
    BandFactors,
    LossRegression,
    Predictor,
    SecondOrder,
    Statistics,
    Weighting,
    solve,
)
from pcagpt.factorization.solve import table_of_rank
from pcagpt.methods import METHODS, token_contexts

V, D = 60, 8
RANDOM = np.random.default_rng(3)


def moment(scale):
    """A second moment [D, D] of unequal directions."""
    samples = RANDOM.normal(size=(200, D)) * scale @ RANDOM.normal(size=(D, D))
    return samples.T @ samples / len(samples)


TABLE = RANDOM.normal(size=(V, D)) @ RANDOM.normal(size=(D, D)) + 2.0
FREQUENCY = RANDOM.zipf(1.4, V) * 1.0
STATISTICS = Statistics(
    frequency=FREQUENCY / FREQUENCY.sum(),
    probability=np.sort(RANDOM.dirichlet(np.ones(V)))[::-1],
    hidden_mean=RANDOM.normal(size=D),
    hidden_moment=moment(np.linspace(0.1, 3, D)),
    gradient_moment=moment(np.linspace(2, 0.1, D)),
    context_moment=RANDOM.normal(size=(D, D)),
)
LINEAR = [name for name in METHODS if name != "context"]


def weighted_error(made, weighting):
    """The error that a method minimises, written out."""
    error, weights = TABLE - made.dense(), weighting.token_weights
    weights = np.ones(V) if weights is None else weights
    metric = np.eye(D) if weighting.metric is None else weighting.metric
    return float(np.einsum("v,vd,de,ve->", weights, error, metric, error))


def assert_same_tables(weighting, wanted, tolerance):
    for rank in (1, 3, D):
        found, other = (
            table_of_rank(solve(TABLE, w), rank).dense() for w in (weighting, wanted)
        )
        np.testing.assert_allclose(found, other, atol=tolerance)


@pytest.mark.parametrize("name", LINEAR)
def test_the_error_of_a_rank_is_the_tail_of_the_spectrum(name):
    weighting = METHODS[name].weigh(TABLE, STATISTICS)
    factors = solve(TABLE, weighting)
    squares = factors.singular_values.astype(float) ** 2
    for rank in (1, 2, 5, D):
        found = weighted_error(table_of_rank(factors, rank), weighting)
        tail = pytest.approx(squares[rank:].sum(), rel=1e-4, abs=1e-6 * squares.sum())
        assert found == tail


@pytest.mark.parametrize("name", LINEAR)
def test_no_other_factors_have_a_smaller_error(name):
    weighting = METHODS[name].weigh(TABLE, STATISTICS)
    random = np.random.default_rng(0)
    table = table_of_rank(solve(TABLE, weighting), 3)
    best = weighted_error(table, weighting)
    for trial in range(300):
        size = 10.0 ** -(trial % 5)
        moved = (a + size * random.normal(size=a.shape) for a in table.bands[0])
        other = table._replace(bands=(BandFactors(*moved),))
        assert weighted_error(other, weighting) > best * (1 - 1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_split_is_the_same_table_and_full_rank_is_the_table_itself(name):
    factors = solve(TABLE, METHODS[name].weigh(TABLE, STATISTICS))
    whole, tolerance = table_of_rank(factors, 3).dense(), 1e-4 * np.abs(TABLE).max()
    for split in (0.5, 1.0):
        found = table_of_rank(factors, 3, split).dense()
        np.testing.assert_allclose(found, whole, atol=tolerance)
        full = table_of_rank(factors, D, split).dense()
        np.testing.assert_allclose(full, TABLE, atol=tolerance)


def test_equal_weights_and_an_identity_metric_change_nothing():
    ones = np.full(V, 0.25)
    assert_same_tables(Weighting(ones), Weighting(), 1e-4)
    mean = TABLE.mean(axis=0)
    assert_same_tables(Weighting(ones, mean=mean), Weighting(mean=mean), 1e-4)
    weights = STATISTICS.frequency
    scaled = Weighting(weights, 7.0 * np.eye(D))
    assert_same_tables(scaled, Weighting(weights), 1e-5)


def test_factors_are_finite_with_unseen_tokens_and_unused_directions():
    frequency = STATISTICS.frequency.copy()
    frequency[V // 2 :] = 0
    hidden = STATISTICS.hidden_moment.copy()
    hidden[:3] = hidden[:, :3] = 0
    poor = STATISTICS._replace(
        frequency=frequency, hidden_moment=hidden, gradient_moment=np.zeros((D, D))
    )
    for name, method in METHODS.items():
        (band,) = table_of_rank(solve(TABLE, method.weigh(TABLE, poor)), 4).bands
        assert np.isfinite(band.wte).all(), name
        assert np.isfinite(band.scale).all(), name


def test_each_method_has_the_least_error_of_its_own_kind():
    kl = METHODS["kl"].weigh(TABLE, STATISTICS)
    errors = {}
    for name in LINEAR:
        factors = solve(TABLE, METHODS[name].weigh(TABLE, STATISTICS))
        errors[name] = weighted_error(table_of_rank(factors, 3), kl)
    assert min(errors, key=errors.get) == "kl"
    assert errors["kl"] < 0.7 * errors["svd"]


def test_a_method_says_whether_it_needs_statistics():
    """A method that says no must work without them."""
    for method in METHODS.values():
        if method.needs_statistics:
            with pytest.raises(AttributeError):
                method.weigh(TABLE, None)
        else:
            method.weigh(TABLE, None)


# Contexts


def test_contexts_are_the_mean_hidden_states_in_which_tokens_are_predicted():
    """They are found exactly where they are linear in the table rows."""
    random = np.random.default_rng(5)
    hidden = random.normal(size=(4000, D)) + np.linspace(-0.3, 0.3, D)
    scores = hidden @ TABLE.T * 0.2
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    probability = p.mean(axis=0)
    statistics = STATISTICS._replace(
        probability=probability,
        hidden_mean=hidden.mean(axis=0),
        context_moment=hidden.T @ (p @ TABLE) / len(hidden),
    )
    found = token_contexts(TABLE, statistics)
    wanted = p.T @ hidden / len(hidden) / probability[:, None] - hidden.mean(axis=0)
    rows = TABLE - probability @ TABLE
    fit, *_ = np.linalg.lstsq(
        rows * np.sqrt(probability)[:, None],
        wanted * np.sqrt(probability)[:, None],
        rcond=None,
    )
    # The ridge of a millionth is the difference.
    np.testing.assert_allclose(found, rows @ fit, atol=3e-3)
    cosine = np.sum(found * wanted, axis=1) / (
        np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    )
    assert np.median(cosine) > 0.8


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_refitted_rows_are_the_best_for_error_and_shift_together(rank):
    weighting = METHODS["context"].weigh(TABLE, STATISTICS)
    factors = solve(TABLE, weighting)
    (band,) = table_of_rank(factors, rank).bands
    rows, directions = TABLE - weighting.mean, factors.directions[:rank]
    for token in range(0, V, 7):
        context = weighting.contexts[token]
        measure = weighting.metric + np.outer(context, context)
        normal = directions @ measure @ directions.T
        wanted = np.linalg.solve(normal, directions @ measure @ rows[token])
        np.testing.assert_allclose(
            band.wte[token] @ band.scale,
            wanted @ directions,
            rtol=1e-4,
            atol=1e-4,
        )


# Prediction


def test_the_predicted_loss_is_the_second_order_term_written_out():
    random = np.random.default_rng(1)
    error = random.normal(size=(V, D)) * 0.01
    predicted = Predictor(TABLE, STATISTICS)(TABLE + error)
    p, f = STATISTICS.probability, STATISTICS.frequency
    contexts = token_contexts(TABLE, STATISTICS)
    shifted = error - p @ error / p.sum()
    head = input_ = 0.0
    for v in range(V):
        head += p[v] / 2 * shifted[v] @ STATISTICS.hidden_moment @ shifted[v]
        head += p[v] / 2 * (shifted[v] @ contexts[v]) ** 2
        input_ += f[v] / 2 * error[v] @ STATISTICS.gradient_moment @ error[v]
    assert predicted.head == pytest.approx(head, rel=1e-9)
    assert predicted.input == pytest.approx(input_, rel=1e-9)


def test_an_error_that_all_rows_share_costs_the_head_nothing():
    predicted = Predictor(TABLE, STATISTICS)(TABLE + np.arange(D))
    assert predicted.head == pytest.approx(0, abs=1e-9)
    assert predicted.input > 1


def test_a_power_law_is_fitted_to_each_method():
    def added(method, total):
        return {"a": 2.0, "b": 0.5}[method] * total**0.7

    measured = [
        (method, SecondOrder(total / 2, total / 2), added(method, total))
        for method in "ab"
        for total in (0.01, 0.3)
    ]
    regression = LossRegression(measured)
    for method in "ab":
        predicted = regression(method, SecondOrder(0.05, 0.02))
        assert predicted == pytest.approx(added(method, 0.07), rel=1e-6)
    # An unmeasured method is proportional, through the smallest measured point.
    assert regression("c", SecondOrder(0.07, 0)) == pytest.approx(7 * added("b", 0.01))
    assert regression("a", SecondOrder(0, 0)) == 0
    assert LossRegression([])("a", SecondOrder(0.1, 0.2)) is None
    single = LossRegression([("a", SecondOrder(0.1, 0), 0.2)])
    assert single("a", SecondOrder(0.2, 0)) == pytest.approx(0.4)


def test_each_method_has_the_weights_and_the_metric_of_its_definition():
    random = np.random.default_rng(0)
    size, width = 30, 5
    table = random.normal(size=(size, width))
    h, g, c = (random.normal(size=(50, width)) for _ in range(3))
    known = Statistics(
        frequency=random.dirichlet(np.ones(size)),
        probability=random.dirichlet(np.ones(size)),
        hidden_mean=h.mean(axis=0),
        hidden_moment=h.T @ h / 50,
        gradient_moment=g.T @ g / 50,
        context_moment=h.T @ c / 50,
    )
    smoothed = known.probability + 0.1 / size  # The mean probability is 1/size.
    trace, eye = np.trace(known.hidden_moment), np.eye(width)
    fisher = known.hidden_moment + known.gradient_moment
    wanted = {
        "svd": (None, None),
        "pca": (None, None),
        "freq": (known.frequency, None),
        "sqrt_freq": (np.sqrt(known.frequency), None),
        "hidden": (np.ones(size), known.hidden_moment),
        "kl": (smoothed, known.hidden_moment),
        "joint": (smoothed, known.hidden_moment / trace + 0.3 * eye / width),
        "fisher": (smoothed, fisher),
        "context": (smoothed, fisher),
    }
    assert wanted.keys() == METHODS.keys()
    for method, (weights, metric) in wanted.items():
        found = METHODS[method].weigh(table, known)
        for one, other in ((found.token_weights, weights), (found.metric, metric)):
            assert (one is None) == (other is None), method
            if other is not None:
                np.testing.assert_allclose(one, other, rtol=1e-12, err_msg=method)
        assert (found.contexts is not None) == (method == "context")
        mean = np.average(table, axis=0, weights=weights)
        if method == "svd":
            assert found.mean is None
        else:
            np.testing.assert_allclose(found.mean, mean, rtol=1e-9, err_msg=method)
