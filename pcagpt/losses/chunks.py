"""Sums over chunks of tokens, so that only one chunk's logits exist at a time.

Shape letters: N tokens, n tokens of a chunk, D width.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.sharding.inside import by_device, device_count


def scan_chunks(function, carry, chunks: int, *arrays_N):
    """`jax.lax.scan` over at most `chunks` equal chunks of the arrays' leading axis.

    If the leading axis is split over devices, each chunk takes every `chunks`-th row,
    so that no row moves to another device. The number of chunks is the largest one up
    to `chunks` that divides the rows of one device (or N, if the devices cannot share N
    evenly).

    `function` maps (carry, tuple of chunks [n, ...]) to (carry, outputs [n, ...]).
    Returns the last carry, and the outputs [N, ...] in the order of the input.
    """
    count = arrays_N[0].shape[0]
    own_rows, remainder = divmod(count, device_count())
    divided = count if remainder else own_rows
    chunks = max(c for c in range(1, min(chunks, divided) + 1) if divided % c == 0)
    if chunks == 1:
        return function(carry, arrays_N)

    is_split = device_count() > 1

    def split(array):
        if is_split:
            return array.reshape(-1, chunks, *array.shape[1:]).swapaxes(0, 1)
        return array.reshape(chunks, -1, *array.shape[1:])

    def join(array):
        array = array.swapaxes(0, 1) if is_split else array
        return array.reshape(count, *array.shape[2:])

    carry, outputs = jax.lax.scan(function, carry, tuple(map(split, arrays_N)))
    return carry, jax.tree.map(join, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_of_chunks(function, chunks, h_ND, head, constants, arrays_N):
    """Sums a loss over chunks of the tokens; returns (loss, tree of other sums).

    The forward pass also computes the gradients. So it computes the logits of each
    chunk only once and stores none. Each device sums its own rows, and the sums of the
    devices are added last. Only the loss can be differentiated, with respect to h and
    head.

    Args:
      function: (h [n, D], head, constants, *arrays of a chunk) -> ((loss, other sums),
        (gradient for h, gradient for head)), like
        `jax.value_and_grad(..., argnums=(0, 1), has_aux=True)`.
      chunks: as for `scan_chunks`.
      h_ND: cut into chunks.
      head: a tree, not cut. The function gets it in the dtype of h; its gradients are
        summed in the head's own dtype.
      constants: a tree without gradients, not cut, cast to the dtype of h.
      arrays_N: a tuple of arrays without gradients, cut into chunks.
    """
    return _forward(function, chunks, h_ND, head, constants, arrays_N)[0]


def _forward(function, chunks, h_ND, head, constants, arrays_N):
    @by_device([True, False, False, False, True], [False, True, True])
    def sums_of_device(h_ND, head, zeros, constants, arrays_N):
        def add_chunk(total, inputs):
            h_nD, *arrays_n = inputs
            sums, (of_h_nD, of_head) = function(h_nD, head, constants, *arrays_n)
            found = sums, of_head
            total = jax.tree.map(lambda t, f: t + f.astype(t.dtype), total, found)
            return total, of_h_nD

        sums, _ = jax.eval_shape(function, h_ND, head, constants, *arrays_N)
        start = jax.tree.map(jnp.zeros_like, sums), zeros
        (sums, of_head), of_h_ND = scan_chunks(
            add_chunk, start, chunks, h_ND, *arrays_N
        )
        return sums, of_h_ND, jax.tree.map(lambda g: g[None], of_head)

    # Casting here avoids a cast in every chunk.
    cast_head, constants = jax.tree.map(
        lambda leaf: leaf.astype(h_ND.dtype), (head, constants)
    )
    zeros = jax.tree.map(jnp.zeros_like, head)
    sums, *gradients = sums_of_device(h_ND, cast_head, zeros, constants, arrays_N)
    return sums, gradients


def _backward(function, chunks, gradients, cotangents):
    # The sum over devices is here, not in the forward pass. XLA can then merge it with
    # the sums of the other gradients of the same tables.
    @by_device([True, True, False], [True, False])
    def scaled(of_h_ND, own_of_head, factor):
        def by_factor(gradient):
            return (gradient * factor).astype(gradient.dtype)

        own_of_head = jax.tree.map(lambda g: by_factor(g[0]), own_of_head)
        return by_factor(of_h_ND), own_of_head

    return *scaled(*gradients, cotangents[0]), None, None


sum_of_chunks.defvjp(_forward, _backward)
