"""Weighted factorizations: each is the best there is under its own measure."""

import numpy as np
import pytest

from pcagpt import factorize
from pcagpt.factorize import (
    METHODS,
    BandFactors,
    Statistics,
    Weighting,
    solve,
    table_of_rank,
)
from pcagpt.factorize.methods import token_contexts

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


def root(metric):
    values, vectors = np.linalg.eigh(metric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def weighted_error(error, weighting):
    """What a method minimises, written out."""
    weights = weighting.token_weights
    weights = np.ones(len(error)) if weights is None else weights
    metric = np.eye(D) if weighting.metric is None else weighting.metric
    return float(np.einsum("v,vd,de,ve->", weights, error, metric, error))


def rebuilt(low_rank):
    return low_rank.dense()


def close_to(factors, wanted, tolerance):
    for rank in (1, 3, D):
        found, other = (rebuilt(table_of_rank(f, rank)) for f in (factors, wanted))
        np.testing.assert_allclose(found, other, atol=tolerance)


@pytest.mark.parametrize("name", LINEAR)
def test_the_error_of_a_rank_is_the_tail_of_the_spectrum(name):
    weighting = METHODS[name](TABLE, STATISTICS)
    factors = solve(TABLE, weighting)
    squares = factors.singular_values.astype(float) ** 2
    for rank in (1, 2, 5, D):
        error = TABLE - rebuilt(table_of_rank(factors, rank))
        tail = squares[rank:].sum()
        assert weighted_error(error, weighting) == pytest.approx(
            tail, rel=1e-4, abs=1e-6 * squares.sum()
        )


@pytest.mark.parametrize("name", LINEAR)
def test_no_other_factors_are_better(name):
    weighting, random = METHODS[name](TABLE, STATISTICS), np.random.default_rng(0)
    low_rank = table_of_rank(solve(TABLE, weighting), 3)
    best = weighted_error(TABLE - rebuilt(low_rank), weighting)
    for trial in range(300):
        size = 10.0 ** -(trial % 5)
        (band,) = low_rank.bands
        moved = (a + size * random.normal(size=a.shape) for a in band)
        other = low_rank._replace(bands=(BandFactors(*moved),))
        assert weighted_error(TABLE - rebuilt(other), weighting) > best * (1 - 1e-6)


@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_every_split_is_the_same_table_and_full_rank_is_the_table(name, split):
    factors = solve(TABLE, METHODS[name](TABLE, STATISTICS))
    whole = rebuilt(table_of_rank(factors, 3))
    np.testing.assert_allclose(
        rebuilt(table_of_rank(factors, 3, split)),
        whole,
        atol=1e-4 * np.abs(whole).max(),
    )
    np.testing.assert_allclose(
        rebuilt(table_of_rank(factors, D, split)),
        TABLE,
        atol=1e-4 * np.abs(TABLE).max(),
    )


def test_equal_weights_are_those_of_svd_and_pca():
    ones = np.full(V, 0.25)
    plain = solve(TABLE, METHODS["svd"](TABLE, None))
    close_to(solve(TABLE, Weighting(ones)), plain, 1e-4)
    centred = solve(TABLE, METHODS["pca"](TABLE, None))
    close_to(solve(TABLE, Weighting(ones, mean=TABLE.mean(axis=0))), centred, 1e-4)


def test_the_identity_as_a_metric_changes_nothing():
    weights = STATISTICS.frequency
    plain = solve(TABLE, Weighting(weights))
    close_to(solve(TABLE, Weighting(weights, 7.0 * np.eye(D))), plain, 1e-5)


def test_tokens_never_seen_and_directions_never_used_do_no_harm():
    frequency = STATISTICS.frequency.copy()
    frequency[V // 2 :] = 0
    hidden = STATISTICS.hidden_moment.copy()
    hidden[:3] = hidden[:, :3] = 0
    poor = STATISTICS._replace(
        frequency=frequency, hidden_moment=hidden, gradient_moment=np.zeros((D, D))
    )
    for name in METHODS:
        low_rank = table_of_rank(solve(TABLE, METHODS[name](TABLE, poor)), 4)
        assert np.isfinite(low_rank.bands[0].wte).all(), name
        assert np.isfinite(low_rank.bands[0].scale).all(), name


def test_weights_and_metric_decide_where_the_error_goes():
    kl = METHODS["kl"](TABLE, STATISTICS)
    errors = {
        name: weighted_error(
            TABLE
            - rebuilt(table_of_rank(solve(TABLE, METHODS[name](TABLE, STATISTICS)), 3)),
            kl,
        )
        for name in LINEAR
    }
    assert min(errors, key=errors.get) == "kl"
    assert errors["kl"] < 0.7 * errors["svd"]


# Contexts


def test_contexts_are_the_mean_hidden_states_in_which_tokens_are_predicted():
    """Where these are linear in the tokens' rows, they are found exactly."""
    random = np.random.default_rng(5)
    hidden = random.normal(size=(4000, D))
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
    # All but exactly: a millionth of a ridge keeps a singular table solvable.
    np.testing.assert_allclose(found, rows @ fit, atol=3e-3)
    cosine = np.sum(found * wanted, axis=1) / (
        np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    )
    assert np.median(cosine) > 0.8


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_refitted_rows_are_the_best_for_error_and_shift_together(rank):
    weighting = METHODS["context"](TABLE, STATISTICS)
    factors = solve(TABLE, weighting)
    low_rank = table_of_rank(factors, rank)
    rows, directions = TABLE - weighting.mean, factors.directions[:rank]
    for token in range(0, V, 7):
        context = weighting.contexts[token]
        measure = weighting.metric + np.outer(context, context)
        normal = directions @ measure @ directions.T
        wanted = np.linalg.solve(normal, directions @ measure @ rows[token])
        np.testing.assert_allclose(
            low_rank.bands[0].wte[token] @ low_rank.bands[0].scale,
            wanted @ directions,
            rtol=1e-4,
            atol=1e-4,
        )


def test_what_needs_statistics_says_so():
    assert [m for m in METHODS if not factorize.needs_statistics(m)] == ["svd", "pca"]


# Prediction


def test_the_predicted_loss_is_the_second_order_term_written_out():
    random = np.random.default_rng(1)
    error = random.normal(size=(V, D)) * 0.01
    predicted = factorize.Predictor(TABLE, STATISTICS)(TABLE + error)
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
    predicted = factorize.Predictor(TABLE, STATISTICS)(TABLE + np.arange(D))
    assert predicted.head == pytest.approx(0, abs=1e-9)
    assert predicted.input > 1


def test_what_each_method_weighs_is_what_it_is_named_for():
    """Written out by hand: the table of tokens' weights and metrics of the methods."""
    random = np.random.default_rng(0)
    size, width = 30, 5
    table = random.normal(size=(size, width))
    h, g, c = (random.normal(size=(50, width)) for _ in range(3))
    known = factorize.Statistics(
        frequency=random.dirichlet(np.ones(size)),
        probability=random.dirichlet(np.ones(size)),
        hidden_mean=h.mean(axis=0),
        hidden_moment=h.T @ h / 50,
        gradient_moment=g.T @ g / 50,
        context_moment=h.T @ c / 50,
    )
    smoothed = known.probability + 0.1 / size  # The mean of what sums to one.
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
    assert wanted.keys() == factorize.METHODS.keys()
    for method, (weights, metric) in wanted.items():
        found = factorize.METHODS[method](table, known)
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


def test_contexts_are_the_linear_map_that_the_moments_say():
    """From samples: rows seen by hidden states that are a linear map of them."""
    random = np.random.default_rng(1)
    size, width = 40, 4
    table = random.normal(size=(size, width))
    probability = random.dirichlet(np.ones(size))
    linear = random.normal(size=(width, width))
    mean_row = probability @ table
    mean_h = random.normal(size=width)
    hidden_V = mean_h + (table - mean_row) @ linear.T  # Mean state of each token.
    known = factorize.Statistics(
        frequency=probability,
        probability=probability,
        hidden_mean=mean_h,
        hidden_moment=np.eye(width),
        gradient_moment=np.eye(width),
        context_moment=(hidden_V * probability[:, None]).T @ table,
    )
    found = factorize.METHODS["context"](table, known).contexts
    np.testing.assert_allclose(found, hidden_V - mean_h, atol=1e-4)
