"""Logits of a head in bands, and what is read from them.

Shape letters: N tokens, V rows of a band, D width, K rank.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Head = Sequence[tuple[jax.Array, jax.Array | None, int]]


def token_losses(h_ND, head: Head, targets_N, logits_dtype=jnp.float32) -> jax.Array:
    """Negative log-likelihood of each target, in nats: [N] float32.

    Args:
      h_ND: final hidden state, in the compute dtype.
      head: the bands; padding rows beyond a band's real rows get no probability.
      targets_N: int32 column of the concatenated bands; negative means no target and
        a loss of 0.
      logits_dtype: what logits are rounded to; reductions are in float32 always.
    """
    found = [band_logits(h_ND, wte, down, logits_dtype) for wte, down, _ in head]
    return negative_log_likelihood(found, [size for *_, size in head], targets_N)


def project(h_ND: jax.Array, scale_down_KD: jax.Array | None) -> jax.Array:
    """What a band's table is multiplied with, [N, K]: h itself at full width."""
    if scale_down_KD is None:
        return h_ND
    return h_ND @ scale_down_KD.astype(h_ND.dtype).T


def band_logits(h_ND, wte_VK, scale_down_KD, logits_dtype) -> jax.Array:
    """Logits of one band, padding columns included: [N, V] float32."""
    z_NK = project(h_ND, scale_down_KD)
    return jax.lax.dot_general(
        z_NK,
        wte_VK.astype(h_ND.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=logits_dtype,
    ).astype(jnp.float32)


def _columns(logits_NV) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, logits_NV.shape[1]), 1)


def _normaliser(logits, sizes) -> jax.Array:
    """Logarithm of the sum of exponentials over the real columns of all bands: [N]."""
    normalisers = []
    for logits_NV, size in zip(logits, sizes, strict=True):
        if size < logits_NV.shape[1]:
            logits_NV = jnp.where(_columns(logits_NV) < size, logits_NV, -jnp.inf)
        normalisers.append(jax.nn.logsumexp(logits_NV, axis=-1))
    return jax.nn.logsumexp(jnp.stack(normalisers), axis=0)


def negative_log_likelihood(logits, sizes, targets_N) -> jax.Array:
    """Of each target, 0 where there is none: [N] float32."""
    target_logit_N, start = jnp.zeros(targets_N.shape, jnp.float32), 0
    for logits_NV, size in zip(logits, sizes, strict=True):
        # Comparing with a column index fuses into the reduction; a gather's gradient
        # would be a scatter into [N, V]. Other bands' targets match no column.
        local_N1 = (targets_N - start)[:, None]
        is_target_NV = (_columns(logits_NV) == local_N1) & (local_N1 < size)
        target_logit_N += jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
        start += size
    return jnp.where(targets_N >= 0, _normaliser(logits, sizes) - target_logit_N, 0.0)


def divergence(logits, sizes, teacher_logits) -> jax.Array:
    """Of the bands' distribution from the teacher's, KL(teacher || model): [N]."""
    normaliser_N = _normaliser(logits, sizes)
    teacher_normaliser_N = _normaliser(teacher_logits, sizes)
    divergence_N = normaliser_N - teacher_normaliser_N
    for logits_NV, size, teacher_NV in zip(logits, sizes, teacher_logits, strict=True):
        p_NV = jnp.exp(teacher_NV - teacher_normaliser_N[:, None])
        term_NV = p_NV * (teacher_NV - logits_NV)
        if size < logits_NV.shape[1]:
            term_NV = jnp.where(_columns(logits_NV) < size, term_NV, 0.0)
        divergence_N += jnp.sum(term_NV, axis=-1)
    return divergence_N


def tables_and_sizes(head: Head):
    """((wte, scale_down), ...) and (real rows, ...) of the bands."""
    tables = tuple((wte_VK, scale_down_KD) for wte_VK, scale_down_KD, _ in head)
    return tables, tuple(size for _, _, size in head)
