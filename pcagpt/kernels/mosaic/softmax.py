"""Cross entropy and its gradient in one kernel over stored logits.

A program copies a row to shared memory, computes there, and copies the gradient back.
Each element is read and written once. A multiprocessor runs two programs, so that one
can compute while the other copies.

Shape letters: n tokens, V columns; l lines of 128 columns, b of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.constants import LOG2_E
from pcagpt.kernels.mosaic import launch
from pcagpt.sharding import inside

LANES = 128  # columns of a line: one for each thread of a group
BLOCK = 40  # lines that a group computes at a time
MOST_COPIED = 256  # lines of one copy
PROGRAMS = 2  # of a multiprocessor
OTHER_BYTES = 4096  # of a program: barriers, sums of warps, and what the GPU keeps


def fits(width: int, dtype) -> bool:
    """Whether two rows of this width fit in shared memory."""
    row_bytes = _lines(width)[1] * LANES * jnp.dtype(dtype).itemsize
    most = launch.shared_bytes() // PROGRAMS - OTHER_BYTES
    return width % LANES == 0 and row_bytes <= most


def _lines(width: int) -> tuple[int, int]:
    """Number of lines, and the same as whole blocks."""
    count = width // LANES
    return count, -(-count // BLOCK) * BLOCK


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
    rows = jax.new_ref(
        logits_nV.reshape(count, width // LANES, LANES), memory_space=plgpu.GMEM
    )
    loss_n = launch.call(
        functools.partial(_visit, size=size),
        jax.ShapeDtypeStruct((count,), jnp.float32),
        programs=min(count, PROGRAMS * launch.multiprocessors()),
        groups=1,
        name="softmax_loss_and_gradient",
    )(rows, targets_n)
    return loss_n, jax.freeze(rows).reshape(count, width)


def _visit(rows_ref, target_ref, loss_ref, *, size: int):
    count, lines, _ = rows_ref.shape
    whole = _lines(lines * LANES)[1]
    copies = [
        pl.ds(first, min(MOST_COPIED, lines - first))
        for first in range(0, lines, MOST_COPIED)
    ]
    first_program, programs = launch.program()

    def visit_rows(row_lc, loaded):
        @pl.loop(0, lax.div(count - first_program + programs - 1, programs))
        def _(turn):
            row = turn * programs + first_program
            for place in copies:
                plgpu.copy_gmem_to_smem(
                    rows_ref.at[row, place], row_lc.at[place], loaded
                )
            plgpu.barrier_wait(loaded)
            loss_ref[row] = _replace_by_gradient(row_lc, target_ref[row], size)
            plgpu.commit_smem()
            for place in copies:
                plgpu.copy_smem_to_gmem(row_lc.at[place], rows_ref.at[row, place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    launch.with_scratch(
        visit_rows,
        row_lc=launch.shared((whole, LANES), rows_ref.dtype),
        loaded=plgpu.Barrier(num_arrivals=len(copies)),
    )


def _replace_by_gradient(row_lc, target, size: int) -> jax.Array:
    """Overwrites the logits of a row by their gradient and returns the loss."""
    blocks, full_blocks = row_lc.shape[0] // BLOCK, size // (BLOCK * LANES)
    place = (
        lax.div(jnp.maximum(target, 0), LANES),
        lax.rem(jnp.maximum(target, 0), LANES),
    )
    target_exponent = row_lc[place].astype(jnp.float32) * LOG2_E

    def exponent_at(block, is_full):
        exponent_bc = (
            row_lc[pl.ds(block * BLOCK, BLOCK), :].astype(jnp.float32) * LOG2_E
        )
        if is_full:
            return exponent_bc
        line_bc = lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 0) + block * BLOCK
        column_bc = line_bc * LANES + lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 1)
        return jnp.where(column_bc < size, exponent_bc, -jnp.inf)

    def over_blocks(function, start):
        """Folds all blocks; only the last ones need a mask."""
        result = lax.fori_loop(
            0, full_blocks, lambda block, carry: function(block, carry, True), start
        )
        for block in range(full_blocks, blocks):
            result = function(block, result, False)
        return result

    highest_bc = over_blocks(
        lambda block, found, is_full: jnp.maximum(found, exponent_at(block, is_full)),
        jnp.full((BLOCK, LANES), -jnp.inf, jnp.float32),
    )
    highest = jnp.max(highest_bc)
    sum_bc = over_blocks(
        lambda block, sum_, is_full: (
            sum_ + jnp.exp2(exponent_at(block, is_full) - highest)
        ),
        jnp.zeros((BLOCK, LANES), jnp.float32),
    )
    normaliser = highest + jnp.log2(jnp.sum(sum_bc))
    loss = jnp.where(target >= 0, (normaliser - target_exponent) / LOG2_E, 0.0)
    # An infinite normaliser makes all probabilities, and so the gradient, 0.
    normaliser = jnp.where(target >= 0, normaliser, jnp.inf)

    def write(block, _, is_full):
        p_bc = jnp.exp2(exponent_at(block, is_full) - normaliser)
        row_lc[pl.ds(block * BLOCK, BLOCK), :] = p_bc.astype(row_lc.dtype)

    over_blocks(write, None)
    plgpu.commit_smem()  # No thread may write the target's element after this.

    @pl.when(target >= 0)
    def _():
        p = jnp.exp2(target_exponent - normaliser)
        row_lc[place] = (p - 1.0).astype(row_lc.dtype)

    return loss
