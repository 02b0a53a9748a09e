"""The state of training and the pure step that advances it.

Shape letters: A parts of a batch, B windows of a part, T sequence, N = B*T, D width,
V rows of a band or of the vocabulary, E width of a teacher.
"""

import dataclasses
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


@flax.struct.dataclass
class Teacher:
    """A trained model whose predictions are learnt; a step only reads it.

    variables: what `model.apply` takes; head: its output rows at full width, cut into
    the bands of the student, as `losses.distillation` takes them.
    """

    model: GPT = flax.struct.field(pytree_node=False)
    variables: Any
    head: Head

    @classmethod
    def laid_out(
        cls,
        model: GPT,
        variables: dict,
        bands: Sequence[BandSpec],
        position_of_token_V: np.ndarray,
    ) -> "Teacher":
        """On the host, for a model of these bands and this token order.

        Every row is brought to full width, so that one product gives all logits.
        """
        rows = []
        for band in model.apply(variables, method="head"):
            row_VK, scale_KE = band.wte[: band.size], band.scale_down
            rows.append(row_VK if scale_KE is None else row_VK @ scale_KE)
        columns_V = model.apply(
            variables, np.argsort(position_of_token_V), method="renumber"
        )
        rows_VE = np.concatenate(rows)[np.asarray(columns_V)]
        head = tuple(
            HeadBand(
                np.pad(rows_VE[start : start + size], ((0, padding), (0, 0))),
                scale_down=None,
                size=size,
            )
            for start, size, padding, _ in bands
        )
        return cls(model, variables, head)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the compiled step depends on besides model and optimizer.

    distill_share: of a teacher's divergence in the loss, if there is a teacher.
    """

    seed: int
    frozen: tuple[str, ...] = ()
    loss_chunks: int = 1
    distill_share: float = 1.0


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
    teacher: Teacher | None = None,
    *,
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update on a batch of windows of T + 1 tokens, int32 [A, B, T + 1].

    Returns the new state and, as float32 scalars, the mean loss in nats per token, the
    gradient norm before clipping over what trains, and the learning rate; with a
    teacher also the cross entropy and the divergence that make up the loss.
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
        head = model.apply(variables, method="head")
        positions_N = model.apply(variables, targets_N, method="renumber")
        precision = {"logits_dtype": logits_dtype, "chunks": settings.loss_chunks}
        if teacher is None:
            kernels = model.config.kernels
            loss = cross_entropy(h_ND, head, positions_N, kernels=kernels, **precision)
            losses = {"loss": loss}
        else:
            losses = distillation(
                h_ND,
                head,
                positions_N,
                teacher.model.apply(
                    teacher.variables, tokens_BT[:, :-1], method="hidden"
                ),
                teacher.head,
                share=settings.distill_share,
                **precision,
            )
        losses = {name: value / targets_N.size for name, value in losses.items()}
        return losses["loss"], losses

    def part_gradients(part):
        tokens_BT, index = part
        key = jax.random.fold_in(dropout_key, index)
        gradients, losses = jax.grad(part_loss, has_aux=True)(
            state.params, tokens_BT, key
        )
        return losses, gradients

    parts = batch_ABT.shape[0]
    if parts == 1:
        losses, gradients = part_gradients((batch_ABT[0], 0))
    else:
        zeros = jax.tree.map(
            jnp.zeros_like, jax.eval_shape(part_gradients, (batch_ABT[0], 0))
        )
        total, _ = jax.lax.scan(
            lambda sum_, part: (
                jax.tree.map(jnp.add, sum_, part_gradients(part)),
                None,
            ),
            zeros,
            (batch_ABT, jnp.arange(parts)),
        )
        losses, gradients = jax.tree.map(lambda value: value / parts, total)

    updates, optimizer_state = optimizer.update(
        gradients, state.optimizer, state.params
    )
    metrics = {
        **losses,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.float32(schedule(state.step)),
    }
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
    )
    return new_state, metrics
