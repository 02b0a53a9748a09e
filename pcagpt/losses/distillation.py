"""The loss of learning another model's predictions.

Shape letters: N tokens, n tokens of a chunk, D width, E width of the teacher.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.losses.chunks import sum_of_chunks
from pcagpt.losses.logits import band_logits, divergence, negative_log_likelihood
from pcagpt.model import Head


def distillation(
    h_ND,
    head: Head,
    targets_N,
    teacher_h_NE,
    teacher_head: Head,
    *,
    share: float = 1.0,
    logits_dtype=jnp.float32,
    chunks: int = 1,
) -> dict[str, jax.Array]:
    """Divergence from a teacher's predictions, mixed with the cross entropy.

    Knowledge distillation (Hinton et al. 2015) at temperature 1: KL(teacher || model)
    over the whole vocabulary, summed over the tokens that have a target.
    Differentiable in h_ND and the head.

    Args:
      h_ND: final hidden state of the student, in the compute dtype.
      head: the student's output head.
      targets_N: as for `token_losses`.
      teacher_h_NE: final hidden state of the teacher, of its own width E.
      teacher_head: the teacher's output head, with the same tokens in the same order
        and as many padding rows as the student's.
      share: weight of the divergence in the loss.
      logits_dtype: dtype of both models' logits.
      chunks: as for `cross_entropy`.

    Returns:
      Sums over the targets in nats: 'cross_entropy', 'kl', and 'loss' =
      (1 - share) * cross_entropy + share * kl. Only 'loss' can be differentiated.
    """

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def sums(h_nD, head, teacher_head, targets_n, teacher_h_nE):
        logits = [band_logits(h_nD, band, logits_dtype) for band in head]
        teacher_logits = [
            band_logits(teacher_h_nE, band, logits_dtype) for band in teacher_head
        ]
        likelihood = jnp.sum(negative_log_likelihood(logits, head, targets_n))
        divergence_n = divergence(logits, teacher_logits, head)
        kl = jnp.sum(jnp.where(targets_n >= 0, divergence_n, 0.0))
        loss = (1 - share) * likelihood + share * kl
        return loss, {"cross_entropy": likelihood, "kl": kl}

    loss, parts = sum_of_chunks(
        sums, chunks, h_ND, head, teacher_head, (targets_N, teacher_h_NE)
    )
    return {"loss": loss} | jax.lax.stop_gradient(parts)
