"""Learning-rate schedules, decay on matrices only, and freezing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pcagpt import trees
from pcagpt.config.schema import TrainSettings
from pcagpt.sharding.inside import device_count

FROZEN, TRAINED = "frozen", "trained"

# Weight decay applies to matrices and tables, not to biases and norms.
DECAY_RULES = (
    (r".*/(kernel|wte|scale_up|scale_down)", True),
    (r"wpe", True),
    (r".*/(bias|scale)", False),
)


def learning_rate_schedule(train: TrainSettings) -> optax.Schedule:
    """Update number (from 0) -> learning rate.

    The warm-up is linear, over n = min(warmup_steps, steps - 1) updates; the first uses
    peak / n. Linear and cosine schedules reach the
    final share at the last update. A run that is shorter than its warm-up ends at the
    peak.
    """
    peak = train.learning_rate
    warmup = min(train.warmup_steps, train.steps - 1)
    final = peak * train.final_learning_rate_share
    decay_steps = max(train.steps - 1 - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "cosine": optax.cosine_decay_schedule(
            peak, decay_steps, alpha=train.final_learning_rate_share
        ),
    }[train.schedule]
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def freeze_labels(params, frozen_patterns: Sequence[str]):
    """'frozen' or 'trained' for each leaf; ValueError if a pattern matches no leaf."""
    rules = [(pattern, FROZEN) for pattern in frozen_patterns]
    labels = trees.label(params, [*rules, (".*", TRAINED)])
    for pattern in frozen_patterns:
        hits = trees.label(params, [(pattern, True), (".*", False)])
        if not any(jax.tree.leaves(hits)):
            raise ValueError(f"nothing to freeze: no parameter matches {pattern!r}")
    return labels


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, and what a step needs to know of it.

    schedule: its learning rate; frozen: path patterns of parameters it does not train.
    """

    init: Callable[[Any], Any]
    update: Callable[..., Any]
    schedule: optax.Schedule
    frozen: tuple[str, ...] = ()


def optimizer(train: TrainSettings, frozen: tuple[str, ...] = ()) -> Optimizer:
    """AdamW for the trained parameters; frozen ones have no update and no moments.

    Only the branch of the trained parameters has clipping and decay, so that the norm
    contains no gradients of frozen parameters, and frozen parameters do not decay.
    """
    schedule = learning_rate_schedule(train)
    adamw = optax.adamw(
        schedule,
        b1=train.beta1,
        b2=train.beta2,
        weight_decay=train.weight_decay,
        mask=lambda params: trees.label(params, DECAY_RULES),
    )
    if train.gradient_clip:
        clip = functools.partial(_clip, most=train.gradient_clip)
        adamw = optax.chain(optax.stateless(clip), adamw)
    partly = optax.multi_transform(
        {TRAINED: adamw, FROZEN: optax.set_to_zero()},
        lambda params: freeze_labels(params, frozen),
    )
    return Optimizer(*partly, schedule, frozen)


def global_norm(gradients) -> jax.Array:
    """The Euclidean norm of all gradients together, a float32 scalar."""
    if device_count() > 1:  # The devices would exchange the sums of rows.
        return optax.tree.norm(gradients)
    # One sum for each row, and one of all of these: a GPU then starts one kernel for
    # each matrix and no kernel for each vector.
    squares = map(jnp.square, jax.tree.leaves(gradients))
    sums = [jnp.sum(s, axis=-1).ravel() if s.ndim > 1 else s.ravel() for s in squares]
    # Without the barrier, XLA would compute one sum for each part again.
    joined = jax.lax.optimization_barrier(jnp.concatenate(sums))
    return jnp.sqrt(jnp.sum(joined))


def _clip(gradients, _=None, *, most: float):
    """The gradients, shortened together to a norm of at most `most`."""
    norm = global_norm(gradients)
    return jax.tree.map(
        lambda g: jnp.where(norm < most, g, (g / norm.astype(g.dtype)) * most),
        gradients,
    )


def stop_frozen_gradients(params, frozen_patterns: Sequence[str]):
    """The parameters; frozen leaves have no gradient and no backward pass."""
    return jax.tree.map(
        lambda leaf, name: jax.lax.stop_gradient(leaf) if name == FROZEN else leaf,
        params,
        freeze_labels(params, frozen_patterns),
    )
