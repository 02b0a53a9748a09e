"""The loss of predicting the next token.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.kernels import head as head_kernels
from pcagpt.kernels import softmax
from pcagpt.losses import low_rank
from pcagpt.losses.chunks import sum_of_chunks
from pcagpt.losses.logits import Head, project, tables_and_sizes, token_losses


def cross_entropy(
    h_ND,
    head: Head,
    targets_N,
    *,
    logits_dtype=jnp.float32,
    chunks: int = 1,
    kernels: str = "xla",
) -> jax.Array:
    """Sum of the negative log-likelihoods of the targets in nats, a float32 scalar.

    Differentiable in h_ND and the head. By kernels, logits of a rank up to
    `kernels.head.MAX_RANK` are never stored, and computed a second time for the
    gradient of the table; so are those of a higher band beside others, chunk by chunk
    and in float32. All else is computed once, chunk by chunk, with the gradients.

    Args:
      h_ND: as the next three, as for `token_losses`.
      head: the bands.
      targets_N: columns.
      logits_dtype: what logits that are stored, and computed once, are rounded to.
      chunks: that the tokens are cut into, at the most.
      kernels: 'pallas' or 'xla'.
    """
    has_kernels = kernels == "pallas"
    is_low_rank = len(head) > 1 or head_kernels.fits(head[0][0].shape[1])
    if has_kernels and is_low_rank:
        return low_rank.cross_entropy(h_ND, head, targets_N, chunks)
    tables, sizes = tables_and_sizes(head)

    def loss_sum(h_nD, tables, _, targets_n):
        if has_kernels:
            [(wte_VK, scale_down_KD)], [size] = tables, sizes
            z_nK = project(h_nD, scale_down_KD)
            return _stored(z_nK, wte_VK, targets_n, size, jnp.dtype(logits_dtype)), ()
        head = [(*table, size) for table, size in zip(tables, sizes, strict=True)]
        return jnp.sum(token_losses(h_nD, head, targets_n, logits_dtype)), ()

    loss, _ = sum_of_chunks(loss_sum, chunks, h_ND, tables, (), (targets_N,))
    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stored(z_nK, wte_VK, targets_n, size: int, logits_dtype) -> jax.Array:
    """Of one band whose logits are stored, and then replaced by their gradients."""
    return _stored_forward(z_nK, wte_VK, targets_n, size, logits_dtype)[0]


def _stored_forward(z_nK, wte_VK, targets_n, size, logits_dtype):
    logits_nV = jax.lax.dot_general(
        z_nK, wte_VK, (((1,), (1,)), ((), ())), preferred_element_type=logits_dtype
    )
    loss_n, gradient_nV = softmax.loss_and_gradient(logits_nV, size, targets_n)
    gradients = gradient_nV @ wte_VK, gradient_nV.T @ z_nK
    return jnp.sum(loss_n), gradients


def _stored_backward(size, logits_dtype, gradients, cotangent):
    del size, logits_dtype
    of_z_nK, of_wte_VK = ((g * cotangent).astype(g.dtype) for g in gradients)
    return of_z_nK, of_wte_VK, None


_stored.defvjp(_stored_forward, _stored_backward)
