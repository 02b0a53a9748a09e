"""The output head's softmax and gradients as attention, without an [N, V] array.

`triton.low_rank_head` explains the method. A program keeps a tile of an array in shared
memory: of the tokens for the softmax, of the table for its gradient. One group of
threads copies the tiles of the other array, as far ahead as it has slots. Two groups
multiply, each for half of the kept tile. A group computes a tile's exponentials while
its product of the tile before runs, and while the other group multiplies.

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
from pcagpt.sharding import inside

HALF = 64  # rows of a product of one group
HALVES = 2  # of the kept tile, one for each multiplying group
KEPT = HALVES * HALF
STREAMED = 128  # rows of a streamed tile
SLOTS = 4  # streamed tiles in shared memory; at least 3: two used, one awaited
WIDTH = 64  # of the columns that products read; the rank is padded to a multiple
MAX_RANK = 128  # Results of a higher rank do not fit in the registers.
REGISTERS = {"copy": 40, "multiply": 232}  # of each thread


def fits(rank: int, dtype) -> bool:
    """Whether the kernels support a table of that rank."""
    return launch.has_wgmma() and dtype == jnp.bfloat16 and rank <= MAX_RANK


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
        normaliser_N, mean_NK = launch.call(
            functools.partial(_summarize, size=size),
            (
                jax.ShapeDtypeStruct(z_NK.shape[:1], jnp.float32),
                jax.ShapeDtypeStruct(z_NK.shape, jnp.float32),
            ),
            programs=min(z_NK.shape[0] // KEPT, launch.multiprocessors()),
            groups=HALVES + 1,
            name="head_summarize",
        )(z_NK, wte_VK)
        return normaliser_N[:count], mean_NK[:count, :rank]

    return of_rows(z_NK, wte_VK)


def _summarize(z_ref, wte_ref, normaliser_ref, mean_ref, *, size: int):
    """Kernel: keeps a tile of tokens and streams the table."""
    steps = pl.cdiv(size, STREAMED)
    first, programs = launch.program()
    turns = lax.div(z_ref.shape[0] // KEPT - first + programs - 1, programs)

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

            def weigh(logit_hs, carry, slot):
                highest_h, sum_h, _ = carry
                if carry is start:
                    column_hs = lax.broadcasted_iota(jnp.int32, logit_hs.shape, 1)
                    is_real_hs = column_hs < size - (steps - 1) * STREAMED
                    logit_hs = jnp.where(is_real_hs, logit_hs, -jnp.inf)
                new_highest_h = jnp.maximum(highest_h, logit_hs.max(axis=1) * LOG2_E)
                # One instruction multiplies and subtracts.
                p_hs = jnp.exp2(logit_hs * LOG2_E - _columns(new_highest_h, STREAMED))
                # The sums so far are relative to the old maximum.
                shrink_h = jnp.exp2(highest_h - new_highest_h)
                sum_h = sum_h * shrink_h + p_hs.sum(axis=1)
                return p_hs, (new_highest_h, sum_h, shrink_h)

            def shrink(mean_hK, carry):
                return mean_hK * _columns(carry[2], mean_hK.shape[1])

            zeros = jnp.zeros(HALF, jnp.float32)
            start = jnp.full(HALF, -jnp.inf, jnp.float32), zeros, zeros
            mean_hK, (highest_h, sum_h, _) = tiles.fold(turn, weigh, shrink, start)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            normaliser[group] = (highest_h + jnp.log2(sum_h)) * (1 / LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(normaliser.at[group], normaliser_ref.at[place])
            mean_hK *= _columns(1 / sum_h, mean_hK.shape[1])
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
    wte_VK = _pad(wte_VK, KEPT)
    tiles, steps = wte_VK.shape[0] // KEPT, pl.cdiv(z_NK.shape[0], STREAMED)
    splits = _splits(tiles, steps)
    z_NK = _pad(z_NK, STREAMED * splits)
    padding = z_NK.shape[0] - normaliser_N.shape[0]
    normaliser_N = jnp.pad(normaliser_N, (0, padding), constant_values=jnp.inf)
    targets_N = jnp.pad(targets_N, (0, padding), constant_values=-1)
    parts = launch.call(
        functools.partial(_table_gradient, splits=splits),
        jax.ShapeDtypeStruct((splits, *wte_VK.shape), jnp.float32),
        programs=min(tiles * splits, launch.multiprocessors()),
        groups=HALVES + 1,
        name="head_table_gradient",
    )(wte_VK, z_NK, normaliser_N * LOG2_E, targets_N)
    return parts.sum(axis=0)[:size, :rank]


def _splits(tiles: int, steps: int) -> int:
    """Number of parts of the tokens, so that all programs get about equal work."""

    def cost(splits):  # of the program with the most work
        return pl.cdiv(tiles * splits, launch.multiprocessors()) * (
            pl.cdiv(steps, splits) + 2
        )

    costs = [cost(n) for n in range(1, min(steps, launch.multiprocessors()) + 1)]
    # Each part stores a table, so 5 % less work is not worth another one.
    return next(n for n, cost in enumerate(costs, 1) if cost <= 1.05 * min(costs))


def _table_gradient(
    wte_ref, z_ref, normaliser_ref, target_ref, gradient_ref, *, splits: int
):
    """Kernel: keeps a tile of the table and streams the tokens."""
    steps = z_ref.shape[0] // (STREAMED * splits)
    first, programs = launch.program()
    items = wte_ref.shape[0] // KEPT * splits
    turns = lax.div(items - first + programs - 1, programs)

    def copy(turn, step, slot, streamed, loaded, normaliser, target):
        split = lax.rem(turn * programs + first, splits)
        rows = pl.ds((split * steps + step) * STREAMED, STREAMED)
        plgpu.copy_gmem_to_smem(z_ref.at[rows], streamed.at[slot], loaded)
        plgpu.copy_gmem_to_smem(normaliser_ref.at[rows], normaliser.at[slot], loaded)
        plgpu.copy_gmem_to_smem(target_ref.at[rows], target.at[slot], loaded)

    def multiply(group, tiles, normaliser, target):
        @pl.loop(0, turns)
        def _(turn):
            item = turn * programs + first
            row = (lax.div(item, splits) * HALVES + group) * HALF
            place = pl.ds(row, HALF)
            tiles.keep(wte_ref.at[place])

            def weigh(logit_hs, carry, slot):
                exponent_hs = logit_hs * LOG2_E - _rows(normaliser[slot], HALF)
                p_hs = jnp.exp2(exponent_hs)
                row_hs = lax.broadcasted_iota(jnp.int32, p_hs.shape, 0)
                is_target_hs = row_hs == _rows(target[slot] - row, HALF)
                return jnp.where(is_target_hs, p_hs - 1.0, p_hs), carry

            gradient_hK, _ = tiles.fold(turn, weigh, lambda sum_hK, _: sum_hK, ())
            tiles.write(gradient_hK, gradient_ref.at[lax.rem(item, splits), place])

    scratch = {
        "normaliser": launch.shared((SLOTS, STREAMED), normaliser_ref.dtype),
        "target": launch.shared((SLOTS, STREAMED), target_ref.dtype),
    }
    _run(copy, multiply, turns, steps, wte_ref, 3, **scratch)


def _columns(values_h, count: int):
    return lax.broadcast_in_dim(values_h, (values_h.shape[0], count), [0])


def _rows(values_s, count: int):
    return lax.broadcast_in_dim(values_s, (count, values_s.shape[0]), [1])


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

    def run(kept, streamed, results, loaded, used, ready, **numbers):
        @pl.when(launch.group() == HALVES)
        def _():
            plgpu.set_max_registers(REGISTERS["copy"], action="decrease")

            @pl.loop(0, turns)
            def _(turn):
                @pl.loop(0, steps)
                def _(step):
                    count = turn * steps + step
                    slot = lax.rem(count, SLOTS)

                    @pl.when(count >= SLOTS)
                    def _():
                        plgpu.barrier_wait(used.at[slot])

                    copy(turn, step, slot, streamed, loaded.at[slot], **numbers)

            # The interpreter wants every arrival at a barrier to be seen.
            count = turns * steps

            @pl.loop(jnp.maximum(count - SLOTS, 0), count)
            def _(past):
                plgpu.barrier_wait(used.at[lax.rem(past, SLOTS)])

        @pl.when(launch.group() < HALVES)
        def _():
            plgpu.set_max_registers(REGISTERS["multiply"], action="increase")
            group = launch.group()
            result, is_kept = results.at[group], ready.at[group]
            tiles = _Tiles(
                steps,
                kept.at[group],
                streamed,
                result,
                loaded,
                used,
                is_kept,
            )
            multiply(group, tiles, **numbers)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    launch.with_scratch(
        run,
        kept=launch.shared((HALVES, HALF, rank), dtype, WIDTH),
        streamed=launch.shared((SLOTS, STREAMED, rank), dtype, WIDTH),
        results=launch.shared((HALVES, HALF, WIDTH), jnp.float32, WIDTH // 2),
        loaded=plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
        used=plgpu.Barrier(num_arrivals=HALVES, num_barriers=SLOTS),
        ready=plgpu.Barrier(num_barriers=HALVES),
        **numbers,
    )


class _Tiles(NamedTuple):
    """The tiles of a multiplying group and their barriers."""

    steps: int  # streamed tiles of a turn
    kept: Any
    streamed: Any
    result: Any  # columns on their way to the result
    loaded: Any
    used: Any
    is_kept: Any

    def keep(self, source):
        """Copies the kept tile."""
        plgpu.copy_gmem_to_smem(source, self.kept, self.is_kept)
        plgpu.barrier_wait(self.is_kept)

    def write(self, sum_hK, target):
        """Copies the result of a turn, through shared memory."""
        for column in range(0, sum_hK.shape[1], WIDTH):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.result[...] = sum_hK[:, column : column + WIDTH]
            plgpu.commit_smem()
            columns = target.at[:, pl.ds(column, WIDTH)]
            plgpu.copy_smem_to_gmem(self.result, columns)

    def fold(self, turn, weigh, shrink, carry):
        """The sum of weights @ tile over all streamed tiles, and the last carry.

        `weigh` makes the weights [h, s] and the next carry from the products of the
        kept tile and a streamed one, the carry, and the slot of the streamed one.
        `shrink` is applied to the sum before the weights are added.
        """

        def slot_of(step):
            return lax.rem(turn * self.steps + step, SLOTS)

        def visit(step, state):
            sum_hK, p_hs, carry = state
            slot, past = slot_of(step), slot_of(step - 1)

            def weights(logit_hs):
                result = lax.optimization_barrier(weigh(logit_hs, carry, slot))

                @pl.when(step + 1 < self.steps)
                def _():
                    plgpu.barrier_wait(self.loaded.at[slot_of(step + 1)])

                return result

            sum_hK, p_hs, carry = self._overlap(sum_hK, p_hs, past, slot, weights)
            plgpu.barrier_arrive(self.used.at[past])
            return shrink(sum_hK, carry), p_hs.astype(dtype), carry

        slot, dtype = slot_of(0), self.streamed.dtype
        plgpu.barrier_wait(self.loaded.at[slot])
        p_hs, carry = weigh(self._logits(slot), carry, slot)
        if self.steps > 1:
            plgpu.barrier_wait(self.loaded.at[slot_of(1)])
        start = jnp.zeros(self.kept.shape, jnp.float32), p_hs.astype(dtype), carry
        sum_hK, p_hs, carry = lax.fori_loop(1, self.steps, visit, start)
        past = slot_of(self.steps - 1)
        sum_hK = self._add(sum_hK, p_hs, past)
        plgpu.barrier_arrive(self.used.at[past])
        return sum_hK, carry

    def _logits(self, slot):
        if launch.is_interpreted():
            return _product(self.kept[...], self.streamed[slot].T)

        def multiply(logit_ref):
            plgpu.wgmma(logit_ref, self.kept, self.streamed.at[slot].T)
            return logit_ref[...]

        return pl.run_scoped(multiply, plgpu.ACC((HALF, STREAMED), jnp.float32))

    def _add(self, sum_hK, p_hs, past):
        if launch.is_interpreted():
            return sum_hK + _product(p_hs, self.streamed[past])

        def multiply(sum_ref):
            sum_ref[...] = sum_hK
            plgpu.wgmma(sum_ref, p_hs, self.streamed.at[past])
            return sum_ref[...]

        return pl.run_scoped(multiply, plgpu.ACC(sum_hK.shape, jnp.float32))

    def _overlap(self, sum_hK, p_hs, past, slot, weights):
        """The products of a slot give the next weights while those of the past run."""
        if launch.is_interpreted():  # It knows no weights in registers.
            sum_hK, logit_hs = self._add(sum_hK, p_hs, past), self._logits(slot)
            return sum_hK, *weights(logit_hs)

        def multiply(logit_ref, sum_ref):
            sum_ref[...] = sum_hK
            plgpu.wgmma(logit_ref, self.kept, self.streamed.at[slot].T)
            plgpu.wgmma(sum_ref, p_hs, self.streamed.at[past])
            result = weights(plgpu.wgmma_accumulator_load(logit_ref, wait_n=1))
            return sum_ref[...], *result

        return pl.run_scoped(
            multiply,
            plgpu.ACC((HALF, STREAMED), jnp.float32),
            plgpu.ACC(sum_hK.shape, jnp.float32),
        )


def _product(a, b) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
