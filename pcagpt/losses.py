"""Token losses straight from the hidden state, without a full [N, V] of logits.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank.
A head is a sequence of bands (wte [V, K], scale_down [K, D] or None, real rows).
"""

import functools
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
    normalisers, target_logit_N = [], jnp.zeros(h_ND.shape[0], jnp.float32)
    start = 0
    for wte_VK, scale_down_KD, size in head:
        z_NK = h_ND
        if scale_down_KD is not None:
            z_NK = h_ND @ scale_down_KD.astype(h_ND.dtype).T
        logits_NV = jax.lax.dot_general(
            z_NK,
            wte_VK.astype(h_ND.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=logits_dtype,
        ).astype(jnp.float32)
        column_V = jax.lax.broadcasted_iota(jnp.int32, (1, wte_VK.shape[0]), 1)
        if size < wte_VK.shape[0]:
            logits_NV = jnp.where(column_V < size, logits_NV, -jnp.inf)
        normalisers.append(jax.nn.logsumexp(logits_NV, axis=-1))
        # Comparing with a column index fuses into the reduction; a gather's gradient
        # would be a scatter into [N, V]. Other bands' targets match no column.
        local_N1 = (targets_N - start)[:, None]
        is_target_NV = (column_V == local_N1) & (local_N1 < size)
        target_logit_N += jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
        start += size
    normaliser_N = jax.nn.logsumexp(jnp.stack(normalisers), axis=0)
    return jnp.where(targets_N >= 0, normaliser_N - target_logit_N, 0.0)


def scan_chunks(function, carry, chunks: int, *arrays_N):
    """`jax.lax.scan` of `function` over equal chunks of the arrays' leading axis.

    Each chunk takes every `chunks`-th row, so that a leading axis sharded over devices
    stays where it is. `chunks` is lowered to the nearest divisor of N.

    Args:
      function: (carry, arrays of one chunk) -> (carry, outputs with leading axis n).
      carry: what is handed from chunk to chunk.
      chunks: how many, at the most.
      *arrays_N: arrays of leading axis N.

    Returns:
      The last carry, and the outputs with leading axis N, in the order of the input.
    """
    count = arrays_N[0].shape[0]
    chunks = max(c for c in range(1, min(chunks, count) + 1) if count % c == 0)
    if chunks == 1:
        return function(carry, arrays_N)

    def split(array):
        return array.reshape(-1, chunks, *array.shape[1:]).swapaxes(0, 1)

    def join(array):
        return array.swapaxes(0, 1).reshape(count, *array.shape[2:])

    carry, outputs = jax.lax.scan(function, carry, tuple(map(split, arrays_N)))
    return carry, jax.tree.map(join, outputs)


def cross_entropy(
    h_ND, head: Head, targets_N, *, logits_dtype=jnp.float32, chunks: int = 1
) -> jax.Array:
    """Sum of the negative log-likelihoods of the targets in nats, a float32 scalar.

    Differentiable in h_ND and the head. The gradients are made in the forward pass,
    chunk by chunk, so that only one chunk's [N/chunks, V] logits exist at a time and
    none is computed twice. Arguments as for `token_losses`.
    """
    tables = tuple((wte_VK, scale_down_KD) for wte_VK, scale_down_KD, _ in head)
    sizes = tuple(size for _, _, size in head)
    return _cross_entropy(h_ND, tables, targets_N, sizes, logits_dtype, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(h_ND, tables, targets_N, sizes, logits_dtype, chunks):
    def chunk(total, inputs):
        loss = _loss_sum(inputs[0], tables, inputs[1], sizes, logits_dtype)
        return total + loss, None

    return scan_chunks(chunk, jnp.float32(0), chunks, h_ND, targets_N)[0]


def _loss_sum(h_ND, tables, targets_N, sizes, logits_dtype):
    head = [(*table, size) for table, size in zip(tables, sizes, strict=True)]
    return jnp.sum(token_losses(h_ND, head, targets_N, logits_dtype))


def _cross_entropy_forward(h_ND, tables, targets_N, sizes, logits_dtype, chunks):
    def chunk(total, inputs):
        h_nD, targets_n = inputs
        loss, (gradient_h_nD, gradient_tables) = jax.value_and_grad(
            _loss_sum, argnums=(0, 1)
        )(h_nD, tables, targets_n, sizes, logits_dtype)
        return jax.tree.map(jnp.add, total, (loss, gradient_tables)), gradient_h_nD

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, tables))
    (loss, gradient_tables), gradient_h_ND = scan_chunks(
        chunk, zero, chunks, h_ND, targets_N
    )
    return loss, (gradient_h_ND, gradient_tables)


def _cross_entropy_backward(sizes, logits_dtype, chunks, gradients, cotangent):
    gradient_h_ND, gradient_tables = jax.tree.map(
        lambda g: (g * cotangent).astype(g.dtype), gradients
    )
    return gradient_h_ND, gradient_tables, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
