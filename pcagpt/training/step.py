"""The state of training and the pure step that advances it.

Shape letters: A parts of a batch, B windows of a part, T sequence, N = B*T, D width,
V rows of a band or of the vocabulary, E width of a teacher.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pcagpt.losses import cross_entropy, distillation
from pcagpt.model import GPT, BandSpec, Head, HeadBand
from pcagpt.training import optim


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and the constants that the model reads."""

    step: jax.Array
    params: Any
    constants: Any
    optimizer: Any

    @property
    def variables(self) -> dict:
        """The variables for `GPT.apply`."""
        return {"params": self.params, "constants": self.constants}

    @property
    def checkpoint_items(self) -> dict[str, dict]:
        """The items of a checkpoint."""
        optimizer = {"state": self.optimizer, "step": self.step}
        return {"weights": self.variables, "optimizer": optimizer}

    @classmethod
    def from_checkpoint(cls, weights: dict, optimizer: dict) -> "TrainState":
        """The inverse of `checkpoint_items`."""
        return cls(step=optimizer["step"], optimizer=optimizer["state"], **weights)


@flax.struct.dataclass
class Teacher:
    """A trained model to distill from; a step only reads it.

    variables: those for `model.apply`; head: its token table at full width, cut into
    the bands of the student, for `losses.distillation`.
    """

    model: GPT = flax.struct.field(pytree_node=False)
    variables: Any
    head: Head

    @classmethod
    def aligned(
        cls,
        model: GPT,
        variables: dict,
        bands: Sequence[BandSpec],
        order_V: np.ndarray,
    ) -> "Teacher":
        """A teacher with its rows in the bands and the order of a student; host arrays.

        `order_V` is the token at each column of the student. Factorized rows are
        multiplied out, so that one product gives all logits.
        """
        rows = []
        for band in model.apply(variables, method="head"):
            row_VK, scale_KE = band.rows(np.arange(band.size)), band.scale_down
            rows.append(row_VK if scale_KE is None else row_VK @ scale_KE)
        columns_V = model.apply(variables, order_V, method="renumber")
        rows_VE = np.concatenate(rows)[np.asarray(columns_V)]
        head = tuple(
            HeadBand(
                np.pad(
                    rows_VE[band.start : band.start + band.size],
                    ((0, band.padding), (0, 0)),
                ),
                scale_down=None,
                start=band.start,
                size=band.size,
            )
            for band in bands
        )
        return cls(model, variables, head)


def named_key(seed: int, name: str) -> jax.Array:
    """An independent random key for each purpose: 'init' or 'dropout'.

    The first four letters of a purpose must be its own.
    """
    # Python's own hash differs between processes, so it cannot be used here.
    number = int.from_bytes(name.encode()[:4], "little")
    return jax.random.fold_in(jax.random.key(seed), number)


def initial_state(model: GPT, optimizer: optim.Optimizer, seed: int) -> TrainState:
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
    teacher: Teacher | None = None,
    *,
    model: GPT,
    optimizer: optim.Optimizer,
    seed: int,
    loss_chunks: int = 1,
    distill_share: float = 1.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update with the mean gradient of all parts of a batch.

    Args:
      state: at any step.
      batch_ABT: windows of T + 1 tokens, int32 [A, B, T + 1]. The parts are computed
        in sequence, to save memory.
      teacher: the model to distill from, or None.
      model: the model that is trained.
      optimizer: parameters that it freezes have no backward pass.
      seed: for dropout.
      loss_chunks: the logits of a part are computed in at most this many chunks.
      distill_share: weight of the teacher's divergence; the rest is the cross entropy.

    Returns:
      (new state, metrics). The metrics are float32 scalars: 'loss' in nats per token,
      'gradient_norm' of the trained parameters before clipping, and 'learning_rate'.
      With a teacher, also 'cross_entropy' and 'kl', the two parts of the loss.
    """
    dropout_key = jax.random.fold_in(named_key(seed, "dropout"), state.step)

    @functools.partial(jax.grad, has_aux=True)
    def gradients_of(params, tokens_BT, index):
        """(gradients, losses by name) of a part; each part has its own dropout."""
        params = optim.stop_frozen_gradients(params, optimizer.frozen)
        variables = {"params": params, "constants": state.constants}
        key = jax.random.fold_in(dropout_key, index)
        losses = part_losses(
            variables, tokens_BT, key, teacher, model, loss_chunks, distill_share
        )
        return losses["loss"], losses

    parts = batch_ABT.shape[0]
    if parts == 1:
        gradients, losses = gradients_of(state.params, batch_ABT[0], 0)
    else:

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, gradients_of(state.params, *part)), None

        shapes = jax.eval_shape(gradients_of, state.params, batch_ABT[0], 0)
        zeros = jax.tree.map(jnp.zeros_like, shapes)
        total, _ = jax.lax.scan(add_part, zeros, (batch_ABT, jnp.arange(parts)))
        gradients, losses = jax.tree.map(lambda value: value / parts, total)

    updates, optimizer_state = optimizer.update(
        gradients, state.optimizer, state.params
    )
    metrics = {
        **losses,
        "gradient_norm": optim.global_norm(gradients),
        "learning_rate": jnp.float32(optimizer.schedule(state.step)),
    }
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
    )
    return new_state, metrics


def part_losses(
    variables: dict,
    tokens_BT: jax.Array,
    dropout_key: jax.Array,
    teacher: Teacher | None,
    model: GPT,
    loss_chunks: int,
    distill_share: float,
) -> dict[str, jax.Array]:
    """Mean losses per token of windows [B, T + 1], by name; 'loss' is minimised.

    Arguments are as for `train_step`.
    """
    inputs_BT = tokens_BT[:, :-1]
    h_ND = model.apply(
        variables,
        inputs_BT,
        deterministic=model.config.dropout == 0,
        method="hidden",
        rngs={"dropout": dropout_key},
    )
    targets_N = tokens_BT[:, 1:].reshape(-1)
    head = model.apply(variables, method="head")
    # Bands renumber the tokens, so the columns of the targets are not their ids.
    columns_N = model.apply(variables, targets_N, method="renumber")
    logits_dtype = jnp.dtype(model.config.compute_dtype)
    precision = {"logits_dtype": logits_dtype, "chunks": loss_chunks}
    if teacher is None:
        kernels = model.config.kernels
        loss = cross_entropy(h_ND, head, columns_N, kernels=kernels, **precision)
        losses = {"loss": loss}
    else:
        taught_NE = teacher.model.apply(teacher.variables, inputs_BT, method="hidden")
        losses = distillation(
            h_ND,
            head,
            columns_N,
            taught_NE,
            teacher.head,
            share=distill_share,
            **precision,
        )
    return {name: value / targets_N.size for name, value in losses.items()}
