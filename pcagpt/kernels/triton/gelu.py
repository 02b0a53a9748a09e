"""Bias and GELU in one kernel; the backward kernel also sums the bias's gradient.

Shape letters: N rows, F columns, P programs; n rows and f columns of a tile. `of_x` is
the gradient of the loss with respect to x.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pcagpt.kernels.constants import CUBIC, LOG2_E, TWICE_SCALE
from pcagpt.kernels.triton import launch
from pcagpt.sharding import inside

ROWS = 4  # per tile
MOST_COLUMNS = 256  # per tile; a power of 2
LEAST_COLUMNS = 32
WARPS = 4
# Backward programs along the rows. Each writes one partial sum of the bias's gradient.
ROW_PROGRAMS = 128


# XLA cannot differentiate a kernel. The backward kernel recomputes the sigmoid from h,
# so the forward pass stores only its inputs.
@jax.custom_vjp
def bias_gelu(h_NF: jax.Array, bias_F: jax.Array) -> jax.Array:
    """gelu(h + bias), tanh form, computed in float32: [N, F] in the dtype of h."""
    return _forward(h_NF, bias_F)[0]


def fits(width: int) -> bool:
    """Whether rows of this width can be cut into tiles that are wide enough."""
    return launch.power_of_2(width, MOST_COLUMNS) >= LEAST_COLUMNS


def _tile_shape(h_NF) -> tuple[int, int]:
    count, width = h_NF.shape
    return launch.power_of_2(count, ROWS), launch.power_of_2(width, MOST_COLUMNS)


@inside.by_device([True, False], [True])
def _forward(h_NF, bias_F):
    (count, width), (rows, columns) = h_NF.shape, _tile_shape(h_NF)
    tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    gelu_NF = launch.call(
        _visit_forward,
        grid=(count // rows, width // columns),
        in_specs=[tile, pl.BlockSpec((columns,), lambda i, j: (j,))],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(h_NF.shape, h_NF.dtype),
        warps=WARPS,
        name="bias_gelu",
    )(h_NF, bias_F)
    return (gelu_NF,)


def _visit_forward(h_ref, bias_ref, gelu_ref):
    x_nf = h_ref[...].astype(jnp.float32) + bias_ref[...][None, :]
    gelu_ref[...] = tanh_gelu(x_nf).astype(gelu_ref.dtype)


@inside.by_device([True, True, False], [True, False])
def _backward(of_gelu_NF, h_NF, bias_F):
    (count, width), (rows, columns) = h_NF.shape, _tile_shape(h_NF)
    tiles = launch.power_of_2(count // rows, max(1, count // (rows * ROW_PROGRAMS)))
    many = pl.BlockSpec((rows * tiles, columns), lambda i, j: (i, j))
    programs = count // (rows * tiles)

    def visit(of_gelu_ref, h_ref, bias_ref, of_h_ref, of_bias_ref):
        bias_1f = bias_ref[...][None, :]

        def load(tile):
            place = pl.ds(tile * rows, rows)
            return h_ref[place, :], of_gelu_ref[place, :]

        def visit_tile(tile, carry):
            (h_nf, of_gelu_nf), total_nf = carry
            # Loading the next tile here overlaps it with the computation of this one.
            following = load(jnp.minimum(tile + 1, tiles - 1))
            x_nf = h_nf.astype(jnp.float32) + bias_1f
            sigmoid_nf = _sigmoid(x_nf)
            slope_nf = TWICE_SCALE * (1.0 + 3.0 * CUBIC * x_nf * x_nf)
            derivative_nf = sigmoid_nf * (1.0 + x_nf * (1.0 - sigmoid_nf) * slope_nf)
            of_x_nf = of_gelu_nf.astype(jnp.float32) * derivative_nf
            of_h_ref[pl.ds(tile * rows, rows), :] = of_x_nf.astype(of_h_ref.dtype)
            return following, total_nf + of_x_nf

        zeros = jnp.zeros((rows, columns), jnp.float32)
        _, total_nf = jax.lax.fori_loop(0, tiles, visit_tile, (load(0), zeros))
        of_bias_ref[...] = total_nf.sum(axis=0)

    of_h_NF, parts_PF = launch.call(
        visit,
        grid=(programs, width // columns),
        in_specs=[many, many, pl.BlockSpec((columns,), lambda i, j: (j,))],
        out_specs=[many, pl.BlockSpec((None, columns), lambda i, j: (i, j))],
        out_shape=[
            jax.ShapeDtypeStruct(h_NF.shape, h_NF.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        warps=WARPS,
        name="bias_gelu_gradient",
    )(of_gelu_NF, h_NF, bias_F)
    return of_h_NF, parts_PF.sum(axis=0)


bias_gelu.defvjp(
    lambda h_NF, bias_F: (bias_gelu(h_NF, bias_F), (h_NF, bias_F)),
    lambda residuals, of_gelu_NF: _backward(of_gelu_NF, *residuals),
)


def tanh_gelu(x_nf):
    """GELU of a tile, float32, inside a kernel."""
    return x_nf * _sigmoid(x_nf)


def _sigmoid(x_nf):
    """sigmoid(2 * u(x)); see `constants`."""
    exponent_nf = x_nf * (1.0 + CUBIC * x_nf * x_nf) * (-TWICE_SCALE * LOG2_E)
    return 1.0 / (1.0 + jnp.exp2(exponent_nf))
