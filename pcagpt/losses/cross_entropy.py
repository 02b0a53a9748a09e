"""The loss of predicting the next token.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.kernels import use_triton
from pcagpt.kernels.mosaic import softmax as mosaic_softmax
from pcagpt.kernels.triton import softmax as triton_softmax
from pcagpt.losses.chunks import sum_of_chunks
from pcagpt.losses.fused import fused_cross_entropy, head_kernels
from pcagpt.losses.logits import token_losses
from pcagpt.model import Head, products, project


def cross_entropy(
    h_ND,
    head: Head,
    targets_N,
    *,
    logits_dtype=jnp.float32,
    chunks: int = 1,
    kernels: str = "xla",
) -> jax.Array:
    """Sum of the targets' negative log-likelihoods in nats, a float32 scalar.

    It can be differentiated with respect to h_ND and the head. Only the logits of one
    chunk exist at a time. With kernels, a low-rank head (`fused_cross_entropy`) stores
    no logits.

    Args:
      h_ND: output of ln_f, in the compute dtype.
      head: the bands of the output head.
      targets_N: as for `token_losses`.
      logits_dtype: dtype of stored logits.
      chunks: largest number of chunks that the tokens are cut into.
      kernels: 'mosaic', 'triton' or 'xla'.
    """
    rows, is_banded = head[0].wte.shape[0], len(head) > 1
    forms = [head_kernels(kernels, band.wte.shape[1], h_ND.dtype) for band in head]
    if any(forms) or (is_banded and use_triton(kernels)):
        return fused_cross_entropy(h_ND, head, targets_N, chunks, kernels)
    softmax = _softmax_kernel(kernels, rows, logits_dtype)
    if softmax is not None and not is_banded:
        function = functools.partial(_by_kernel, softmax, logits_dtype)
    else:

        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def function(h_nD, head, _, targets_n):
            return jnp.sum(token_losses(h_nD, head, targets_n, logits_dtype)), ()

    return sum_of_chunks(function, chunks, h_ND, head, (), (targets_N,))[0]


def _softmax_kernel(kernels: str, rows: int, dtype):
    """The kernel for logits [n, rows], or None: the backend has none."""
    if kernels == "mosaic" and mosaic_softmax.fits(rows, dtype):
        return mosaic_softmax.loss_and_gradient
    return triton_softmax.loss_and_gradient if use_triton(kernels) else None


def _by_kernel(softmax, logits_dtype, h_nD, head: Head, _, targets_n):
    """Loss and gradients of a chunk for a head of one band; see `sum_of_chunks`."""
    [band] = head
    z_nK, back = jax.vjp(project, h_nD, band.scale_down)
    logits_nV = products(z_nK, band.wte, logits_dtype)
    loss_n, gradient_nV = softmax(logits_nV, band.size, targets_n)
    of_h_nD, of_scale_KD = back((gradient_nV @ band.wte).astype(z_nK.dtype))
    # The product is in float32, so that XLA fuses it with the sum over chunks.
    of_wte_VK = jnp.matmul(gradient_nV.T, z_nK, preferred_element_type=jnp.float32)
    of_band = band.replace(wte=of_wte_VK, scale_down=of_scale_KD)
    return (jnp.sum(loss_n), ()), (of_h_nD, (of_band,))
