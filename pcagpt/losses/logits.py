"""Losses computed from the logits of the output head by band.

Shape letters: N tokens, V rows of a band, D width, K rank.
"""

import jax
import jax.numpy as jnp

from pcagpt.model import Head, head_logits


def token_losses(h_ND, head: Head, targets_N, logits_dtype=jnp.float32) -> jax.Array:
    """Negative log-likelihood of each target, in nats: [N] float32.

    Args:
      h_ND: output of ln_f, in the compute dtype.
      head: the bands of the output head; padding rows get no probability.
      targets_N: int32, the column of the target in the concatenated bands; negative
        for no target, which gives a loss of 0.
      logits_dtype: dtype of the logits; all reductions are in float32.
    """
    logits = head_logits(h_ND, head, logits_dtype)
    return negative_log_likelihood(logits, head, targets_N)


def _columns(logits_NV) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, logits_NV.shape[1]), 1)


def _normaliser(logits, head: Head) -> jax.Array:
    """Log-sum-exp over the real columns of all bands: [N]."""
    normalisers = []
    for logits_NV, band in zip(logits, head, strict=True):
        if band.size < logits_NV.shape[1]:
            logits_NV = jnp.where(_columns(logits_NV) < band.size, logits_NV, -jnp.inf)
        normalisers.append(jax.nn.logsumexp(logits_NV, axis=-1))
    return jax.nn.logsumexp(jnp.stack(normalisers), axis=0)


def negative_log_likelihood(logits, head: Head, targets_N) -> jax.Array:
    """Negative log-likelihood of each target, 0 for no target: [N] float32."""
    target_logit_N = jnp.zeros(targets_N.shape, jnp.float32)
    for logits_NV, band in zip(logits, head, strict=True):
        # XLA fuses this comparison into the reduction. The gradient of a gather would
        # be a scatter into [N, V]. Targets of other bands match no column.
        local_N1 = (targets_N - band.start)[:, None]
        is_target_NV = (_columns(logits_NV) == local_N1) & (local_N1 < band.size)
        target_logit_N += jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
    return jnp.where(targets_N >= 0, _normaliser(logits, head) - target_logit_N, 0.0)


def divergence(logits, teacher_logits, head: Head) -> jax.Array:
    """KL(teacher || model) of each token over all bands: [N] float32."""
    normaliser_N = _normaliser(logits, head)
    teacher_normaliser_N = _normaliser(teacher_logits, head)
    divergence_N = normaliser_N - teacher_normaliser_N
    for logits_NV, teacher_NV, band in zip(logits, teacher_logits, head, strict=True):
        p_NV = jnp.exp(teacher_NV - teacher_normaliser_N[:, None])
        term_NV = p_NV * (teacher_NV - logits_NV)
        if band.size < logits_NV.shape[1]:
            term_NV = jnp.where(_columns(logits_NV) < band.size, term_NV, 0.0)
        divergence_N += jnp.sum(term_NV, axis=-1)
    return divergence_N
