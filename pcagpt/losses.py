"""Token losses straight from the hidden state, without a full [N, V] of logits.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank, E width
of a teacher.
A head is a sequence of bands (wte [V, K], scale_down [K, D] or None, real rows).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

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
    logits = [_logits(h_ND, wte, down, logits_dtype) for wte, down, _ in head]
    return _negative_log_likelihood(logits, [size for *_, size in head], targets_N)


def _logits(h_ND, wte_VK, scale_down_KD, logits_dtype) -> jax.Array:
    """Logits of one band, padding columns included: [N, V] float32."""
    z_NK = h_ND
    if scale_down_KD is not None:
        z_NK = h_ND @ scale_down_KD.astype(h_ND.dtype).T
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


def _negative_log_likelihood(logits, sizes, targets_N) -> jax.Array:
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


def _divergence(logits, sizes, teacher_logits) -> jax.Array:
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
    tables, sizes = _tables_and_sizes(head)

    def loss_sum(h_nD, tables, _, targets_n):
        head = [(*table, size) for table, size in zip(tables, sizes, strict=True)]
        return jnp.sum(token_losses(h_nD, head, targets_n, logits_dtype)), ()

    loss, _ = _sum_of_chunks(loss_sum, chunks, h_ND, tables, (), (targets_N,))
    return loss


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
    tables, sizes = _tables_and_sizes(head)

    def sums(h_nD, tables, teacher_tables, targets_n, teacher_h_nE):
        logits = [_logits(h_nD, *table, logits_dtype) for table in tables]
        teacher_logits = [
            _logits(teacher_h_nE, table_VE, None, logits_dtype)
            for table_VE in teacher_tables
        ]
        likelihood = jnp.sum(_negative_log_likelihood(logits, sizes, targets_n))
        divergence_n = _divergence(logits, sizes, teacher_logits)
        divergence = jnp.sum(jnp.where(targets_n >= 0, divergence_n, 0.0))
        loss = (1 - share) * likelihood + share * divergence
        return loss, (likelihood, divergence)

    loss, parts = _sum_of_chunks(
        sums, chunks, h_ND, tables, tuple(teacher_tables), (targets_N, teacher_h_NE)
    )
    return Distillation(loss, *jax.lax.stop_gradient(parts))


def _tables_and_sizes(head: Head):
    tables = tuple((wte_VK, scale_down_KD) for wte_VK, scale_down_KD, _ in head)
    return tables, tuple(size for _, _, size in head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_chunks(function, chunks, h_ND, tables, constants, arrays_N):
    """The chunks' values of `function`, summed; the first can be differentiated.

    Args:
      function: (h [n, D], tables, constants, *arrays of a chunk) -> a sum to be
        differentiated in h and the tables, and a tree of other sums.
      chunks: as for `scan_chunks`.
      h_ND: what is cut into chunks and has a gradient.
      tables: a tree of what has a gradient and is not cut.
      constants: a tree of what is neither cut nor has a gradient.
      arrays_N: what is cut and has no gradient.
    """

    def chunk(total, inputs):
        h_nD, *arrays_n = inputs
        sums = function(h_nD, tables, constants, *arrays_n)
        return jax.tree.map(jnp.add, total, sums), None

    zero = _zeros(function, h_ND, tables, constants, arrays_N)
    return scan_chunks(chunk, zero, chunks, h_ND, *arrays_N)[0]


def _zeros(function, h_ND, tables, constants, arrays_N):
    sums = jax.eval_shape(function, h_ND, tables, constants, *arrays_N)
    return jax.tree.map(jnp.zeros_like, sums)


def _sum_of_chunks_forward(function, chunks, h_ND, tables, constants, arrays_N):
    def chunk(total, inputs):
        h_nD, *arrays_n = inputs
        sums, (gradient_h_nD, gradient_tables) = jax.value_and_grad(
            function, argnums=(0, 1), has_aux=True
        )(h_nD, tables, constants, *arrays_n)
        return jax.tree.map(jnp.add, total, (sums, gradient_tables)), gradient_h_nD

    sums = _zeros(function, h_ND, tables, constants, arrays_N)
    zero = (sums, jax.tree.map(jnp.zeros_like, tables))
    (sums, gradient_tables), gradient_h_ND = scan_chunks(
        chunk, zero, chunks, h_ND, *arrays_N
    )
    return sums, (gradient_h_ND, gradient_tables)


def _sum_of_chunks_backward(function, chunks, gradients, cotangents):
    gradient_h_ND, gradient_tables = jax.tree.map(
        lambda g: (g * cotangents[0]).astype(g.dtype), gradients
    )
    return gradient_h_ND, gradient_tables, None, None


_sum_of_chunks.defvjp(_sum_of_chunks_forward, _sum_of_chunks_backward)
