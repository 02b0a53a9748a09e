"""Products of matrices in tiles, with work at the end of each tile.

A program computes tiles of a product. One group of threads copies the factors to shared
memory, as far ahead as it has slots. Two others multiply, each the upper or lower half
of a tile, and finish it while the next factors arrive. A program computes all its tiles
in the same columns, so it can add up something for each column.

Shape letters: N rows, D depth of the product (d: of a part of the left factor), F
columns; r rows and c columns of a piece of a tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.mosaic import launch
from pcagpt.sharding import inside

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile; columns of a factor read at once
PIECE = 64  # rows and columns that a group finishes at a time
HALVES = 2  # of a tile, one for each multiplying group
PIECES = COLUMNS // PIECE
REGISTERS = {"copy": 40, "multiply": 232}  # of each thread


def fits(rows: int, depth: int, columns: int, dtype) -> bool:
    """Whether a product of these sizes consists of whole tiles of bfloat16.

    `depth`: columns of each part of the left factor.
    """
    return (
        launch.has_wgmma()
        and dtype == jnp.bfloat16
        and rows % (ROWS * inside.device_count()) == 0
        and depth % DEPTH == 0
        and columns % COLUMNS == 0
        and columns // COLUMNS <= launch.multiprocessors()
    )


def of_parts(parts_Nd: Sequence[jax.Array], b_DF: jax.Array) -> jax.Array:
    """concatenate(parts, axis=1) @ b, without joining the parts: [N, F] bfloat16.

    Each device has its own rows of the parts. The product is added up in float32.
    """
    (product_NF,) = _of_parts(tuple(parts_Nd), b_DF)
    return product_NF


@inside.by_device([True, False], [True])
def _of_parts(parts_Nd, b_DF):
    result = jax.ShapeDtypeStruct((len(parts_Nd[0]), b_DF.shape[1]), b_DF.dtype)
    return run(parts_Nd, b_DF, work=_STORING, results=(result,))


class Work(NamedTuple):
    """What the multiplying groups do with tiles.

    finish: gets the place, `multiply(turn)`, references to further inputs and to the
    results, and what is in shared memory. slots: pieces in shared memory on their way
    to the results, for each group; the more there are, the fewer factors fit beside
    them. scratch: makes further arrays in shared memory.
    """

    name: str
    finish: Callable
    slots: int
    scratch: Callable[[], dict] = dict


def programs(columns: int) -> tuple[int, int]:
    """Number of programs, and of those that share the columns of a tile."""
    tiles = columns // COLUMNS
    sharing = launch.multiprocessors() // tiles
    return tiles * sharing, sharing


# All blocks share a kernel, which is lowered once.
@functools.partial(jax.jit, static_argnames=("work", "results"))
def run(parts_Nd: tuple, b_DF, *further, work: Work, results: tuple):
    """The results of `work` with the product of a matrix in parts and b.

    results: their shapes and dtypes.
    """
    dtype, stages = b_DF.dtype, 4 if work.slots <= 2 else 3

    def split(references, count):
        return references[:count], references[count:]

    def body(*references):
        a_refs, (b_ref, *others) = split(references, len(parts_Nd))
        further_refs, result_refs = split(others, len(further))

        def compute(a_smem, b_smem, loaded, used, **scratch):
            place = Place(a_refs[0].shape[0], *b_ref.shape)
            factors = a_smem, b_smem, loaded, used

            @pl.when(launch.group() == HALVES)
            def _():
                plgpu.set_max_registers(REGISTERS["copy"], action="decrease")
                _copy_factors(place, a_refs, b_ref, *factors)

            @pl.when(launch.group() < HALVES)
            def _():
                plgpu.set_max_registers(REGISTERS["multiply"], action="increase")
                work.finish(
                    place,
                    functools.partial(_multiply, place, *factors),
                    *further_refs,
                    result_refs,
                    **scratch,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        launch.with_scratch(
            compute,
            a_smem=launch.shared((stages, ROWS, DEPTH), dtype, DEPTH),
            b_smem=launch.shared((stages, DEPTH, COLUMNS), dtype, PIECE),
            loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            used=plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
            pieces=launch.shared((HALVES, work.slots, PIECE, PIECE), dtype, PIECE),
            **work.scratch(),
        )

    return launch.call(
        body,
        results,
        programs=programs(b_DF.shape[1])[0],
        groups=HALVES + 1,
        name=work.name,
    )(*parts_Nd, b_DF, *further)


class Place:
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


def _copy_factors(place: Place, a_refs, b_ref, a_smem, b_smem, loaded, used):
    stages, steps_of_part = a_smem.shape[0], place.steps // len(a_refs)

    @pl.loop(0, place.turns)
    def _(turn):
        rows, columns = pl.ds(place.row(turn), ROWS), pl.ds(place.column, COLUMNS)
        for part, a_ref in enumerate(a_refs):

            @pl.loop(0, steps_of_part)
            def _(step_of_part, part=part, a_ref=a_ref):
                step = part * steps_of_part + step_of_part
                count = turn * place.steps + step
                slot = lax.rem(count, stages)

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                plgpu.copy_gmem_to_smem(
                    a_ref.at[rows, pl.ds(step_of_part * DEPTH, DEPTH)],
                    a_smem.at[slot],
                    loaded.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    b_ref.at[pl.ds(step * DEPTH, DEPTH), columns],
                    b_smem.at[slot],
                    loaded.at[slot],
                )

    # The interpreter wants every arrival at a barrier to be seen.
    count = place.turns * place.steps

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(past):
        plgpu.barrier_wait(used.at[lax.rem(past, stages)])


def _multiply(place: Place, a_smem, b_smem, loaded, used, turn) -> jax.Array:
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


def columns_of(number: int) -> slice:
    """Those of a piece in its tile."""
    return slice(number * PIECE, (number + 1) * PIECE)


def _store(place: Place, multiply, results, pieces):
    """Stores the product as it is."""

    @pl.loop(0, place.turns)
    def _(turn):
        product_rc = multiply(turn)
        for number in range(PIECES):
            piece_rc = product_rc[:, columns_of(number)]
            target = results[0].at[place.piece(turn, number)]
            copy_out(pieces, place.half, number, piece_rc, target)


_STORING = Work("product_of_parts", _store, slots=2)


def copy_out(pieces, half, count: int, piece_rc, target) -> None:
    """Copies a piece to the target.

    `count` numbers the copies of a tile; a tile's are a multiple of the slots.
    """
    slots = pieces.shape[1]
    slot = count % slots
    # The copy that last read this slot has ended.
    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
    pieces[half, slot] = piece_rc.astype(pieces.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(pieces.at[half, slot], target)
