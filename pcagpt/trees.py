"""Parameter trees by path: patterns to labels, counts, strict replacement."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from pcagpt.errors import UserError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {'block_0/ln_1/scale': leaf}, in the tree's own order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'block_0/ln_1/scale': leaf} -> nested dict; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def label(tree: Any, rules: Sequence[tuple[str, Any]]) -> Any:
    """The tree with each leaf replaced by the label of the first matching rule.

    A rule is (pattern, label); the pattern must match the leaf's whole path, as in
    'block_0/mlp/fc/kernel'. Works on any pytree, optimizer states included, where the
    path holds the names of the containers too ('0/mu/block_0/...').

    Raises:
      ValueError: a leaf that no rule covers.
    """

    def first_match(key_path, _):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        for pattern, value in rules:
            if re.fullmatch(pattern, path):
                return value
        raise ValueError(f"no rule covers parameter {path!r}")

    return jax.tree_util.tree_map_with_path(first_match, tree)


def count(tree: Any) -> int:
    """Number of stored values in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def replace(
    tree: Mapping[str, Any], new: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """The tree with the leaves at the paths of `new` replaced, dtypes kept.

    Args:
      tree: nested dict of arrays, or of `jax.ShapeDtypeStruct`.
      new: {path: array} of the leaves to put in.
      source: where `new` comes from, for the error message.

    Raises:
      UserError: a path the tree lacks, or an array of another shape.
    """
    flat = flatten(tree)
    for path, array in new.items():
        if path not in flat:
            raise UserError(
                f"{source} holds '{path}', which this model does not have: the two "
                "models differ in model.n_layer, model.bias or their bands"
            )
        if flat[path].shape != array.shape:
            raise UserError(
                f"{source}: '{path}' has shape {tuple(array.shape)}, this model needs "
                f"{tuple(flat[path].shape)}: give both models the same model.* sizes"
            )
        flat[path] = array.astype(flat[path].dtype)
    return unflatten(flat)
