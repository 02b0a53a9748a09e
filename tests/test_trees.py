"""Parameter trees by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcagpt import trees
from pcagpt.errors import UserError

TREE = {
    "wpe": np.zeros((4, 3), np.float32),
    "block_0": {"mlp": {"fc": {"kernel": np.ones((3, 5)), "bias": np.zeros(5)}}},
    "block_1": {"mlp": {"fc": {"kernel": np.ones((3, 5)), "bias": np.zeros(5)}}},
}


def test_unflatten_is_the_inverse_of_flatten():
    flat = trees.flatten(TREE)
    assert set(flat) == {
        "wpe",
        *(f"block_{i}/mlp/fc/{name}" for i in (0, 1) for name in ("kernel", "bias")),
    }
    rebuilt = trees.unflatten(flat)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(TREE)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, rebuilt, TREE))


def test_first_matching_rule_wins():
    rules = [(r"block_0/.*", "a"), (r".*/kernel", "b"), (r".*", "c")]
    labels = trees.flatten(trees.label(TREE, rules))
    assert labels == {
        "wpe": "c",
        "block_0/mlp/fc/kernel": "a",
        "block_0/mlp/fc/bias": "a",
        "block_1/mlp/fc/kernel": "b",
        "block_1/mlp/fc/bias": "c",
    }


def test_pattern_must_match_the_whole_path():
    pattern = "kernel|block_0|block_0/.*/fc|wp"
    labels = trees.label(TREE, [(pattern, "hit"), (".*", "miss")])
    assert set(jax.tree.leaves(labels)) == {"miss"}


def test_uncovered_parameter_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'block_0/mlp/fc/bias'"):
        trees.label(TREE, [(r".*/kernel", 1), ("wpe", 2)])


def test_optimizer_states_have_the_path_of_their_parameter():
    state = optax.adam(1e-3).init(jax.tree.map(jnp.asarray, TREE))
    labels = trees.label(state, [(r"(.*/)?mu/.*fc/kernel", "mu"), (".*", "other")])
    assert jax.tree.leaves(labels).count("mu") == 2


def test_replace_puts_in_new_leaves_and_keeps_dtypes_and_the_rest():
    before = TREE["wpe"].copy()
    new = {"wpe": np.full((4, 3), 7, np.float64)}
    replaced = trees.replace(TREE, new, source="a file")
    assert replaced["wpe"].dtype == np.float32
    np.testing.assert_array_equal(replaced["wpe"], 7)
    assert (
        replaced["block_1"]["mlp"]["fc"]["kernel"]
        is trees.flatten(TREE)["block_1/mlp/fc/kernel"]
    )
    np.testing.assert_array_equal(TREE["wpe"], before)


def test_replace_refuses_a_path_that_the_model_lacks():
    with pytest.raises(UserError, match="a file holds 'block_2/x', which") as error:
        trees.replace(TREE, {"block_2/x": np.zeros(3)}, source="a file")
    assert "\n" not in str(error.value)


def test_replace_refuses_another_shape_and_names_both():
    with pytest.raises(UserError, match=r"a file: 'wpe' .* \(8, 3\).* \(4, 3\)"):
        trees.replace(TREE, {"wpe": np.zeros((8, 3))}, source="a file")
    # A shape that would broadcast is another shape, too.
    with pytest.raises(UserError, match=r"\(1, 3\)"):
        trees.replace(TREE, {"wpe": np.zeros((1, 3))}, source="a file")
