"""Kernels of `kernels.norm`, forward and backward.

A program holds a row in registers and loads the next one meanwhile. A multiprocessor
runs many programs, so that others compute while one waits for the sums of its warps.

Shape letters: N rows, T rows of an update, D their width, P programs. `of_x` is the
gradient of the loss with respect to x.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pcagpt.kernels.mosaic import launch

LANES = 128  # columns of a row are multiples of it: one for each thread
MOST_WIDTH = 2048  # columns in registers
# Of a multiprocessor; the fastest of 4 to 16 and of 2 to 8 at width 768.
PROGRAMS = {"forward": 14, "backward": 6}


def fits(width: int) -> bool:
    """Whether a row can be split over the threads of a program."""
    return width % LANES == 0 and width <= MOST_WIDTH


# All norms of a model share a kernel, which is lowered once.
@functools.partial(jax.jit, static_argnames="epsilon")
def forward_rows(x_ND, update_TD, bias_D, scale_D, offset_D, *, epsilon):
    """The sum and its norm [N, D], mean and inverse deviation [N] float32."""
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    statistic = jax.ShapeDtypeStruct(x_ND.shape[:1], jnp.float32)
    return launch.call(
        functools.partial(_visit_forward, epsilon=epsilon),
        (like_x, like_x, statistic, statistic),
        programs=_programs("forward", len(x_ND)),
        groups=1,
        name="add_and_norm",
    )(x_ND, update_TD, bias_D, scale_D, offset_D)


def _programs(direction: str, rows: int) -> int:
    return min(rows, PROGRAMS[direction] * launch.multiprocessors())


def _visit_rows(inputs, visit, carry=()):
    """Folds `visit(row, rows of the inputs, carry)` over the rows of this program.

    The rows of an input with fewer rows than the first one are repeated.
    """
    count = inputs[0].shape[0]
    program, programs = launch.program()

    def load(row):
        row = jnp.minimum(row, count - 1)
        return [
            ref[row if ref.shape[0] == count else lax.rem(row, ref.shape[0])]
            for ref in inputs
        ]

    def turn(number, state):
        loaded, carry = state
        row = number * programs + program
        # Loading the next row here overlaps it with the computation of this one.
        following = load(row + programs)
        exact = [array.astype(jnp.float32) for array in loaded]
        return following, visit(row, exact, carry)

    turns = lax.div(count - program + programs - 1, programs)
    return lax.fori_loop(0, turns, turn, (load(program), carry))[1]


def _visit_forward(*references, epsilon: float):
    """Kernel: the rows of one program."""
    x_ref, update_ref, bias_ref, scale_ref, offset_ref = references[:5]
    sum_ref, normed_ref, mean_ref, inverse_deviation_ref = references[5:]
    width = x_ref.shape[1]
    bias_D, scale_D, offset_D = bias_ref[...], scale_ref[...], offset_ref[...]

    def visit(row, arrays, _):
        x_D, update_D = arrays
        rounded_D = (x_D + (update_D + bias_D)).astype(sum_ref.dtype)
        sum_ref[row] = rounded_D
        # The statistics are those of the rounded sum, which the backward pass reads.
        x_D = rounded_D.astype(jnp.float32)
        mean = jnp.sum(x_D) / width
        x_D -= mean
        inverse = lax.rsqrt(jnp.sum(x_D * x_D) / width + epsilon)
        normed_ref[row] = (x_D * inverse * scale_D + offset_D).astype(normed_ref.dtype)
        mean_ref[row] = mean
        inverse_deviation_ref[row] = inverse
        return ()

    _visit_rows([x_ref, update_ref], visit)


def backward_rows(of_sum_ND, of_normed_ND, sum_ND, scale_D, mean_N, inverse_N):
    """Gradients of x [N, D], and of bias, scale and offset [3, D] float32.

    The gradient of the sum may be None for 0.
    """
    of_results = of_normed_ND, of_sum_ND
    return _run_backward(
        [of_ND for of_ND in of_results if of_ND is not None],
        sum_ND,
        scale_D,
        mean_N,
        inverse_N,
    )


@jax.jit
def _run_backward(of_results, sum_ND, scale_D, mean_N, inverse_N):
    count, width = sum_ND.shape
    programs = _programs("backward", count)
    gradient_ND, parts_3PD = launch.call(
        functools.partial(_visit_backward, results=len(of_results)),
        (
            jax.ShapeDtypeStruct(sum_ND.shape, sum_ND.dtype),
            jax.ShapeDtypeStruct((3, programs, width), jnp.float32),
        ),
        programs=programs,
        groups=1,
        name="add_and_norm_gradient",
    )(*of_results, sum_ND, scale_D, mean_N, inverse_N)
    return gradient_ND, parts_3PD.sum(axis=1)


def _visit_backward(*references, results: int):
    """Kernel: the rows of one program, and their part of the parameters' gradients."""
    of_results, (sum_ref, scale_ref, mean_ref, *references) = (
        references[:results],
        references[results:],
    )
    inverse_deviation_ref, gradient_ref, of_parameters_ref = references
    width, scale_D = sum_ref.shape[1], scale_ref[...]

    def visit(row, arrays, totals):
        x_D, of_normed_D, *of_sum = arrays
        mean, inverse = mean_ref[row], inverse_deviation_ref[row]
        unit_D = (x_D - mean) * inverse
        slope_D = of_normed_D * scale_D
        mean_slope = jnp.sum(slope_D) / width
        mean_product = jnp.sum(slope_D * unit_D) / width
        of_sum_D = (slope_D - mean_slope - unit_D * mean_product) * inverse
        of_sum_D = sum(of_sum, of_sum_D)
        gradient_ref[row] = of_sum_D.astype(gradient_ref.dtype)
        terms = of_sum_D, of_normed_D * unit_D, of_normed_D
        return [t + x for t, x in zip(totals, terms, strict=True)]

    zeros = [jnp.zeros(width, jnp.float32)] * 3
    totals = _visit_rows([sum_ref, *of_results], visit, zeros)
    program, _ = launch.program()
    for number, total_D in enumerate(totals):
        of_parameters_ref[number, program] = total_D
