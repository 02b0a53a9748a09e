"""Knowledge distillation: the loss against another model's predictions.

Shape letters: N tokens, n tokens of a chunk, D width, E width of the teacher.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.losses.chunks import sum_of_chunks
from pcagpt.losses.logits import divergence, negative_log_likelihood
from pcagpt.model import Head, head_logits


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
    """Knowledge distillation (Hinton et al. 2015) at temperature 1.

    Args:
      h_ND: the student's output of ln_f, in the compute dtype.
      head: the student's output head.
      targets_N: as for `token_losses`.
      teacher_h_NE: the teacher's output of ln_f.
      teacher_head: the teacher's output head; its bands have the tokens and
        padding rows of the student's bands, in the same order.
      share: weight of the divergence in the loss.
      logits_dtype: dtype of both models' logits.
      chunks: as for `cross_entropy`.

    Returns:
      Sums in nats over the tokens with a target: 'cross_entropy', 'kl' = KL(teacher ||
      student), and 'loss' = (1 - share) * cross_entropy + share * kl. Only 'loss' can
      be differentiated, with respect to h_ND and the head.
    """

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def sums(h_nD, head, teacher_head, targets_n, teacher_h_nE):
        logits = head_logits(h_nD, head, logits_dtype)
        teacher_logits = head_logits(teacher_h_nE, teacher_head, logits_dtype)
        likelihood = jnp.sum(negative_log_likelihood(logits, head, targets_n))
        divergence_n = divergence(logits, teacher_logits, head)
        kl = jnp.sum(jnp.where(targets_n >= 0, divergence_n, 0.0))
        loss = (1 - share) * likelihood + share * kl
        return loss, {"cross_entropy": likelihood, "kl": kl}

    loss, parts = sum_of_chunks(
        sums, chunks, h_ND, head, teacher_head, (targets_N, teacher_h_NE)
    )
    return {"loss": loss} | jax.lax.stop_gradient(parts)
