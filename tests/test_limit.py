"""The Gaussian rate-distortion line: closed forms, shape, and coded tables above it."""

import numpy as np
import pytest

from pcagpt import coding
from pcagpt.factorization import Weighting, second_order_loss

V, D = 4000, 12
RANDOM = np.random.default_rng(0)
TABLE = (RANDOM.normal(size=(V, D)) * np.arange(1, D + 1) ** -0.8).astype(np.float32)
WEIGHTS = 1 / np.arange(1, V + 1)
METRIC = np.diag(np.linspace(1, 3, D)) + 0.2
WEIGHTING = Weighting(WEIGHTS, METRIC, TABLE.mean(axis=0))


def line(table=TABLE, weighting=WEIGHTING):
    return np.array(coding.gaussian_limit(table, weighting)).T


def test_one_variance_gives_the_closed_form_of_a_gaussian():
    """D = s^2 2^(-2 R) for a number of variance s^2 at R bits."""
    basis = np.linalg.qr(RANDOM.normal(size=(V, D)))[0]  # The same energy everywhere.
    table = (3 * np.sqrt(V) * basis).astype(np.float32)
    sizes, losses = line(table, Weighting(np.full(V, 0.5)))
    bits = 8 * sizes / (V * D)
    np.testing.assert_allclose(
        losses, V * D * 0.5 * 9 / 2 * 2 ** (-2 * bits), rtol=1e-5
    )
    assert bits[0] < 0.01 and 7 < bits[-1] <= 8


def test_two_variances_are_filled_as_worked_out_by_hand():
    """Tokens of weight 16 and 1: at level 4 only the first have bits, one each."""
    basis = np.linalg.qr(RANDOM.normal(size=(20, 1)))[0]
    table = np.concatenate([basis, basis[:20]]).astype(np.float32) * np.sqrt(20)
    weights = np.repeat([16.0, 1.0], 20)
    sizes, losses = line(table, Weighting(weights))
    level = 16 * 2.0 ** -np.arange(len(sizes))
    bits = 20 * (np.log2(16 / level) + np.maximum(np.log2(1 / level), 0)) / 2
    np.testing.assert_allclose(8 * sizes, bits, atol=1e-3)
    wanted = 20 * (level + np.minimum(level, 1)) / 2
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_the_line_starts_at_the_loss_of_the_mean_falls_and_is_convex():
    sizes, losses = line()
    mean = np.tile(WEIGHTS @ TABLE / WEIGHTS.sum(), (V, 1))
    start = second_order_loss(TABLE, mean, Weighting(WEIGHTS, METRIC))
    assert sizes[0] == 0
    centred = WEIGHTING._replace(mean=mean[0])
    assert line(weighting=centred)[1][0] == pytest.approx(start, rel=1e-5)
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
    slopes = np.diff(losses) / np.diff(sizes)
    assert (np.diff(slopes) > -1e-9 * np.abs(slopes[1:])).all()


@pytest.mark.parametrize("size", [3000, 10_000, 30_000])
def test_a_coded_gaussian_table_lies_above_the_line(size):
    coded = coding.within_bytes(coding.prepare(TABLE, WEIGHTING), size)
    sizes, losses = line()
    limit = np.exp(np.interp(coded.bytes, sizes, np.log(losses)))
    loss = second_order_loss(TABLE, coded.table.dense(), WEIGHTING)
    assert limit < loss < 4 * limit


def test_contexts_and_tokens_of_no_weight_do_not_count():
    weights = np.where(np.arange(V) < V // 2, WEIGHTS, 0)
    contexts = RANDOM.normal(size=(V, D))
    sizes, losses = line(weighting=Weighting(weights, METRIC, contexts=contexts))
    other = line(TABLE[: V // 2], Weighting(weights[: V // 2], METRIC))
    shared = slice(len(other[0]))
    np.testing.assert_allclose([sizes[shared], losses[shared]], other, rtol=1e-5)
