"""Parameter trees: flatten to paths, label by path patterns, replace leaves."""

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
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def label(tree: Any, rules: Sequence[tuple[str, Any]]) -> Any:
    """Replaces each leaf by the label of the first rule that matches its path.

    Args:
      tree: any pytree. In an optimizer state the path starts with the names of the
        containers: '0/mu/block_0/...'.
      rules: (pattern, label); a pattern must match the whole path, such as
        'block_0/mlp/fc/kernel'.

    Raises:
      ValueError: no rule matches a leaf.
    """

    def first_match(key_path, _):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        for pattern, value in rules:
            if re.fullmatch(pattern, path):
                return value
        raise ValueError(f"no rule covers parameter {path!r}")

    return jax.tree_util.tree_map_with_path(first_match, tree)


def replace(
    tree: Mapping[str, Any], new: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """The tree with the arrays of `new` ({path: array}), cast to its own dtypes.

    The leaves of `tree` may be `jax.ShapeDtypeStruct`. `source` names the origin of
    `new` in error messages.

    Raises:
      UserError: the tree lacks a path, or its leaf has another shape.
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
                f"{source}: '{path}' has shape {tuple(array.shape)}, but this model "
                f"needs {tuple(flat[path].shape)}: give both models the same model.* "
                "sizes"
            )
        flat[path] = array.astype(flat[path].dtype)
    return unflatten(flat)
