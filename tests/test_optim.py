"""Schedules and updates worked by hand; freezing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcagpt.model import GPT, GPTConfig
from pcagpt.training.optim import (
    FROZEN,
    TRAINED,
    OptimizerConfig,
    freeze_labels,
    learning_rate_schedule,
    optimizer,
    stop_frozen_gradients,
)

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = OptimizerConfig(
    steps=3, learning_rate=0.1, schedule="constant", gradient_clip=0.0
)
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def small_params():
    """One leaf of every kind that a model has."""
    return {
        "embed": {
            "band_0": {
                "wte": normal(5, 3),
                "scale_up": normal(3, 4),
                "scale_down": normal(3, 4),
            }
        },
        "wpe": normal(2, 4),
        "block_0": {
            "ln_1": {"scale": normal(4), "bias": normal(4)},
            "mlp": {"fc": {"kernel": normal(4, 4), "bias": normal(4)}},
        },
        "ln_f": {"scale": normal(4), "bias": normal(4)},
    }


PARAMS = small_params()
GRADIENTS = [small_params(), small_params()]
WTE = r"embed/band_\d+/wte"


def wte_of(params):
    return params["embed"]["band_0"]["wte"]


def path_of(key_path):
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def run(config, gradients, frozen=()):
    """The parameters after one update with each of the gradients."""
    transform = optimizer(config, frozen)
    params, state = PARAMS, transform.init(PARAMS)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def change(config, gradients, frozen=()):
    return jax.tree.map(jnp.subtract, run(config, gradients, frozen), PARAMS)


# Schedules


def rates(**changes):
    config = OptimizerConfig(steps=11, learning_rate=2.0, **changes)
    schedule = learning_rate_schedule(config)
    return [float(schedule(jnp.int32(step))) for step in range(config.steps)]


def test_warm_up_moves_at_once_and_peaks_at_its_last_update():
    found = rates(schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(found, [0.5, 1, 1.5] + [2] * 8, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_update_is_at_the_peak(warmup):
    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule=schedule, warmup_steps=warmup)[0] == 2


def test_linear_schedule_by_hand():
    found = rates(schedule="linear", warmup_steps=4, final_learning_rate_share=0.25)
    falling = [2, 1.75, 1.5, 1.25, 1, 0.75, 0.5]
    np.testing.assert_allclose(found, [0.5, 1, 1.5, 2, *falling], rtol=1e-6)


def test_cosine_schedule_by_hand():
    found = rates(schedule="cosine", warmup_steps=4, final_learning_rate_share=0.25)
    falling = [0.5 + 1.5 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    np.testing.assert_allclose(found, [0.5, 1, 1.5, 2, *falling], rtol=1e-6)
    assert falling[3] == pytest.approx(1.25)
    assert falling[-1] == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_last_update_is_at_the_final_share(schedule):
    for warmup in (0, 1, 9):
        found = rates(
            schedule=schedule, warmup_steps=warmup, final_learning_rate_share=0.1
        )
        assert found[-1] == pytest.approx(0.2)
        assert max(found) == found[max(warmup - 1, 0)] == 2


def test_warm_up_longer_than_the_run_still_rises_to_the_peak():
    found = rates(schedule="cosine", warmup_steps=100)
    np.testing.assert_allclose(found, [0.2 * i for i in range(1, 11)] + [2], rtol=1e-6)


# Updates


def adamw_by_hand(config, gradients):
    """Loshchilov and Hutter 2019, in float64, decay on matrices only."""

    def leaf(key_path, start, *gradients):
        path = path_of(key_path)
        decays = not path.endswith(("/bias", "/scale"))
        p = np.asarray(start, np.float64)
        m = v = np.zeros_like(p)
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient, np.float64)
            m = config.beta1 * m + (1 - config.beta1) * g
            v = config.beta2 * v + (1 - config.beta2) * g**2
            m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
            update = m_hat / (np.sqrt(v_hat) + 1e-8)
            p = p - config.learning_rate * (update + decays * config.weight_decay * p)
        return p

    return jax.tree_util.tree_map_with_path(leaf, PARAMS, *gradients)


def assert_close(found, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, **tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.0}, {"beta1": 0.5}, {"beta2": 0.6}]
)
def test_two_updates_of_adamw_by_hand(changes):
    config = dataclasses.replace(CONFIG, **{"weight_decay": 0.3} | changes)
    expected = adamw_by_hand(config, GRADIENTS)
    assert_close(run(config, GRADIENTS), expected, rtol=1e-5, atol=1e-6)


def test_decay_takes_matrices_and_tables_and_leaves_biases_and_norms():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    after = run(dataclasses.replace(CONFIG, weight_decay=0.5), [zero])

    def check(key_path, new, old):
        path = path_of(key_path)
        factor = 1 if path.endswith(("/bias", "/scale")) else 1 - 0.1 * 0.5
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=path)

    jax.tree_util.tree_map_with_path(check, after, PARAMS)


def test_rate_of_each_update_is_that_of_the_schedule():
    config = dataclasses.replace(
        CONFIG, schedule="linear", warmup_steps=0, weight_decay=0.0
    )
    # With one gradient for ever, AdamW moves each value by the rate itself.
    first = change(config, GRADIENTS[:1])
    both = change(config, GRADIENTS[:1] * 2)
    sign = jax.tree.map(jnp.sign, GRADIENTS[0])
    assert_close(first, jax.tree.map(lambda s: -0.1 * s, sign), rtol=1e-5, atol=1e-6)
    expected = jax.tree.map(lambda s: -(0.1 + 0.055) * s, sign)
    assert_close(both, expected, rtol=1e-5, atol=1e-6)


# Clipping. AdamW all but undoes a factor on all gradients alike: it shows between two.


@pytest.mark.parametrize("clip", [1.0, 1e3])
def test_gradients_are_clipped_to_a_global_norm(clip):
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    large = [GRADIENTS[0], jax.tree.map(lambda g: 10 * g, GRADIENTS[1])]
    norms = [
        math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
        for leaves in map(jax.tree.leaves, large)
    ]
    factors = [min(1, clip / norm) for norm in norms]
    scaled = [
        jax.tree.map(lambda g, factor=factor: factor * g, gradient)
        for gradient, factor in zip(large, factors, strict=True)
    ]
    expected = adamw_by_hand(config, scaled)
    found = run(dataclasses.replace(config, gradient_clip=clip), large)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    unclipped = run(config, large)["wpe"]
    assert np.allclose(found["wpe"], unclipped, atol=1e-3) == (clip == 1e3)


def test_huge_frozen_gradient_does_not_shrink_what_trains():
    config = dataclasses.replace(CONFIG, gradient_clip=1.0, weight_decay=0.1)
    huge = [
        gradient
        | {
            "embed": jax.tree_util.tree_map_with_path(
                lambda path, g: g * (1e6 if "wte" in path_of(path) else 1),
                gradient["embed"],
            )
        }
        for gradient in GRADIENTS
    ]
    quiet, loud = (run(config, gradients, [WTE]) for gradients in (GRADIENTS, huge))
    assert_close(loud, quiet, rtol=0, atol=0)
    np.testing.assert_array_equal(loud["embed"]["band_0"]["wte"], wte_of(PARAMS))
    # Where the table trains, the same gradient leaves the others next to nothing.
    trained = run(config, [GRADIENTS[0], huge[1]])
    assert np.abs(trained["ln_f"]["bias"] - quiet["ln_f"]["bias"]).max() > 0.01


# Freezing


def test_frozen_leaves_get_no_update_no_decay_and_no_moments():
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    after = run(config, GRADIENTS, [WTE, "ln_f/.*"])
    np.testing.assert_array_equal(wte_of(after), wte_of(PARAMS))
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(after["ln_f"][name], PARAMS["ln_f"][name])
    expected = adamw_by_hand(config, GRADIENTS)
    for name in ("wpe", "block_0"):
        assert_close(after[name], expected[name], rtol=1e-5, atol=1e-6)
    state = optimizer(config, [WTE, "ln_f/.*"]).init(PARAMS)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    total = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert moments == 2 * (total - 5 * 3 - 4 - 4)


def test_stopped_gradients_are_zero_where_frozen_and_whole_elsewhere():
    def loss(params, frozen):
        params = stop_frozen_gradients(params, frozen)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    gradient = jax.grad(loss)(PARAMS, (WTE,))
    np.testing.assert_array_equal(wte_of(gradient), 0)
    np.testing.assert_array_equal(gradient["wpe"], 2 * PARAMS["wpe"])


def test_pattern_that_matches_nothing_is_an_error_that_names_it():
    for pattern in ("wte", "embed/band_0", r"embed/band_7/wte"):
        with pytest.raises(ValueError, match="nothing to freeze: no parameter match"):
            freeze_labels(PARAMS, [WTE, pattern])
        with pytest.raises(ValueError, match="nothing to freeze"):
            optimizer(CONFIG, [pattern]).init(PARAMS)


def test_parameter_that_no_decay_rule_covers_is_an_error():
    stranger = PARAMS | {"block_0": PARAMS["block_0"] | {"gate": normal(4)}}
    with pytest.raises(ValueError, match="no rule covers parameter 'block_0/gate'"):
        optimizer(CONFIG).init(stranger)


def test_labels_freeze_whole_paths_only():
    labels = freeze_labels(PARAMS, [r"embed/.*/scale_(up|down)"])
    frozen = [
        path_of(path)
        for path, label in jax.tree_util.tree_leaves_with_path(labels)
        if label == FROZEN
    ]
    assert sorted(frozen) == ["embed/band_0/scale_down", "embed/band_0/scale_up"]
    assert set(jax.tree.leaves(labels)) == {FROZEN, TRAINED}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_table_is_one_leaf_with_one_pair_of_moments(tied):
    config = GPTConfig(
        vocab_size=11,
        vocab_multiple=1,
        block_size=4,
        n_layer=1,
        n_head=1,
        n_embd=6,
        n_embd_wte=3,
        n_embd_wte_scale_tying=tied,
    )
    shapes = jax.eval_shape(
        GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    leaves = jax.tree.leaves(shapes)
    assert [leaf.shape for leaf in leaves].count((11, 3)) == 1
    assert [leaf.shape for leaf in leaves].count((3, 6)) == (1 if tied else 2)
    state = jax.eval_shape(optimizer(CONFIG).init, shapes)
    shapes_held = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert shapes_held.count((11, 3)) == 2
    assert not any(leaf.shape == (3, 11) for leaf in leaves)
