"""Evaluation against the same numbers worked out in plain numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcagpt import trees
from pcagpt.data.batches import EvaluationBatches
from pcagpt.model import GPT, GPTConfig
from pcagpt.run.evaluate import TextSize, TokenScores, evaluate, scorer, target_cosines
from pcagpt.sharding import placement

pytestmark = pytest.mark.usefixtures("quick")
VOCAB, BLOCK = 21, 8
DENSE = GPTConfig(
    vocab_size=VOCAB, vocab_multiple=8, block_size=BLOCK, n_layer=1, n_head=2, n_embd=8
)
UNTIED = dataclasses.replace(DENSE, n_embd_wte=3, n_embd_wte_scale_tying=False)
BANDS = dataclasses.replace(
    UNTIED, n_embd_wte=None, band_sizes=(4, 7, 10), band_ranks=(None, 4, 2)
)
# Seven whole windows and one of four targets.
SPLIT = np.random.default_rng(1).integers(0, VOCAB, 7 * BLOCK + 5).astype(np.uint16)


@functools.cache
def variables_of(config):
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(
        GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    params = {
        path: jnp.asarray(
            random.normal(path.endswith("/scale"), 0.4, leaf.shape), jnp.float32
        )
        for path, leaf in trees.flatten(shapes).items()
    }
    constants = {}
    if len(config.bands) > 1:
        order = jnp.asarray(random.permutation(VOCAB), jnp.int32)
        constants = {"embed": {"position_of_token": order}}
    return {"params": trees.unflatten(params), "constants": constants}


@functools.cache
def hidden_of(config):
    """Final hidden states of the split's targets, in order: [n, D] float64."""
    hidden = jax.jit(functools.partial(GPT(config).apply, method="hidden"))
    ((inputs, targets),) = EvaluationBatches(SPLIT, BLOCK, 8)
    h_ND = np.asarray(hidden(variables_of(config), inputs), np.float64)
    return h_ND[targets.reshape(-1) >= 0]


def head_rows(config):
    """For each token its wte row, its scale_down (or None) and its row in D: lists."""
    flat = trees.flatten(variables_of(config)["params"])
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
    rows, scales, wide = [], [], []
    for number, band in enumerate(config.bands):
        wte = flat[f"embed/band_{number}/wte"]
        scale = flat.get(f"embed/band_{number}/scale_down")
        for row in wte[: band.size]:
            rows.append(row)
            scales.append(scale)
            wide.append(row if scale is None else row @ scale)
    order = np.arange(VOCAB)
    if len(config.bands) > 1:
        order = variables_of(config)["constants"]["embed"]["position_of_token"]
    return [[items[i] for i in order] for items in (rows, scales, wide)]


def cosine(a, b):
    return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)


def run(config, batch_size, devices=(1, 1), chunks=1, text=None, tokens=SPLIT):
    mesh = placement.make_mesh(*devices)
    variables = variables_of(config)
    variables = jax.device_put(variables, placement.shardings(variables, mesh))
    batches = EvaluationBatches(tokens, BLOCK, batch_size)
    return evaluate(
        scorer(GPT(config), mesh, chunks),
        variables,
        batches,
        batches.window_count,
        placement.batch_sharding(mesh),
        text,
    )


@pytest.mark.parametrize(
    "config", [DENSE, UNTIED, BANDS], ids=["dense", "untied", "bands"]
)
def test_every_number_is_that_of_plain_numpy(config):
    rows, scales, wide = head_rows(config)
    losses, cosines, cosines_d = [], [], []
    for h, target in zip(hidden_of(config), SPLIT[1:], strict=True):
        logits = np.array([h @ row for row in wide])
        losses.append(np.log(np.sum(np.exp(logits))) - logits[target])
        z = h if scales[target] is None else scales[target] @ h
        cosines.append(cosine(z, rows[target]))
        cosines_d.append(cosine(h, wide[target]))
    assert np.ptp(losses) > 2

    words, size = 13, 170
    metrics, window_losses = run(config, 3, chunks=2, text=TextSize(words, size))
    starts = range(0, len(losses), BLOCK)
    expected = [
        [sum(losses[s : s + BLOCK]), len(losses[s : s + BLOCK])] for s in starts
    ]
    assert window_losses.dtype == np.float64
    assert window_losses[-1, 1] == 4
    np.testing.assert_allclose(window_losses, expected, rtol=1e-6)
    nats = sum(losses)
    place = 0.05 * (len(cosines) - 1)
    below = sorted(cosines)[math.floor(place) : math.floor(place) + 2]
    assert metrics == pytest.approx(
        {
            "loss": nats / 60,
            "perplexity": math.exp(nats / 60),
            "word_perplexity": math.exp(nats / words),
            "bits_per_byte": nats / math.log(2) / size,
            "ln_f_cosine": np.mean(cosines),
            "ln_f_cosine_p05": below[0] + (place % 1) * (below[1] - below[0]),
            "ln_f_cosine_d": np.mean(cosines_d),
            "tokens_predicted": 60,
        },
        rel=1e-5,
    )
    same = metrics["ln_f_cosine"] == metrics["ln_f_cosine_d"]
    assert same == (config is DENSE)


def test_result_does_not_depend_on_batch_size_chunks_or_devices():
    text = TextSize(13, 170)
    expected = run(BANDS, 1, text=text)
    for batch_size, devices, chunks in (
        (3, (1, 1), 4),
        (16, (8, 1), 3),
        (8, (2, 4), 1),
    ):
        found = run(BANDS, batch_size, devices, chunks, text)
        np.testing.assert_allclose(
            found.window_losses, expected.window_losses, rtol=5e-7
        )
        assert found.metrics == pytest.approx(expected.metrics, rel=2e-6)


def test_padding_of_the_last_batch_and_window_counts_for_nothing():
    whole = run(DENSE, 3)
    full_windows = run(DENSE, 7, tokens=SPLIT[: 7 * BLOCK + 1])
    np.testing.assert_allclose(
        whole.window_losses[:7], full_windows.window_losses, rtol=1e-6
    )
    assert whole.metrics["tokens_predicted"] == 60
    assert whole.window_losses.shape == (8, 2)


def test_scores_are_zero_where_there_is_no_target():
    mesh = placement.make_mesh(1, 1)
    ((inputs, targets),) = EvaluationBatches(SPLIT, BLOCK, 8)
    targets = targets.copy()
    targets[:, ::3] = -1
    scores = scorer(GPT(BANDS), mesh, 2)(variables_of(BANDS), inputs, targets)
    for score in scores:
        assert (score.shape, score.dtype) == ((8, BLOCK), jnp.float32)
        np.testing.assert_array_equal(np.asarray(score) != 0, targets >= 0)


def test_cosines_are_in_float32_also_of_a_bfloat16_hidden_state():
    random = np.random.default_rng(2)
    h = jnp.asarray(random.normal(size=(9, 8)), jnp.bfloat16)
    wte = jnp.asarray(random.normal(size=(9, 8)), jnp.float32)
    found = target_cosines(h, [(wte, None, 9)], jnp.arange(9))
    pairs = zip(np.asarray(h, np.float64), np.asarray(wte, np.float64), strict=True)
    expected = [cosine(a, b) for a, b in pairs]
    for cosines in found:
        assert cosines.dtype == jnp.float32
        np.testing.assert_allclose(cosines, expected, rtol=1e-5, atol=1e-7)


# Formulas by hand, with made-up scores


def evaluated(losses, targets, text=None, windows=None):
    """Of rows of losses; cosines count up from 0 by 1/100."""
    losses, targets = np.asarray(losses, np.float32), np.asarray(targets)

    def score(_, inputs, targets):
        number = np.arange(targets.size, dtype=np.float32).reshape(targets.shape) / 100
        return TokenScores(losses, number, 2 * number)

    place = placement.batch_sharding(placement.make_mesh(1, 1))
    count = len(targets) if windows is None else windows
    return evaluate(score, None, [(targets, targets)], count, place, text)


def test_ignored_targets_inside_a_window_are_left_out():
    metrics, window_losses = evaluated(
        [[1, 2, 3, 0], [0, 0, 5, 1]], [[7, 0, 3, -1], [-1, -1, 2, 1]]
    )
    np.testing.assert_array_equal(window_losses, [[6, 3], [6, 2]])
    assert metrics["loss"] == 12 / 5
    assert metrics["tokens_predicted"] == 5
    # Cosines .00 .01 .02 .06 .07: the 5th percentile lies a fifth of the way up.
    assert metrics["ln_f_cosine"] == pytest.approx(0.16 / 5)
    assert metrics["ln_f_cosine_p05"] == pytest.approx(0.002)
    assert metrics["ln_f_cosine_d"] == pytest.approx(0.32 / 5)


def test_rows_beyond_the_windows_are_left_out():
    metrics, window_losses = evaluated([[1, 2], [9, 9]], [[0, 0], [1, 1]], windows=1)
    np.testing.assert_array_equal(window_losses, [[3, 2]])
    assert metrics["loss"] == 1.5


def test_perplexities_and_bits_by_hand():
    log2 = math.log(2)
    metrics, _ = evaluated([[3 * log2, 5 * log2]], [[0, 0]], TextSize.of((1, 16)))
    assert metrics["perplexity"] == pytest.approx(2**4)
    assert metrics["word_perplexity"] == pytest.approx(2**8)
    assert metrics["bits_per_byte"] == pytest.approx(0.5)


def test_without_text_there_is_no_word_perplexity():
    metrics, _ = evaluated([[1, 2]], [[0, 0]], TextSize.of(None))
    assert metrics["word_perplexity"] is None
    assert metrics["bits_per_byte"] is None


def test_perplexity_too_large_for_a_float_is_infinite():
    metrics, _ = evaluated([[800, 800]], [[0, 0]])
    assert metrics["loss"] == 800
    assert metrics["perplexity"] == math.inf


def test_window_losses_are_summed_in_float64():
    losses = np.full((1, 4096), 1e-4)
    losses[0, 0] = 2.0**17
    _, window_losses = evaluated(losses, np.zeros((1, 4096), int))
    exact = np.sum(losses.astype(np.float32), dtype=np.float64)
    assert window_losses[0, 0] == pytest.approx(exact, rel=1e-15)
