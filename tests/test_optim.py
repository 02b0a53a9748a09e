"""Schedules and updates worked by hand; freezing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import gpt_config

from pcagpt.config.schema import TrainSettings
from pcagpt.model import GPT
from pcagpt.training.optim import (
    freeze_labels,
    learning_rate_schedule,
    optimizer,
    stop_frozen_gradients,
)

pytestmark = pytest.mark.usefixtures("quick")
TRAIN = TrainSettings(
    steps=3, learning_rate=0.1, schedule="constant", warmup_steps=0, gradient_clip=0.0
)
RANDOM = np.random.default_rng(0)
WTE = r"embed/band_\d+/wte"


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def small_params():
    """One leaf of every kind that a model has."""
    wte, up, down = normal(5, 3), normal(3, 4), normal(3, 4)
    return {
        "embed": {"band_0": {"wte": wte, "scale_up": up, "scale_down": down}},
        "wpe": normal(2, 4),
        "block_0": {
            "ln_1": {"scale": normal(4), "bias": normal(4)},
            "mlp": {"fc": {"kernel": normal(4, 4), "bias": normal(4)}},
        },
        "ln_f": {"scale": normal(4), "bias": normal(4)},
    }


PARAMS = small_params()
GRADIENTS = [small_params(), small_params()]


def path_of(key_path):
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def decays(path):
    return not path.endswith(("/bias", "/scale"))


def run(train, gradients, frozen=()):
    """The parameters after one update with each of the gradients."""
    transform = optimizer(train, frozen)
    params, state = PARAMS, transform.init(PARAMS)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        found,
        expected,
    )


# Schedules


def rates(**changes):
    train = TrainSettings(steps=11, learning_rate=2.0, **changes)
    schedule = learning_rate_schedule(train)
    return [float(schedule(jnp.int32(step))) for step in range(train.steps)]


COSINE = [0.5 + 1.5 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [2] * 7),
        ("linear", [2, 1.75, 1.5, 1.25, 1, 0.75, 0.5]),
        ("cosine", COSINE),
    ],
)
def test_a_schedule_rises_to_its_peak_and_ends_at_the_final_share(schedule, after):
    found = rates(schedule=schedule, warmup_steps=4, final_learning_rate_share=0.25)
    # The first update moves already; the last one is at the final share.
    np.testing.assert_allclose(found, [0.5, 1, 1.5, 2, *after], rtol=1e-6)
    for warmup in (0, 1):
        found = rates(schedule=schedule, warmup_steps=warmup)
        assert found[0] == 2
        assert found[-1] == pytest.approx(2 if schedule == "constant" else 0.2)


def test_a_warm_up_longer_than_the_run_still_rises_to_the_peak():
    found = rates(schedule="cosine", warmup_steps=100)
    np.testing.assert_allclose(found, [0.2 * i for i in range(1, 11)] + [2], rtol=1e-6)


# Updates


def adamw_by_hand(train, gradients):
    """Loshchilov and Hutter 2019, in float64, decay on matrices only."""

    def leaf(key_path, start, *gradients):
        decay = train.weight_decay * decays(path_of(key_path))
        p = np.asarray(start, np.float64)
        m = v = np.zeros_like(p)
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient, np.float64)
            m = train.beta1 * m + (1 - train.beta1) * g
            v = train.beta2 * v + (1 - train.beta2) * g**2
            m_hat, v_hat = m / (1 - train.beta1**t), v / (1 - train.beta2**t)
            update = m_hat / (np.sqrt(v_hat) + 1e-8)
            p = p - train.learning_rate * (update + decay * p)
        return p

    return jax.tree_util.tree_map_with_path(leaf, PARAMS, *gradients)


@pytest.mark.parametrize(
    "changes",
    [{"weight_decay": 0.3}, {"weight_decay": 0.0, "beta1": 0.5, "beta2": 0.6}],
)
def test_two_updates_are_those_of_adamw_by_hand(changes):
    train = dataclasses.replace(TRAIN, **changes)
    assert_close(run(train, GRADIENTS), adamw_by_hand(train, GRADIENTS))


def test_only_matrices_and_tables_decay():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    after = run(dataclasses.replace(TRAIN, weight_decay=0.5), [zero])

    def check(key_path, new, old):
        path = path_of(key_path)
        factor = 1 - 0.1 * 0.5 if decays(path) else 1
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=path)

    jax.tree_util.tree_map_with_path(check, after, PARAMS)


def test_each_update_has_the_rate_of_the_schedule():
    train = dataclasses.replace(TRAIN, schedule="linear", weight_decay=0.0)
    # If all gradients are the same, AdamW moves each value by the rate itself.
    for updates, moved in ((1, 0.1), (2, 0.1 + 0.055)):
        found = run(train, GRADIENTS[:1] * updates)
        expected = jax.tree.map(
            lambda p, g, m=moved: p - m * jnp.sign(g), PARAMS, GRADIENTS[0]
        )
        assert_close(found, expected)


@pytest.mark.parametrize("clip", [1.0, 1e3])
def test_gradients_are_clipped_to_a_global_norm(clip):
    train = dataclasses.replace(TRAIN, weight_decay=0.0)
    # AdamW undoes a factor on all gradients, so that the second one is larger.
    large = [GRADIENTS[0], jax.tree.map(lambda g: 10 * g, GRADIENTS[1])]
    clipped = []
    for gradient in large:
        squares = [np.square(g, dtype=np.float64) for g in jax.tree.leaves(gradient)]
        factor = min(1, clip / math.sqrt(sum(map(np.sum, squares))))
        clipped.append(jax.tree.map(lambda g, f=factor: f * g, gradient))
    found = run(dataclasses.replace(train, gradient_clip=clip), large)
    assert_close(found, adamw_by_hand(train, clipped))
    unclipped = run(train, large)["wpe"]
    assert np.allclose(found["wpe"], unclipped, atol=1e-3) == (clip == 1e3)


def test_a_huge_frozen_gradient_does_not_shrink_what_trains():
    train = dataclasses.replace(TRAIN, gradient_clip=1.0)

    def with_huge_table(gradient):
        band = gradient["embed"]["band_0"]
        return gradient | {"embed": {"band_0": band | {"wte": 1e6 * band["wte"]}}}

    huge = [with_huge_table(gradient) for gradient in GRADIENTS]
    quiet, loud = (run(train, gradients, [WTE]) for gradients in (GRADIENTS, huge))
    assert_close(loud, quiet, rtol=0, atol=0)
    # If the table trains, the same gradient leaves next to nothing of the others.
    trained = run(train, [GRADIENTS[0], huge[1]])
    assert np.abs(trained["ln_f"]["bias"] - quiet["ln_f"]["bias"]).max() > 0.01


# Freezing


def test_frozen_leaves_get_no_update_no_decay_and_no_moments():
    train = dataclasses.replace(TRAIN, weight_decay=0.5)
    frozen = [WTE, "ln_f/.*"]
    after, expected = run(train, GRADIENTS, frozen), adamw_by_hand(train, GRADIENTS)
    for held in (
        lambda params: params["embed"]["band_0"]["wte"],
        lambda params: params["ln_f"],
    ):
        assert_close(held(after), held(PARAMS), rtol=0, atol=0)
    for name in ("wpe", "block_0"):
        assert_close(after[name], expected[name])
    state = optimizer(train, frozen).init(PARAMS)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    total = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert moments == 2 * (total - 5 * 3 - 4 - 4)


def test_stopped_gradients_are_zero_where_frozen_and_whole_elsewhere():
    def loss(params):
        params = stop_frozen_gradients(params, (WTE,))
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    gradient = jax.grad(loss)(PARAMS)
    np.testing.assert_array_equal(gradient["embed"]["band_0"]["wte"], 0)
    np.testing.assert_array_equal(gradient["wpe"], 2 * PARAMS["wpe"])


def test_a_pattern_freezes_whole_paths_and_must_match_one():
    labels = freeze_labels(PARAMS, [r"embed/.*/scale_(up|down)"])
    frozen = [
        path_of(path)
        for path, label in jax.tree_util.tree_leaves_with_path(labels)
        if label == "frozen"
    ]
    assert sorted(frozen) == ["embed/band_0/scale_down", "embed/band_0/scale_up"]
    for pattern in ("wte", "embed/band_0", r"embed/band_7/wte"):
        with pytest.raises(ValueError, match="nothing to freeze: no parameter match"):
            optimizer(TRAIN, [WTE, pattern]).init(PARAMS)


def test_a_parameter_that_no_decay_rule_covers_is_an_error():
    stranger = PARAMS | {"block_0": PARAMS["block_0"] | {"gate": normal(4)}}
    with pytest.raises(ValueError, match="no rule covers parameter 'block_0/gate'"):
        optimizer(TRAIN).init(stranger)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_one_leaf_with_one_pair_of_moments(tied):
    config = gpt_config(
        vocab_size=11,
        vocab_multiple=1,
        block_size=4,
        n_layer=1,
        n_head=1,
        n_embd=6,
        n_embd_wte=3,
        n_embd_wte_scale_tying=tied,
    )
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    model = GPT(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"]
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert shapes.count((11, 3)) == 1
    assert (3, 11) not in shapes
    assert shapes.count((3, 6)) == (1 if tied else 2)
    state = jax.eval_shape(optimizer(TRAIN).init, params)
    assert [leaf.shape for leaf in jax.tree.leaves(state)].count((11, 3)) == 2
