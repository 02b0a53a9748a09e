"""The state of training and the pure step that advances it.

Shape letters: A parts of a batch, B windows of a part, T sequence, N = B*T, D width.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from pcagpt import optim
from pcagpt.losses import cross_entropy
from pcagpt.model import GPT


@flax.struct.dataclass
class TrainState:
    """Everything a step changes, and the constants the model reads."""

    step: jax.Array
    params: Any
    constants: Any
    optimizer: Any

    @property
    def variables(self) -> dict:
        """What `GPT.apply` takes, and the `weights` item of a checkpoint."""
        return {"params": self.params, "constants": self.constants}

    @property
    def optimizer_item(self) -> dict:
        """The `optimizer` item of a checkpoint."""
        return {"state": self.optimizer, "step": self.step}

    @classmethod
    def from_items(cls, variables: dict, optimizer_item: dict) -> "TrainState":
        """The inverse of `variables` and `optimizer_item`."""
        return cls(
            step=optimizer_item["step"],
            params=variables["params"],
            constants=variables["constants"],
            optimizer=optimizer_item["state"],
        )


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the compiled step depends on besides model and optimizer."""

    seed: int
    frozen: tuple[str, ...] = ()
    loss_chunks: int = 1


def named_key(seed: int, name: str) -> jax.Array:
    """An independent random key for each purpose ('init', 'dropout')."""
    number = int.from_bytes(name.encode()[:4], "little")
    return jax.random.fold_in(jax.random.key(seed), number)


def initial_state(model: GPT, optimizer, seed: int) -> TrainState:
    """Random weights, zero moments, step 0."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    variables = model.init(named_key(seed, "init"), tokens_BT)
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        constants=variables.get("constants", {}),
        optimizer=optimizer.init(params),
    )


def train_step(
    state: TrainState,
    batch_ABT: jax.Array,
    *,
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update on a batch of windows of T + 1 tokens, int32 [A, B, T + 1].

    Returns the new state and, as float32 scalars, the mean loss in nats per token, the
    gradient norm before clipping over what trains, and the learning rate.
    """
    dropout_key = jax.random.fold_in(named_key(settings.seed, "dropout"), state.step)
    logits_dtype = jnp.dtype(model.config.compute_dtype)

    def part_loss(params, tokens_BT, key):
        params = optim.stop_frozen_gradients(params, settings.frozen)
        variables = {"params": params, "constants": state.constants}
        h_ND = model.apply(
            variables,
            tokens_BT[:, :-1],
            deterministic=model.config.dropout == 0,
            method="hidden",
            rngs={"dropout": key},
        )
        targets_N = tokens_BT[:, 1:].reshape(-1)
        loss = cross_entropy(
            h_ND,
            model.apply(variables, method="head"),
            model.apply(variables, targets_N, method="renumber"),
            logits_dtype=logits_dtype,
            chunks=settings.loss_chunks,
        )
        return loss / targets_N.size

    def part_gradients(part):
        tokens_BT, index = part
        key = jax.random.fold_in(dropout_key, index)
        return jax.value_and_grad(part_loss)(state.params, tokens_BT, key)

    parts = batch_ABT.shape[0]
    if parts == 1:
        loss, gradients = part_gradients((batch_ABT[0], 0))
    else:
        total, _ = jax.lax.scan(
            lambda sum_, part: (
                jax.tree.map(jnp.add, sum_, part_gradients(part)),
                None,
            ),
            (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)),
            (batch_ABT, jnp.arange(parts)),
        )
        loss, gradients = jax.tree.map(lambda value: value / parts, total)

    updates, optimizer_state = optimizer.update(
        gradients, state.optimizer, state.params
    )
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.float32(schedule(state.step)),
    }
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
    )
    return new_state, metrics
