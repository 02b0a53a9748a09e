"""The loss of learning another model's predictions.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, E width of the
teacher.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pcagpt.losses.chunks import sum_of_chunks
from pcagpt.losses.logits import (
    Head,
    band_logits,
    divergence,
    negative_log_likelihood,
    tables_and_sizes,
)


class Distillation(NamedTuple):
    """Sums over the targets, in nats; only `loss` can be differentiated.

    loss: (1 - share) * cross_entropy + share * kl.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    kl: jax.Array


def distillation(
    h_ND,
    head: Head,
    targets_N,
    teacher_h_NE,
    teacher_tables: Sequence[jax.Array],
    *,
    share: float = 1.0,
    logits_dtype=jnp.float32,
    chunks: int = 1,
) -> Distillation:
    """Divergence from a teacher's predictions, mixed with the cross entropy.

    Knowledge distillation (Hinton et al. 2015) at temperature 1: KL(teacher || model)
    over the whole vocabulary at every token that has a target. Differentiable in h_ND
    and the head, and made chunk by chunk, as `cross_entropy` is.

    Args:
      h_ND: final hidden state of the model that learns, in the compute dtype.
      head: its bands.
      targets_N: as for `token_losses`.
      teacher_h_NE: the teacher's final hidden state, of its own width E.
      teacher_tables: for each band of the head, the teacher's output rows [V, E] of the
        same tokens in the same order, with as many rows of padding.
      share: of the divergence in the loss.
      logits_dtype: what logits of both are rounded to.
      chunks: as for `cross_entropy`.
    """
    tables, sizes = tables_and_sizes(head)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def sums(h_nD, tables, teacher_tables, targets_n, teacher_h_nE):
        logits = [band_logits(h_nD, *table, logits_dtype) for table in tables]
        teacher_logits = [
            band_logits(teacher_h_nE, table_VE, None, logits_dtype)
            for table_VE in teacher_tables
        ]
        likelihood = jnp.sum(negative_log_likelihood(logits, sizes, targets_n))
        divergence_n = divergence(logits, sizes, teacher_logits)
        kl = jnp.sum(jnp.where(targets_n >= 0, divergence_n, 0.0))
        loss = (1 - share) * likelihood + share * kl
        return loss, (likelihood, kl)

    loss, parts = sum_of_chunks(
        sums, chunks, h_ND, tables, tuple(teacher_tables), (targets_N, teacher_h_NE)
    )
    return Distillation(loss, *jax.lax.stop_gradient(parts))
