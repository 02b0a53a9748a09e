"""The output head's softmax and gradients as attention, without an [N, V] array.

`triton.low_rank_head` explains the method. A program keeps a tile of an array in shared
memory: of the tokens for the softmax, of the table for its gradient. It streams the
tiles of the other array.

Shape letters: N tokens, V rows of a table, K rank; h rows of half of the kept tile, s
rows of a streamed tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.constants import LOG2_E
from pcagpt.kernels.mosaic import launch
from pcagpt.kernels.mosaic.streamed import (
    HALF,
    HALVES,
    Products,
    Slots,
    columns,
    divide_work,
    rows,
)
from pcagpt.sharding import inside

KEPT = HALVES * HALF
STREAMED = 128  # rows of a streamed tile
SLOTS = 4  # streamed tiles in shared memory; at least 3: two used, one awaited
WIDTH = 64  # of the columns that products read; the rank is padded to a multiple
MAX_RANK = 128  # Results of a higher rank do not fit in the registers.
MARGIN = 32  # Weights are at most 2**-MARGIN at first; later ones may be higher.
LARGEST_SUM = 2.0**96  # Products of a larger one with the table could overflow.


def fits(rank: int, dtype) -> bool:
    """Whether the kernels support a table of that rank."""
    return launch.has_wgmma() and dtype == jnp.bfloat16 and rank <= MAX_RANK


@functools.partial(jax.jit, static_argnames="size")  # References only work in `jit`.
def summarize(
    z_NK: jax.Array, wte_VK: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """log(sum(exp(z @ wte[:size].T))) [N], and the mean row under the softmax [N, K].

    Both are float32; z and wte are bfloat16. Only the first `size` rows of wte count;
    the others are padding.
    """
    rank = z_NK.shape[1]
    wte_VK = _pad(wte_VK, STREAMED)

    @inside.by_device([True, False], [True, True])
    def of_rows(z_NK, wte_VK):
        count = z_NK.shape[0]
        z_NK = _pad(z_NK, KEPT)
        tiles = z_NK.shape[0] // KEPT
        normaliser_N, mean_NK = launch.call(
            functools.partial(_summarize, size=size),
            (
                jax.ShapeDtypeStruct(z_NK.shape[:1], jnp.float32),
                jax.ShapeDtypeStruct(z_NK.shape, jnp.float32),
            ),
            programs=min(tiles, launch.multiprocessors()),
            groups=HALVES + 1,
            name="head_summarize",
        )(z_NK, wte_VK)
        is_lost = ~jnp.isfinite(normaliser_N).reshape(tiles, KEPT).all(axis=1)
        refs = [
            jax.new_ref(array, memory_space=plgpu.GMEM)
            for array in (normaliser_N, mean_NK)
        ]
        launch.call(
            functools.partial(_summarize_lost, size=size),
            (),
            programs=tiles,
            groups=HALVES + 1,
            name="head_summarize_lost",
        )(z_NK, wte_VK, is_lost.astype(jnp.int32), *refs)
        normaliser_N, mean_NK = (ref[...] for ref in refs)
        return normaliser_N[:count], mean_NK[:count, :rank]

    return of_rows(z_NK, wte_VK)


def _summarize(z_ref, wte_ref, normaliser_ref, mean_ref, *, size: int):
    """Kernel: keeps a tile of tokens and streams the table.

    Weights are relative to the highest logit of the first streamed tile: a running
    maximum would take a tenth of the kernel's time. A sum that is too large becomes
    infinite.
    """
    first, programs = launch.program()
    turns = lax.div(z_ref.shape[0] // KEPT - first + programs - 1, programs)
    _visit_table(turns, False, z_ref, wte_ref, normaliser_ref, mean_ref, size)


def _summarize_lost(z_ref, wte_ref, is_lost_ref, normaliser_ref, mean_ref, *, size):
    """Kernel: the same with a running maximum, for tiles with a sum that was too large.

    Each program has one tile. Most have nothing to do.
    """
    turns = is_lost_ref[launch.program()[0]]
    _visit_table(turns, True, z_ref, wte_ref, normaliser_ref, mean_ref, size)


def _visit_table(
    turns, follows_highest: bool, z_ref, wte_ref, normaliser_ref, mean_ref, size: int
):
    """Both kernels: `turns` tiles of tokens, each with the whole table."""
    steps = pl.cdiv(size, STREAMED)
    first, programs = launch.program()

    def copy(turn, step, slot, streamed, loaded, normaliser):
        del normaliser
        # The first tile is the table's last, which alone needs a mask.
        tile = lax.rem(step + steps - 1, steps)
        rows = pl.ds(tile * STREAMED, STREAMED)
        plgpu.copy_gmem_to_smem(wte_ref.at[rows], streamed.at[slot], loaded)

    def multiply(group, tiles, normaliser):
        @pl.loop(0, turns)
        def _(turn):
            place = pl.ds(((turn * programs + first) * HALVES + group) * HALF, HALF)
            tiles.keep(z_ref.at[place])

            def weigh(products, carry, slot, is_first):
                (logit_hs,), (base_h, sum_h, shrink_h) = products, carry
                if is_first:
                    column_hs = lax.broadcasted_iota(jnp.int32, logit_hs.shape, 1)
                    is_real_hs = column_hs < size - (steps - 1) * STREAMED
                    logit_hs = jnp.where(is_real_hs, logit_hs, -jnp.inf)
                if is_first or follows_highest:
                    highest_h = logit_hs.max(axis=1) * LOG2_E + MARGIN
                    new_base_h = jnp.maximum(base_h, highest_h)
                    # The sums so far are relative to the old base.
                    shrink_h = jnp.exp2(base_h - new_base_h)
                    base_h, sum_h = new_base_h, sum_h * shrink_h
                # One instruction multiplies and subtracts.
                p_hs = jnp.exp2(logit_hs * LOG2_E - columns(base_h, STREAMED))
                return (p_hs,), (base_h, sum_h + p_hs.sum(axis=1), shrink_h)

            def shrink(sums, carry):
                if not follows_highest:
                    return sums
                return (sums[0] * columns(carry[2], sums[0].shape[1]),)

            zeros = jnp.zeros(HALF, jnp.float32)
            start = jnp.full(HALF, -jnp.inf, jnp.float32), zeros, zeros
            mean_hK, (base_h, sum_h, _) = tiles.fold(turn, weigh, shrink, start)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            total_h = jnp.where(sum_h < LARGEST_SUM, sum_h, jnp.inf)
            normaliser[group] = (base_h + jnp.log2(total_h)) * (1 / LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(normaliser.at[group], normaliser_ref.at[place])
            mean_hK *= columns(1 / sum_h, mean_hK.shape[1])
            tiles.write(mean_hK, mean_ref.at[place])

    scratch = {"normaliser": launch.shared((HALVES, HALF), jnp.float32)}
    _run(copy, multiply, turns, steps, z_ref, 1, **scratch)


def table_gradient(
    wte_VK: jax.Array, z_NK: jax.Array, normaliser_N: jax.Array, targets_N: jax.Array
) -> jax.Array:
    """(exp(z @ wte.T - normaliser[:, None]) - onehot(targets)).T @ z: [V, K] float32.

    Sums over the tokens of one device; call it inside `inside.by_device`. A token with
    an infinite normaliser has probability 0 in every row. A target that is
    negative or at least V matches no row.
    """
    size, rank = wte_VK.shape
    # The kernel would take longer, because it would compare each row with each target.
    own_row_N = jnp.where(targets_N < 0, size, targets_N)
    occurrences_VK = jnp.zeros((size, rank), jnp.float32)
    occurrences_VK = occurrences_VK.at[own_row_N].add(z_NK, mode="drop")
    wte_VK = _pad(wte_VK, KEPT)
    tiles, steps = wte_VK.shape[0] // KEPT, pl.cdiv(z_NK.shape[0], STREAMED)
    splits = _splits(tiles, steps)
    z_NK = _pad(z_NK, STREAMED * splits)
    padding = z_NK.shape[0] - normaliser_N.shape[0]
    normaliser_N = jnp.pad(normaliser_N, (0, padding), constant_values=jnp.inf)
    parts = launch.call(
        functools.partial(_table_gradient, splits=splits),
        jax.ShapeDtypeStruct((splits, *wte_VK.shape), jnp.float32),
        programs=min(tiles * splits, launch.multiprocessors()),
        groups=HALVES + 1,
        name="head_table_gradient",
    )(wte_VK, z_NK, normaliser_N * LOG2_E)
    return parts.sum(axis=0)[:size, :rank] - occurrences_VK


def _splits(tiles: int, steps: int) -> int:
    """Number of parts of the tokens, so that all programs get about equal work."""

    def cost(splits):  # of the program with the most work
        return pl.cdiv(tiles * splits, launch.multiprocessors()) * (
            pl.cdiv(steps, splits) + 2
        )

    costs = [cost(n) for n in range(1, min(steps, launch.multiprocessors()) + 1)]
    # Each part stores a table, so 5 % less work is not worth another one.
    return next(n for n, cost in enumerate(costs, 1) if cost <= 1.05 * min(costs))


def _table_gradient(wte_ref, z_ref, normaliser_ref, gradient_ref, *, splits: int):
    """Kernel: keeps a tile of the table and streams the tokens."""
    steps = z_ref.shape[0] // (STREAMED * splits)
    first, programs = launch.program()
    items = wte_ref.shape[0] // KEPT * splits
    turns = lax.div(items - first + programs - 1, programs)

    def copy(turn, step, slot, streamed, loaded, normaliser):
        split = lax.rem(turn * programs + first, splits)
        rows = pl.ds((split * steps + step) * STREAMED, STREAMED)
        plgpu.copy_gmem_to_smem(z_ref.at[rows], streamed.at[slot], loaded)
        plgpu.copy_gmem_to_smem(normaliser_ref.at[rows], normaliser.at[slot], loaded)

    def multiply(group, tiles, normaliser):
        @pl.loop(0, turns)
        def _(turn):
            item = turn * programs + first
            row = (lax.div(item, splits) * HALVES + group) * HALF
            place = pl.ds(row, HALF)
            tiles.keep(wte_ref.at[place])

            def weigh(products, carry, slot, is_first):
                del is_first
                exponent_hs = products[0] * LOG2_E - rows(normaliser[slot], HALF)
                return (jnp.exp2(exponent_hs),), carry

            gradient_hK, _ = tiles.fold(turn, weigh, lambda sums, _: sums, ())
            tiles.write(gradient_hK, gradient_ref.at[lax.rem(item, splits), place])

    scratch = {"normaliser": launch.shared((SLOTS, STREAMED), normaliser_ref.dtype)}
    _run(copy, multiply, turns, steps, wte_ref, 2, **scratch)


def _pad(rows_XK, multiple: int) -> jax.Array:
    """Adds rows of zeros up to a multiple, and columns up to one of WIDTH."""
    count, rank = rows_XK.shape
    return jnp.pad(rows_XK, ((0, -count % multiple), (0, -rank % WIDTH)))


def _run(copy, multiply, turns, steps: int, kept_ref, copies: int, **numbers):
    """Runs `copy` for each streamed tile in one group, and `multiply` in two others.

    copies: those that `copy` makes for a tile. numbers: further arrays in shared
    memory, for both.
    """
    rank, dtype = kept_ref.shape[1], kept_ref.dtype

    def run(kept, streamed, results, slots, ready, **numbers):
        slots = Slots(*slots, SLOTS)

        def copy_all():
            @pl.loop(0, turns)
            def _(turn):
                @pl.loop(0, steps)
                def _(step):
                    def copy_tile(slot, loaded):
                        copy(turn, step, slot, streamed, loaded, **numbers)

                    slots.fill(turn * steps + step, copy_tile)

            slots.drain(turns * steps)

        def multiply_all():
            group = launch.group()
            own = (each.at[group] for each in (kept, results, ready))
            multiply(group, _Tiles(steps, *own, streamed, slots), **numbers)

        divide_work(copy_all, multiply_all)

    launch.with_scratch(
        run,
        kept=launch.shared((HALVES, HALF, rank), dtype, WIDTH),
        streamed=launch.shared((SLOTS, STREAMED, rank), dtype, WIDTH),
        results=launch.shared((HALVES, HALF, WIDTH), jnp.float32, WIDTH // 2),
        slots=Slots.barriers(SLOTS, copies),
        ready=plgpu.Barrier(num_barriers=HALVES),
        **numbers,
    )


class _Tiles(NamedTuple):
    """The tiles of a multiplying group and their barriers."""

    steps: int  # streamed tiles of a turn
    kept: Any
    result: Any  # columns on their way to the result
    is_kept: Any
    streamed: Any
    slots: Slots

    def keep(self, source):
        """Copies the kept tile."""
        plgpu.copy_gmem_to_smem(source, self.kept, self.is_kept)
        plgpu.barrier_wait(self.is_kept)

    def fold(self, turn, weigh, shrink, carry):
        """The sum of weights @ tile [h, K] and the last carry; see `Products.fold`."""
        products = Products((self.kept,), (self.streamed,), (0,), self.slots)
        first = turn * self.steps
        self.slots.take(first)
        last = first + self.steps - 1
        (sum_hK,), carry = products.fold(first, last, weigh, shrink, carry)
        return sum_hK, carry

    def write(self, sum_hK, target):
        """Copies the result of a turn, through shared memory."""
        for column in range(0, sum_hK.shape[1], WIDTH):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.result[...] = sum_hK[:, column : column + WIDTH]
            plgpu.commit_smem()
            target_columns = target.at[:, pl.ds(column, WIDTH)]
            plgpu.copy_smem_to_gmem(self.result, target_columns)
