"""The MLP of a block; GELU and its gradient are at the end of the products around it.

So no kernel reads the hidden layer only to apply GELU to it. A program computes tiles
of a product. One group of threads copies the factors to shared memory, as far ahead as
it has slots. Two others multiply, each the upper or lower half of a tile, and finish it
while the next factors arrive. A program computes all its tiles in the same columns, so
it can add up the gradient of their bias.

Shape letters: N tokens, D model width, F = 4D hidden units, P parts of a sum; r rows
and c columns of a piece of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.constants import CUBIC, LOG2_E, TWICE_SCALE
from pcagpt.kernels.mosaic import launch
from pcagpt.sharding import inside

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile; columns of a factor read at once
PIECE = 64  # rows and columns that a group finishes at a time
HALVES = 2  # of a tile, one for each multiplying group
PIECES = COLUMNS // PIECE
REGISTERS = {"copy": 40, "multiply": 232}  # of each thread


def fits(tokens: int, width: int, hidden: int, dtype) -> bool:
    """Whether products of these sizes consist of whole tiles of bfloat16."""
    devices = inside.device_count()
    return (
        launch.has_wgmma()
        and dtype == jnp.bfloat16
        and tokens % (ROWS * devices) == 0
        and width % DEPTH == 0
        and hidden % COLUMNS == 0
        and hidden // COLUMNS <= launch.multiprocessors()
    )


# XLA cannot differentiate a kernel.
@jax.custom_vjp
def mlp(x_ND, fc_DF, bias_F, proj_FD) -> jax.Array:
    """gelu(x @ fc + bias) @ proj, tanh form: [N, D].

    x, fc, proj and the result are bfloat16, the bias is float32. Products are added up
    and GELU is computed in float32.
    """
    (gelu_NF,) = _gelu_product(x_ND, fc_DF, bias_F, keeps_h=False)
    return gelu_NF @ proj_FD


def _forward(x_ND, fc_DF, bias_F, proj_FD):
    h_NF, gelu_NF = _gelu_product(x_ND, fc_DF, bias_F, keeps_h=True)
    return gelu_NF @ proj_FD, (x_ND, h_NF, gelu_NF, fc_DF, proj_FD)


def _backward(residuals, of_y_ND):
    x_ND, h_NF, gelu_NF, fc_DF, proj_FD = residuals
    of_h_NF, of_bias_F = _product_gelu_gradient(of_y_ND, proj_FD.T, h_NF)
    of_fc_DF, of_proj_FD = x_ND.T @ of_h_NF, gelu_NF.T @ of_y_ND
    return of_h_NF @ fc_DF.T, of_fc_DF, of_bias_F, of_proj_FD


mlp.defvjp(_forward, _backward)


def _gelu_product(x_ND, fc_DF, bias_F, *, keeps_h: bool):
    """h = x @ fc + bias if it is kept, and gelu(h): [N, F] in the dtype of x."""

    @inside.by_device([True, False, False], [True] * (1 + keeps_h))
    def of_rows(x_ND, fc_DF, bias_F):
        result = jax.ShapeDtypeStruct((len(x_ND), fc_DF.shape[1]), x_ND.dtype)
        results = (result,) * (1 + keeps_h)
        return _run(x_ND, fc_DF, bias_F, finish=_finish_gelu, results=results, slots=2)

    return of_rows(x_ND, fc_DF, bias_F)


@inside.by_device([True, False, True], [True, False])
def _product_gelu_gradient(of_y_ND, proj_DF, h_NF):
    """Gradients of h = x @ fc + bias [N, F] and of the bias [F] float32."""
    width = h_NF.shape[1]
    parts = HALVES * _programs(width)[1]
    results = (
        jax.ShapeDtypeStruct(h_NF.shape, h_NF.dtype),
        jax.ShapeDtypeStruct((parts, width), jnp.float32),
    )
    of_h_NF, parts_PF = _run(
        of_y_ND, proj_DF, h_NF, finish=_finish_gradient, results=results, slots=PIECES
    )
    return of_h_NF, parts_PF.sum(axis=0)


def _programs(width: int) -> tuple[int, int]:
    """Number of programs, and of those that share the columns of a tile."""
    tiles = width // COLUMNS
    sharing = launch.multiprocessors() // tiles
    return tiles * sharing, sharing


@functools.partial(jax.jit, static_argnames=("finish", "results", "slots"))
def _run(a_ND, b_DF, extra, *, finish, results, slots: int):
    """The product of a and b, finished by `finish`; all blocks share one kernel.

    `slots`: pieces in shared memory on their way to the results, for each group. The
    more there are, the fewer factors fit beside them.
    """
    dtype, stages = a_ND.dtype, 4 if slots <= 2 else 3
    width = b_DF.shape[1]

    def body(a_ref, b_ref, extra_ref, *result_refs):
        def run(a_smem, b_smem, loaded, used, **scratch):
            place = _Place(*a_ref.shape, width)
            factors = a_smem, b_smem, loaded, used

            @pl.when(launch.group() == HALVES)
            def _():
                plgpu.set_max_registers(REGISTERS["copy"], action="decrease")
                _copy_factors(place, a_ref, b_ref, *factors)

            @pl.when(launch.group() < HALVES)
            def _():
                plgpu.set_max_registers(REGISTERS["multiply"], action="increase")
                finish(
                    place,
                    functools.partial(_multiply, place, *factors),
                    extra_ref,
                    result_refs,
                    **scratch,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        launch.with_scratch(
            run,
            a_smem=launch.shared((stages, ROWS, DEPTH), dtype, DEPTH),
            b_smem=launch.shared((stages, DEPTH, COLUMNS), dtype, PIECE),
            loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            used=plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
            pieces=launch.shared((HALVES, slots, PIECE, PIECE), dtype, PIECE),
            ready=plgpu.Barrier(num_barriers=HALVES * slots),
            numbers=launch.shared((HALVES, COLUMNS), jnp.float32),
            **_scratch_of(finish, dtype),
        )

    programs = _programs(width)[0]
    return launch.call(
        body,
        results,
        programs=programs,
        groups=HALVES + 1,
        name=finish.__name__.replace("_finish", "mlp"),
    )(a_ND, b_DF, extra)


class _Place:
    """Where a program and a group of it work."""

    def __init__(self, tokens: int, depth: int, width: int):
        self.steps = depth // DEPTH
        tiles = width // COLUMNS
        program, programs = launch.program()
        self.sharing = programs // tiles  # Programs with the same columns.
        self.part, self.column = (
            lax.div(program, tiles),
            lax.rem(program, tiles) * COLUMNS,
        )
        more = tokens // ROWS - self.part + self.sharing - 1
        self.turns = lax.div(more, self.sharing)
        self.half = launch.group()

    def row(self, turn) -> jax.Array:
        """First row of the tile of this turn."""
        return (turn * self.sharing + self.part) * ROWS

    def piece(self, turn, number: int) -> tuple:
        """The rows and columns of a piece of this group's half."""
        row = self.row(turn) + self.half * PIECE
        return pl.ds(row, PIECE), pl.ds(self.column + number * PIECE, PIECE)


def _copy_factors(place: _Place, a_ref, b_ref, a_smem, b_smem, loaded, used):
    stages = a_smem.shape[0]

    @pl.loop(0, place.turns)
    def _(turn):
        @pl.loop(0, place.steps)
        def _(step):
            count = turn * place.steps + step
            slot = lax.rem(count, stages)

            @pl.when(count >= stages)
            def _():
                plgpu.barrier_wait(used.at[slot])

            depth = pl.ds(step * DEPTH, DEPTH)
            rows, columns = pl.ds(place.row(turn), ROWS), pl.ds(place.column, COLUMNS)
            plgpu.copy_gmem_to_smem(
                a_ref.at[rows, depth], a_smem.at[slot], loaded.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                b_ref.at[depth, columns], b_smem.at[slot], loaded.at[slot]
            )

    # The interpreter wants every arrival at a barrier to be seen.
    count = place.turns * place.steps

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(past):
        plgpu.barrier_wait(used.at[lax.rem(past, stages)])


def _multiply(place: _Place, a_smem, b_smem, loaded, used, turn) -> jax.Array:
    """This group's half of a tile, [64, 256] float32."""
    stages, half = a_smem.shape[0], pl.ds(place.half * PIECE, PIECE)

    def add_up(sum_ref):
        @pl.loop(0, place.steps)
        def _(step):
            count = turn * place.steps + step
            slot = lax.rem(count, stages)
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.wgmma(sum_ref, a_smem.at[slot, half], b_smem.at[slot])
            plgpu.wgmma_wait(1)  # The product before this one has read its factors.

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(used.at[lax.rem(count - 1, stages)])

        plgpu.wgmma_wait(0)
        last = turn * place.steps + place.steps - 1
        plgpu.barrier_arrive(used.at[lax.rem(last, stages)])
        return sum_ref[...]

    return pl.run_scoped(add_up, plgpu.ACC((PIECE, COLUMNS), jnp.float32))


def _columns_of(number: int) -> slice:
    return slice(number * PIECE, (number + 1) * PIECE)


def _finish_gelu(place: _Place, multiply, bias_ref, results, pieces, ready, numbers):
    """Adds the bias and applies GELU; the first of two results is the sum before it."""
    slots, half = pieces.shape[1], place.half
    plgpu.copy_gmem_to_smem(
        bias_ref.at[pl.ds(place.column, COLUMNS)], numbers.at[half], ready.at[half]
    )
    plgpu.barrier_wait(ready.at[half])

    @pl.loop(0, place.turns)
    def _(turn):
        product_rc = multiply(turn)
        for number in range(PIECES):
            bias_c = numbers[half, pl.ds(number * PIECE, PIECE)]
            h_rc = product_rc[:, _columns_of(number)]
            h_rc += lax.broadcast_in_dim(bias_c, h_rc.shape, [1])
            values = [h_rc, h_rc * _sigmoid(h_rc)][-len(results) :]
            for index, value_rc in enumerate(values):
                slot = (number * len(results) + index) % slots
                # The copy that last read this slot has ended.
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                pieces[half, slot] = value_rc.astype(pieces.dtype)
                plgpu.commit_smem()
                target = results[index].at[place.piece(turn, number)]
                plgpu.copy_smem_to_gmem(pieces.at[half, slot], target)


def _finish_gradient(
    place: _Place, multiply, h_ref, results, pieces, ready, numbers, ones, turned=None
):
    """Multiplies by GELU's derivative at h, and adds up each column."""
    of_h_ref, sums_ref = results
    half = place.half
    ones[...] = jnp.ones(ones.shape, ones.dtype)  # Both groups write the same.

    def visit_tile(turn, sums):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(PIECES):
            plgpu.copy_gmem_to_smem(
                h_ref.at[place.piece(turn, number)],
                pieces.at[half, number],
                ready.at[half * PIECES + number],
            )
        product_rc = multiply(turn)
        for number in range(PIECES):
            plgpu.barrier_wait(ready.at[half * PIECES + number])
            derivative_rc = _derivative(pieces[half, number].astype(jnp.float32))
            of_h_rc = product_rc[:, _columns_of(number)] * derivative_rc
            pieces[half, number] = of_h_rc.astype(pieces.dtype)
        plgpu.commit_smem()
        for number in range(PIECES):
            target = of_h_ref.at[place.piece(turn, number)]
            plgpu.copy_smem_to_gmem(pieces.at[half, number], target)
        return [
            sum_c + _column_sums(pieces.at[half, number], ones, turned)
            for number, sum_c in enumerate(sums)
        ]

    zeros = [jnp.zeros(PIECE, jnp.float32)] * PIECES
    sums = lax.fori_loop(0, place.turns, visit_tile, zeros)
    for number, sum_c in enumerate(sums):
        numbers[half, pl.ds(number * PIECE, PIECE)] = sum_c
    plgpu.commit_smem()
    part = place.part * HALVES + half
    target = sums_ref.at[part, pl.ds(place.column, COLUMNS)]
    plgpu.copy_smem_to_gmem(numbers.at[half], target)


def _scratch_of(finish, dtype) -> dict:
    """Further arrays in shared memory."""
    if finish is not _finish_gradient:
        return {}
    ones = launch.shared((PIECE, PIECE), dtype, PIECE)
    if not launch.is_interpreted():
        return {"ones": ones}
    return {"ones": ones, "turned": launch.shared((HALVES, PIECE, PIECE), dtype)}


def _column_sums(piece_rc, ones, turned) -> jax.Array:
    """Sums of the columns of a piece in shared memory, [64] float32.

    A sum over rows would need several warps, which share no memory of their own. A
    product with ones gives each sum to all threads of its row.
    """
    left = piece_rc.transpose((1, 0)) if turned is None else turned.at[launch.group()]
    if turned is not None:  # The interpreter cannot turn a factor.
        left[...] = piece_rc[...].T

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, left, ones)
        plgpu.wgmma_wait(0)
        return sum_ref[...][:, :8].max(axis=1)  # All columns are the same.

    return pl.run_scoped(multiply, plgpu.ACC((PIECE, PIECE), jnp.float32))


def _sigmoid(h_rc):
    """sigmoid(2 * u(h)); see `constants`."""
    exponent_rc = h_rc * (CUBIC * h_rc * h_rc + 1.0) * (-TWICE_SCALE * LOG2_E)
    root_rc = lax.rsqrt(1.0 + jnp.exp2(exponent_rc))
    return root_rc * root_rc  # A division would take longer.


def _derivative(h_rc):
    """The derivative of h * sigmoid(2 * u(h))."""
    sigmoid_rc = _sigmoid(h_rc)
    slope_rc = h_rc * ((3.0 * CUBIC * TWICE_SCALE) * h_rc * h_rc + TWICE_SCALE)
    return sigmoid_rc + slope_rc * (sigmoid_rc - sigmoid_rc * sigmoid_rc)
