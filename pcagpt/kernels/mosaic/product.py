"""Products of matrices in tiles, with work at the end of each tile.

A program computes tiles of a product. One group of threads copies the factors to shared
memory, as far ahead as it has slots. Two others multiply, each the upper or lower half
of a tile, and finish it while the next factors arrive. A program computes all its tiles
in the same columns, so it can add up something for each column.

Shape letters: N rows, D depth of a product, F columns; r rows and c columns of a piece
of a tile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.mosaic import launch
from pcagpt.kernels.mosaic.streamed import HALVES, Slots, divide_work
from pcagpt.sharding import inside

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile; columns of a factor read at once
PIECE = 64  # rows and columns that a group finishes at a time
PIECES = COLUMNS // PIECE


def fits(rows: int, depth: int, columns: int, dtype) -> bool:
    """Whether a product of these sizes consists of whole tiles of bfloat16.

    `depth`: columns of the left factor.
    """
    return (
        launch.has_wgmma()
        and dtype == jnp.bfloat16
        and rows % (ROWS * inside.device_count()) == 0
        and depth % DEPTH == 0
        and columns % COLUMNS == 0
        and columns // COLUMNS <= launch.multiprocessors()
    )


class Work(NamedTuple):
    """What the multiplying groups do with tiles.

    finish: gets the place, `multiply(turn, meanwhile)`, references to further inputs
    and to the results, and what is in shared memory. While the first products run,
    `multiply` calls `meanwhile` if there is one. slots: pieces in shared memory on
    their way to the results, for each group; the more there are, the fewer factors fit
    beside them. scratch: makes further arrays in shared memory.
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
@functools.partial(jax.jit, static_argnames=("work", "results", "is_transposed"))
def run(left, right, *further, work: Work, results: tuple, is_transposed: bool = False):
    """The results of `work` with left @ right.

    results: their shapes and dtypes. is_transposed: the right factor is [F, D] and not
    [D, F]. The weights of a layer are so for its backward pass.
    """
    if is_transposed and launch.is_interpreted():  # It cannot transpose a factor.
        right, is_transposed = right.T, False
    dtype, stages = right.dtype, 4 if work.slots <= 2 else 3
    depth, width = right.shape[:: -1 if is_transposed else 1]

    def body(left_ref, right_ref, *references):
        further_refs = references[: len(further)]
        result_refs = references[len(further) :]

        def compute(left_smem, right_smem, slots, **scratch):
            place = Place(left.shape[0], depth, width)
            factors = left_smem, right_smem, Slots(*slots, stages), is_transposed
            divide_work(
                lambda: _copy_factors(place, left_ref, right_ref, *factors),
                lambda: work.finish(
                    place,
                    functools.partial(_multiply, place, *factors),
                    *further_refs,
                    result_refs,
                    **scratch,
                ),
            )

        launch.with_scratch(
            compute,
            left_smem=launch.shared((stages, ROWS, DEPTH), dtype, DEPTH),
            right_smem=launch.shared(
                (stages, *_oriented(is_transposed, DEPTH, COLUMNS)), dtype, PIECE
            ),
            slots=Slots.barriers(stages, copies=2),
            pieces=launch.shared((HALVES, work.slots, PIECE, PIECE), dtype, PIECE),
            **work.scratch(),
        )

    return launch.call(
        body,
        results,
        programs=programs(width)[0],
        groups=HALVES + 1,
        name=work.name,
    )(left, right, *further)


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


def _oriented(is_transposed: bool, rows, columns) -> tuple:
    """Sizes or places in a right factor."""
    return (columns, rows) if is_transposed else (rows, columns)


def _copy_factors(
    place: Place,
    left_ref,
    right_ref,
    left_smem,
    right_smem,
    slots: Slots,
    is_transposed: bool,
):
    @pl.loop(0, place.turns)
    def _(turn):
        rows, columns = pl.ds(place.row(turn), ROWS), pl.ds(place.column, COLUMNS)

        @pl.loop(0, place.steps)
        def _(step):
            depth = pl.ds(step * DEPTH, DEPTH)

            def copy(slot, loaded):
                at = _oriented(is_transposed, depth, columns)
                left, right = left_smem.at[slot], right_smem.at[slot]
                plgpu.copy_gmem_to_smem(left_ref.at[rows, depth], left, loaded)
                plgpu.copy_gmem_to_smem(right_ref.at[at], right, loaded)

            slots.fill(turn * place.steps + step, copy)

    slots.drain(place.turns * place.steps)


def _multiply(
    place: Place,
    left_smem,
    right_smem,
    slots: Slots,
    is_transposed: bool,
    turn,
    meanwhile: Callable[[], None] | None = None,
) -> jax.Array:
    """This group's half of a tile, [64, 256] float32."""
    half = pl.ds(place.half * PIECE, PIECE)

    def add_up(sum_ref):
        @pl.loop(0, place.steps)
        def _(step):
            count = turn * place.steps + step
            slots.take(count)
            slot = slots.of(count)
            right = right_smem.at[slot]
            right = right.transpose((1, 0)) if is_transposed else right
            plgpu.wgmma(sum_ref, left_smem.at[slot, half], right)
            plgpu.wgmma_wait(1)  # The product before this one has read its factors.

            if meanwhile is not None:
                # At the first step, it may have to wait for copies of the last tile.
                @pl.when(step == min(1, place.steps - 1))
                def _():
                    meanwhile()

            @pl.when(step > 0)
            def _():
                slots.release(count - 1)

        plgpu.wgmma_wait(0)
        slots.release(turn * place.steps + place.steps - 1)
        return sum_ref[...]

    return pl.run_scoped(add_up, plgpu.ACC((PIECE, COLUMNS), jnp.float32))


def columns_of(number: int) -> slice:
    """Those of a piece in its tile."""
    return slice(number * PIECE, (number + 1) * PIECE)


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
