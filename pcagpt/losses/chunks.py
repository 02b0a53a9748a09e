"""Sums over tokens taken a chunk at a time, so that only one chunk's logits exist.

Shape letters: N tokens, n tokens of a chunk, D width.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.sharding.inside import by_device, device_count


def scan_chunks(function, carry, chunks: int, *arrays_N):
    """`jax.lax.scan` of `function` over equal chunks of the arrays' leading axis.

    Each chunk takes every `chunks`-th row, so that no row moves to another device if
    the leading axis is split over devices. `chunks` is lowered to the nearest divisor
    of the rows on each device, or of N if the devices cannot share N evenly.

    Args:
      function: (carry, arrays of one chunk) -> (carry, outputs with leading axis n).
      carry: the first carry.
      chunks: the most chunks that the arrays are cut into.
      *arrays_N: arrays with leading axis N.

    Returns:
      The last carry, and the outputs with leading axis N, in the order of the input.
    """
    count = arrays_N[0].shape[0]
    own_rows, remainder = divmod(count, device_count())
    divided = count if remainder else own_rows
    chunks = max(c for c in range(1, min(chunks, divided) + 1) if divided % c == 0)
    if chunks == 1:
        return function(carry, arrays_N)

    def split(array):
        return array.reshape(-1, chunks, *array.shape[1:]).swapaxes(0, 1)

    def join(array):
        return array.swapaxes(0, 1).reshape(count, *array.shape[2:])

    carry, outputs = jax.lax.scan(function, carry, tuple(map(split, arrays_N)))
    return carry, jax.tree.map(join, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_of_chunks(function, chunks, h_ND, head, constants, arrays_N):
    """Sums a loss and its gradients over chunks of the tokens.

    Loss and gradients come from the same visit to a chunk, so that its logits are
    computed once. Each device sums its own rows; the devices' sums are added up last.

    Args:
      function: (h [n, D], head, constants, *arrays of a chunk) -> ((loss, a tree of
        other sums), the loss's gradients in h and head), like
        `jax.value_and_grad(..., argnums=(0, 1), has_aux=True)`.
      chunks: as for `scan_chunks`.
      h_ND: cut into chunks, with a gradient.
      head: not cut, with a gradient. The function gets it in the dtype of h; gradients
        are summed in the head's own dtype.
      constants: a tree that is not cut and has no gradient, also cast to that of h.
      arrays_N: cut into chunks, without gradients.

    Returns:
      (loss, tree of other sums); only the loss can be differentiated.
    """
    return _forward(function, chunks, h_ND, head, constants, arrays_N)[0]


def _forward(function, chunks, h_ND, head, constants, arrays_N):
    def of_rows(h_ND, head, zeros, constants, arrays_N):
        def chunk(total, inputs):
            h_nD, *arrays_n = inputs
            sums, (of_h_nD, of_head) = function(h_nD, head, constants, *arrays_n)
            found = sums, of_head
            total = jax.tree.map(lambda t, f: t + f.astype(t.dtype), total, found)
            return total, of_h_nD

        sums, _ = jax.eval_shape(function, h_ND, head, constants, *arrays_N)
        start = jax.tree.map(jnp.zeros_like, sums), zeros
        (sums, of_head), of_h_ND = scan_chunks(chunk, start, chunks, h_ND, *arrays_N)
        return sums, of_h_ND, jax.tree.map(lambda g: g[None], of_head)

    # Cast here, once, and not in every chunk.
    cast_head, constants = jax.tree.map(
        lambda leaf: leaf.astype(h_ND.dtype), (head, constants)
    )
    zeros = jax.tree.map(jnp.zeros_like, head)
    split = by_device(of_rows, [True, False, False, False, True], [False, True, True])
    sums, *gradients = split(h_ND, cast_head, zeros, constants, arrays_N)
    return sums, gradients


def _backward(function, chunks, gradients, cotangents):
    def scaled(of_h_ND, own_of_head, factor):
        def by_factor(gradient):
            return (gradient * factor).astype(gradient.dtype)

        own_of_head = jax.tree.map(lambda g: by_factor(g[0]), own_of_head)
        return by_factor(of_h_ND), own_of_head

    # The devices' sums are only added up here: XLA can then add them together with the
    # other gradients of the same tables.
    split = by_device(scaled, [True, True, False], [True, False])
    return *split(*gradients, cotangents[0]), None, None


sum_of_chunks.defvjp(_forward, _backward)
