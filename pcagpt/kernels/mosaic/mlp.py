"""The MLP of a block; GELU and its gradient are at the end of the products around it.

So no kernel reads the hidden layer only to apply GELU to it.

Shape letters: N tokens, D model width, F = 4D hidden units, P parts of a sum; r rows
and c columns of a piece of a tile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.constants import CUBIC, LOG2_E, TWICE_SCALE
from pcagpt.kernels.mosaic import launch, product
from pcagpt.kernels.mosaic.product import COLUMNS, PIECE, PIECES
from pcagpt.kernels.mosaic.streamed import HALVES
from pcagpt.sharding import inside

ONES = 8  # columns of a factor of ones, the fewest that a product takes


def fits(tokens: int, width: int, hidden: int, dtype) -> bool:
    """Whether both products consist of whole tiles."""
    return product.fits(tokens, width, hidden, dtype)


# XLA cannot differentiate a kernel.
@jax.custom_vjp
def mlp(x_ND, fc_DF, bias_F, proj_FD) -> jax.Array:
    """gelu(x @ fc + bias) @ proj, tanh form: [N, D].

    x, fc, proj and the result are bfloat16, the bias is float32. Products are added up
    and GELU is computed in float32.
    """
    (gelu_NF,) = _gelu_product(x_ND, fc_DF, bias_F, keeps_slope=False)
    return gelu_NF @ proj_FD


def _forward(x_ND, fc_DF, bias_F, proj_FD):
    slope_NF, gelu_NF = _gelu_product(x_ND, fc_DF, bias_F, keeps_slope=True)
    return gelu_NF @ proj_FD, (x_ND, slope_NF, gelu_NF, fc_DF, proj_FD)


def _backward(residuals, of_y_ND):
    x_ND, slope_NF, gelu_NF, fc_DF, proj_FD = residuals
    of_h_NF, of_bias_F = _gradient_product(of_y_ND, proj_FD, slope_NF)
    of_fc_DF, of_proj_FD = x_ND.T @ of_h_NF, gelu_NF.T @ of_y_ND
    return of_h_NF @ fc_DF.T, of_fc_DF, of_bias_F, of_proj_FD


mlp.defvjp(_forward, _backward)


def _gelu_product(x_ND, fc_DF, bias_F, *, keeps_slope: bool):
    """GELU of h = x @ fc + bias [N, F], after its derivative there if that is kept.

    The derivative takes the place of h for the backward pass: it needs no exponentials
    there, and here it shares those of GELU.
    """

    @inside.by_device([True, False, False], [True] * (1 + keeps_slope))
    def of_rows(x_ND, fc_DF, bias_F):
        result = jax.ShapeDtypeStruct((len(x_ND), fc_DF.shape[1]), x_ND.dtype)
        results = (result,) * (1 + keeps_slope)
        return product.run(x_ND, fc_DF, bias_F, work=_GELU, results=results)

    return of_rows(x_ND, fc_DF, bias_F)


@inside.by_device([True, False, True], [True, False])
def _gradient_product(of_y_ND, proj_FD, slope_NF):
    """Gradients of h [N, F] and of the bias [F] float32."""
    width = slope_NF.shape[1]
    parts = HALVES * product.programs(width)[1]
    results = (
        jax.ShapeDtypeStruct(slope_NF.shape, slope_NF.dtype),
        jax.ShapeDtypeStruct((parts, width), jnp.float32),
    )
    of_h_NF, parts_PF = product.run(
        of_y_ND,
        proj_FD,
        slope_NF,
        work=_GRADIENT,
        results=results,
        is_transposed=True,
    )
    return of_h_NF, parts_PF.sum(axis=0)


def _gelu_scratch() -> dict:
    """Further arrays in shared memory."""
    return {
        "arrived": plgpu.Barrier(num_barriers=HALVES),
        "numbers": launch.shared((HALVES, COLUMNS), jnp.float32),
    }


def _gelu(place, multiply, bias_ref, results, pieces, arrived, numbers):
    """Adds the bias and applies GELU; the first of two results is its derivative."""
    half = place.half
    plgpu.copy_gmem_to_smem(
        bias_ref.at[pl.ds(place.column, COLUMNS)], numbers.at[half], arrived.at[half]
    )
    plgpu.barrier_wait(arrived.at[half])

    @pl.loop(0, place.turns)
    def _(turn):
        product_rc = multiply(turn)
        for number in range(PIECES):
            bias_c = numbers[half, pl.ds(number * PIECE, PIECE)]
            h_rc = product_rc[:, product.columns_of(number)]
            h_rc += lax.broadcast_in_dim(bias_c, h_rc.shape, [1])
            values = _slope_and_gelu(h_rc)[-len(results) :]
            for index, value_rc in enumerate(values):
                count = number * len(results) + index
                target = results[index].at[place.piece(turn, number)]
                product.copy_out(pieces, half, count, value_rc, target)


_GELU = product.Work("mlp_gelu", _gelu, 2, _gelu_scratch)


def _gradient_scratch() -> dict:
    """Further arrays in shared memory."""
    arrays = _gelu_scratch() | {"arrived": plgpu.Barrier(num_barriers=HALVES * PIECES)}
    if not launch.is_interpreted():
        ones = launch.shared((PIECE, PIECE), jnp.bfloat16, PIECE)
        return arrays | {"ones": ones}
    turned = launch.shared((HALVES, PIECES, PIECE, PIECE), jnp.bfloat16)
    return arrays | {
        "ones": launch.shared((PIECE, ONES), jnp.bfloat16),
        "turned": turned,
    }


def _gradient(
    place, multiply, slope_ref, results, pieces, arrived, numbers, ones, turned=None
):
    """Multiplies by GELU's derivative, and adds up each column."""
    of_h_ref, sums_ref = results
    half = place.half
    ones[...] = jnp.ones(ones.shape, ones.dtype)  # Both groups write the same.

    def add_up(*sum_refs):
        @pl.loop(0, place.turns)
        def _(turn):
            def load():
                # Copies and products have then read the pieces of the last tile.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for number in range(PIECES):
                    plgpu.copy_gmem_to_smem(
                        slope_ref.at[place.piece(turn, number)],
                        pieces.at[half, number],
                        arrived.at[half * PIECES + number],
                    )

            product_rc = multiply(turn, load)
            for number in range(PIECES):
                plgpu.barrier_wait(arrived.at[half * PIECES + number])
                slope_rc = pieces[half, number].astype(jnp.float32)
                of_h_rc = product_rc[:, product.columns_of(number)] * slope_rc
                pieces[half, number] = of_h_rc.astype(pieces.dtype)
            plgpu.commit_smem()
            for number in range(PIECES):
                target = of_h_ref.at[place.piece(turn, number)]
                plgpu.copy_smem_to_gmem(pieces.at[half, number], target)
            _add_columns(sum_refs, pieces.at[half], ones, turned)

        plgpu.wgmma_wait(0)
        for number, sum_ref in enumerate(sum_refs):
            # All columns are the same.
            numbers[half, pl.ds(number * PIECE, PIECE)] = sum_ref[...].max(axis=1)

    pl.run_scoped(add_up, *[plgpu.ACC((PIECE, ONES), jnp.float32)] * PIECES)
    plgpu.commit_smem()
    part = place.part * HALVES + half
    target = sums_ref.at[part, pl.ds(place.column, COLUMNS)]
    plgpu.copy_smem_to_gmem(numbers.at[half], target)


_GRADIENT = product.Work("mlp_gradient", _gradient, PIECES, _gradient_scratch)


def _add_columns(sum_refs, pieces, ones, turned) -> None:
    """Adds the sums of the columns of each piece in shared memory, [64, 8] float32.

    A sum over rows would need several warps, which share no memory of their own. A
    product with ones gives each sum to all threads of its row. The pieces must stay
    until the products have ended (`wgmma_wait`).
    """
    for number, sum_ref in enumerate(sum_refs):
        if turned is None:
            left = pieces.at[number].transpose((1, 0))
            right = ones.at[pl.ds(0, ONES)].transpose((1, 0))
        else:  # The interpreter cannot turn a factor.
            left, right = turned.at[launch.group(), number], ones
            left[...] = pieces[number].T
        plgpu.wgmma(sum_ref, left, right)


def _slope_and_gelu(h_rc) -> list:
    """The derivative of GELU at h, and GELU, h * sigmoid(2 * u(h)); see `constants`."""
    square_rc = h_rc * h_rc
    scale = -TWICE_SCALE * LOG2_E
    exponent_rc = h_rc * (square_rc * (scale * CUBIC) + scale)
    root_rc = lax.rsqrt(1.0 + jnp.exp2(exponent_rc))
    sigmoid_rc = root_rc * root_rc  # A division would take longer.
    inner_rc = h_rc * (square_rc * (3.0 * CUBIC * TWICE_SCALE) + TWICE_SCALE)
    slope_rc = sigmoid_rc + inner_rc * (sigmoid_rc - sigmoid_rc * sigmoid_rc)
    return [slope_rc, h_rc * sigmoid_rc]
