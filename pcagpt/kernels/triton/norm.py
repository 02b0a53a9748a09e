"""Kernels of `kernels.norm`, forward and backward.

A program keeps whole rows in registers. A row has several pieces, because the sizes of
Triton's arrays must be powers of 2, and a width like 768 is not.

Shape letters: N rows, D their width, P programs; n rows of a tile, d columns of a
piece. `of_x` is the gradient of the loss with respect to x.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pcagpt.kernels.triton import launch

ROWS = 4  # per tile
PIECE = 256  # most columns per piece; a power of 2
MOST_PIECES = 8
WARPS = 4


def fits(width: int) -> bool:
    """Whether a row fits in registers."""
    return len(_pieces(width)) <= MOST_PIECES


def forward_rows(x_ND, update_TD, bias_D, scale_D, offset_D, *, epsilon):
    """The sum and its norm [N, D], mean and inverse deviation [N] float32."""
    count, width = x_ND.shape
    update_ND = jnp.tile(update_TD, (count // len(update_TD), 1))
    rows = launch.power_of_2(count, ROWS)
    tile = pl.BlockSpec((rows, width), lambda i: (i, 0))
    whole = pl.BlockSpec((width,), lambda i: (0,))
    number = pl.BlockSpec((rows,), lambda i: (i,))
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    statistic = jax.ShapeDtypeStruct((count,), jnp.float32)
    return launch.call(
        functools.partial(_visit_forward, epsilon=epsilon),
        grid=(count // rows,),
        in_specs=[tile, tile, whole, whole, whole],
        out_specs=[tile, tile, number, number],
        out_shape=[like_x, like_x, statistic, statistic],
        warps=WARPS,
        name="add_and_norm",
    )(x_ND, update_ND, bias_D, scale_D, offset_D)


def _visit_forward(*references, epsilon: float):
    """Kernel: one tile of rows."""
    x_ref, update_ref, bias_ref, scale_ref, offset_ref = references[:5]
    sum_ref, normed_ref, mean_ref, inverse_deviation_ref = references[5:]
    width = x_ref.shape[1]
    sums = []
    for piece in _pieces(width):
        x_nd = x_ref[:, piece].astype(jnp.float32)
        x_nd += update_ref[:, piece].astype(jnp.float32) + bias_ref[piece][None, :]
        sum_ref[:, piece] = x_nd.astype(sum_ref.dtype)
        # The statistics are those of the rounded sum, which the backward pass reads.
        sums.append(x_nd.astype(sum_ref.dtype).astype(jnp.float32))
    mean_n1 = _row_sums(sums) / width
    centred = [x_nd - mean_n1 for x_nd in sums]
    variance_n1 = _row_sums([x_nd * x_nd for x_nd in centred]) / width
    inverse_n1 = jax.lax.rsqrt(variance_n1 + epsilon)
    for piece, x_nd in zip(_pieces(width), centred, strict=True):
        scale_1d, offset_1d = scale_ref[piece][None, :], offset_ref[piece][None, :]
        normed_nd = x_nd * inverse_n1 * scale_1d + offset_1d
        normed_ref[:, piece] = normed_nd.astype(normed_ref.dtype)
    mean_ref[...] = mean_n1.sum(axis=1)
    inverse_deviation_ref[...] = inverse_n1.sum(axis=1)


def backward_rows(of_sum_ND, of_normed_ND, sum_ND, scale_D, mean_N, inverse_N):
    """Gradients of x [N, D], and of bias, scale and offset [3, D] float32.

    The gradient of the sum may be None for 0.
    """
    of_sum_ND = jnp.zeros_like(sum_ND) if of_sum_ND is None else of_sum_ND
    count, width = sum_ND.shape
    rows = launch.power_of_2(count, ROWS)
    tiles = launch.power_of_2(count // rows, max(1, count // (rows * launch.PROGRAMS)))
    programs = count // (rows * tiles)
    many = pl.BlockSpec((rows * tiles, width), lambda i: (i, 0))
    numbers = pl.BlockSpec((rows * tiles,), lambda i: (i,))
    whole = pl.BlockSpec((width,), lambda i: (0,))
    gradient_ND, parts_P3D = launch.call(
        functools.partial(_visit_backward, rows=rows),
        grid=(programs,),
        in_specs=[many, many, many, whole, numbers, numbers],
        out_specs=[many, pl.BlockSpec((None, 3, width), lambda i: (i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(sum_ND.shape, sum_ND.dtype),
            jax.ShapeDtypeStruct((programs, 3, width), jnp.float32),
        ],
        warps=WARPS,
        name="add_and_norm_gradient",
    )(of_sum_ND, of_normed_ND, sum_ND, scale_D, mean_N, inverse_N)
    return gradient_ND, parts_P3D.sum(axis=0)


def _visit_backward(*references, rows: int):
    """Kernel: many tiles of rows, and their part of the parameters' gradients."""
    of_sum_ref, of_normed_ref, sum_ref, scale_ref, mean_ref = references[:5]
    inverse_deviation_ref, gradient_ref, of_parameters_ref = references[5:]
    count, width = sum_ref.shape
    pieces = _pieces(width)
    scales = [scale_ref[piece][None, :] for piece in pieces]
    tiles = count // rows

    def load(tile):
        place = pl.ds(tile * rows, rows)
        references = sum_ref, of_normed_ref, of_sum_ref
        arrays = [tuple(ref[place, piece] for ref in references) for piece in pieces]
        return arrays, mean_ref[place], inverse_deviation_ref[place]

    def visit(tile, carry):
        (arrays, mean_n, inverse_n), totals = carry
        # Loading the next tile here overlaps it with the computation of this one.
        following = load(jnp.minimum(tile + 1, tiles - 1))
        place = pl.ds(tile * rows, rows)
        mean_n1, inverse_n1 = mean_n[:, None], inverse_n[:, None]
        units, slopes, gradients = [], [], []
        for (x_nd, of_normed_nd, _), scale_1d in zip(arrays, scales, strict=True):
            gradients.append(of_normed_nd.astype(jnp.float32))
            units.append((x_nd.astype(jnp.float32) - mean_n1) * inverse_n1)
            slopes.append(gradients[-1] * scale_1d)
        mean_slope_n1 = _row_sums(slopes) / width
        products = [s_nd * u_nd for s_nd, u_nd in zip(slopes, units, strict=True)]
        mean_product_n1 = _row_sums(products) / width
        new_totals = []
        for number, piece in enumerate(pieces):
            unit_nd, slope_nd = units[number], slopes[number]
            through_norm_nd = slope_nd - mean_slope_n1 - unit_nd * mean_product_n1
            of_sum_nd = arrays[number][2].astype(jnp.float32)
            of_sum_nd += through_norm_nd * inverse_n1
            gradient_ref[place, piece] = of_sum_nd.astype(gradient_ref.dtype)
            terms = of_sum_nd, gradients[number] * unit_nd, gradients[number]
            new_totals.append(
                tuple(t + x for t, x in zip(totals[number], terms, strict=True))
            )
        return following, new_totals

    zeros = [(jnp.zeros((rows, piece.size), jnp.float32),) * 3 for piece in pieces]
    _, totals = jax.lax.fori_loop(0, tiles, visit, (load(0), zeros))
    for piece, of_parameters in zip(pieces, totals, strict=True):
        for number, terms_nd in enumerate(of_parameters):
            of_parameters_ref[number, piece] = terms_nd.sum(axis=0)


def _pieces(width: int) -> list:
    """Column slices of a row."""
    size = launch.power_of_2(width, PIECE)
    return [pl.ds(start, size) for start in range(0, width, size)]


def _row_sums(pieces) -> jax.Array:
    """Row sums over all pieces: [n, 1]."""
    return sum(piece_nd.sum(axis=1) for piece_nd in pieces)[:, None]
