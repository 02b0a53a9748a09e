"""The loss of predicting the next token.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank.
"""

import jax
import jax.numpy as jnp

from pcagpt.kernels import head as head_kernels
from pcagpt.kernels import softmax
from pcagpt.losses import fused as low_rank
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
        head = [(*table, size) for table, size in zip(tables, sizes, strict=True)]
        return jnp.sum(token_losses(h_nD, head, targets_n, logits_dtype)), ()

    def by_kernels(h_nD, tables, _, targets_n):
        [table], [size] = tables, sizes
        return _loss_and_gradients(h_nD, *table, targets_n, size, logits_dtype)

    plain = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)
    function = by_kernels if has_kernels else plain
    loss, _ = sum_of_chunks(function, chunks, h_ND, tables, (), (targets_N,))
    return loss


def _loss_and_gradients(h_nD, wte_VK, scale_down_KD, targets_n, size, logits_dtype):
    """Of one band, for `sum_of_chunks`: the logits make room for their gradients."""
    z_nK, back = jax.vjp(project, h_nD, scale_down_KD)
    logits_nV = jax.lax.dot_general(
        z_nK, wte_VK, (((1,), (1,)), ((), ())), preferred_element_type=logits_dtype
    )
    loss_n, gradient_nV = softmax.loss_and_gradient(logits_nV, size, targets_n)
    of_h_nD, of_scale_KD = back((gradient_nV @ wte_VK).astype(z_nK.dtype))
    # In float32, so that the product itself adds it to the other chunks'.
    of_wte_VK = jnp.matmul(gradient_nV.T, z_nK, preferred_element_type=jnp.float32)
    return (jnp.sum(loss_n), ()), (of_h_nD, ((of_wte_VK, of_scale_KD),))
