"""Cross entropy and its gradient in one kernel over stored logits.

Shape letters: n tokens, V columns, v columns of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pcagpt.kernels.triton import launch
from pcagpt.sharding import inside

COLUMNS = 8192  # most columns per tile
WARPS = 16


def loss_and_gradient(
    logits_nV: jax.Array, size: int, targets_n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods [n] float32 in nats, and their gradients [n, V].

    The gradients with respect to the logits overwrite the logits. Only the first `size`
    columns count; the others are padding. A negative target gives a loss and a gradient
    of 0.
    """
    return _of_rows(logits_nV, targets_n, size=size)


@inside.by_device([True, True], [True, True])
def _of_rows(logits_nV, targets_n, *, size: int):
    count, width = logits_nV.shape
    columns = min(COLUMNS, 1 << (width.bit_length() - 1))
    row = pl.BlockSpec((None, width), lambda i: (i, 0))
    number = pl.BlockSpec((1,), lambda i: (i,))
    return launch.call(
        functools.partial(_visit_row, size=size, columns=columns),
        grid=(count,),
        in_specs=[row, number],
        out_specs=[number, row],
        out_shape=[
            jax.ShapeDtypeStruct((count,), jnp.float32),
            jax.ShapeDtypeStruct(logits_nV.shape, logits_nV.dtype),
        ],
        input_output_aliases={0: 1},
        warps=WARPS,
        name="softmax_loss_and_gradient",
    )(logits_nV, targets_n)


def _visit_row(logits_ref, target_ref, loss_ref, gradient_ref, *, size, columns):
    """Kernel: reads one row for the normaliser and again for the gradient."""
    del logits_ref  # gradient_ref is the same memory.
    width = gradient_ref.shape[0]
    full_tiles = size // columns
    # A tile must not extend beyond the row. So the last tile may start earlier and
    # overlap the tile before it.
    rest = range(full_tiles * columns, width, columns)
    target = target_ref[0]
    # Read this before any thread overwrites it.
    target_logit = gradient_ref[jnp.maximum(target, 0)].astype(jnp.float32)

    def tile_at(first):
        start = min(first, width - columns)
        column_v = start + jax.lax.broadcasted_iota(jnp.int32, (columns,), 0)
        return pl.ds(start, columns), column_v

    def add_up(carry, logit_v):
        sum_, highest = carry
        new_highest = jnp.maximum(highest, logit_v.max())
        shrunk = sum_ * jnp.exp(highest - new_highest)
        return shrunk + jnp.exp(logit_v - new_highest).sum(), new_highest

    def add_full_tile(tile, carry):
        logit_v = gradient_ref[pl.ds(tile * columns, columns)]
        return add_up(carry, logit_v.astype(jnp.float32))

    carry = jnp.float32(0), jnp.float32(-jnp.inf)
    carry = jax.lax.fori_loop(0, full_tiles, add_full_tile, carry)
    for first in rest:
        place, column_v = tile_at(first)
        logit_v = gradient_ref[place].astype(jnp.float32)
        is_new_v = (column_v >= first) & (column_v < size)
        carry = add_up(carry, jnp.where(is_new_v, logit_v, -jnp.inf))
    sum_, highest = carry
    normaliser = highest + jnp.log(sum_)
    loss_ref[0] = jnp.where(target >= 0, normaliser - target_logit, 0.0)
    # An infinite normaliser makes all probabilities, and so the gradient, 0.
    normaliser = jnp.where(target >= 0, normaliser, jnp.inf)

    def gradient_of(logit_v, column_v):
        p_v = jnp.exp(logit_v.astype(jnp.float32) - normaliser)
        gradient_v = jnp.where(column_v == target, p_v - 1.0, p_v)
        return gradient_v.astype(gradient_ref.dtype)

    def write_full_tile(tile, _):
        place = pl.ds(tile * columns, columns)
        column_v = tile * columns + jax.lax.broadcasted_iota(jnp.int32, (columns,), 0)
        gradient_ref[place] = gradient_of(gradient_ref[place], column_v)

    jax.lax.fori_loop(0, full_tiles, write_full_tile, None)
    for first in rest:
        place, column_v = tile_at(first)
        gradient_v = gradient_of(gradient_ref[place], column_v)
        gradient_v = jnp.where(column_v < size, gradient_v, 0)
        launch.store(gradient_ref.at[place], gradient_v, mask=column_v >= first)
