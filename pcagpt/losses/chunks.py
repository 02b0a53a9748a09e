"""Sums over tokens taken a chunk at a time, so that only a chunk's logits exist.

Shape letters: N tokens, n tokens of a chunk, D width.
"""

import functools

import jax
import jax.numpy as jnp

from pcagpt.sharding.inside import by_device, device_count


def scan_chunks(function, carry, chunks: int, *arrays_N):
    """`jax.lax.scan` of `function` over equal chunks of the arrays' leading axis.

    Each chunk takes every `chunks`-th row, so that a leading axis sharded over devices
    stays where it is. `chunks` is lowered to the nearest divisor of the rows that each
    device of the mesh in use has, or of N where N cannot be split over them.

    Args:
      function: (carry, arrays of one chunk) -> (carry, outputs with leading axis n).
      carry: what is handed from chunk to chunk.
      chunks: how many, at the most.
      *arrays_N: arrays of leading axis N.

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
def sum_of_chunks(function, chunks, h_ND, tables, constants, arrays_N):
    """The chunks' values of `function`, summed; the first can be differentiated.

    Each device takes its own rows, and all sums are added up at the end.

    Args:
      function: (h [n, D], tables, constants, *arrays of a chunk) -> ((a sum, a tree of
        other sums), the first's gradients in h and the tables), as
        `jax.value_and_grad` makes it with `argnums=(0, 1), has_aux=True`.
      chunks: as for `scan_chunks`.
      h_ND: what is cut into chunks and has a gradient.
      tables: a tree of what has a gradient and is not cut; the function gets it in
        the dtype of h, gradients are summed in its own.
      constants: a tree of what is neither cut nor has a gradient; likewise in the
        dtype of h.
      arrays_N: what is cut and has no gradient.
    """

    def of_rows(h_ND, tables, constants, arrays_N):
        def chunk(total, inputs):
            h_nD, *arrays_n = inputs
            sums, _ = function(h_nD, tables, constants, *arrays_n)
            return jax.tree.map(jnp.add, total, sums), None

        zero = _zeros(function, h_ND, tables, constants, arrays_N)
        return (scan_chunks(chunk, zero, chunks, h_ND, *arrays_N)[0],)

    tables, constants = _cast((tables, constants), h_ND.dtype)
    split = by_device(of_rows, [True, False, False, True], [False])
    return split(h_ND, tables, constants, arrays_N)[0]


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _zeros(function, h_ND, tables, constants, arrays_N):
    sums, _ = jax.eval_shape(function, h_ND, tables, constants, *arrays_N)
    return jax.tree.map(jnp.zeros_like, sums)


def _sum_forward(function, chunks, h_ND, tables, constants, arrays_N):
    def of_rows(h_ND, cast_tables, zeros, constants, arrays_N):
        def chunk(total, inputs):
            h_nD, *arrays_n = inputs
            sums, (gradient_h_nD, gradient_tables) = function(
                h_nD, cast_tables, constants, *arrays_n
            )
            found = sums, gradient_tables
            total = jax.tree.map(lambda t, f: t + f.astype(t.dtype), total, found)
            return total, gradient_h_nD

        zero = _zeros(function, h_ND, cast_tables, constants, arrays_N), zeros
        (sums, gradient_tables), gradient_h_ND = scan_chunks(
            chunk, zero, chunks, h_ND, *arrays_N
        )
        return sums, gradient_h_ND, jax.tree.map(lambda g: g[None], gradient_tables)

    # Cast once, not in every chunk.
    cast_tables, constants = _cast((tables, constants), h_ND.dtype)
    zeros = jax.tree.map(jnp.zeros_like, tables)
    split = by_device(of_rows, [True, False, False, False, True], [False, True, True])
    sums, *gradients = split(h_ND, cast_tables, zeros, constants, arrays_N)
    return sums, gradients


def _sum_backward(function, chunks, gradients, cotangents):
    def scaled(gradient_h_ND, own_gradient_tables, factor):
        def by_factor(gradient):
            return (gradient * factor).astype(gradient.dtype)

        own_gradient_tables = jax.tree.map(
            lambda g: by_factor(g[0]), own_gradient_tables
        )
        return by_factor(gradient_h_ND), own_gradient_tables

    # Added up over the devices only now: XLA can then do it together with what else the
    # tables' gradients are made of.
    split = by_device(scaled, [True, True, False], [True, False])
    return *split(*gradients, cotangents[0]), None, None


sum_of_chunks.defvjp(_sum_forward, _sum_backward)
