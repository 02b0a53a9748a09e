"""Tiles that stream through shared memory, and sums over them.

One group of threads copies tiles, as far ahead as there are slots. Others multiply.

Shape letters: h rows of a kept tile, s rows of a streamed tile, K columns of both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.mosaic import launch

HALVES = 2  # of a tile of results, one for each multiplying group
HALF = 64  # rows of a half, as many as a product takes
REGISTERS = {"copy": 40, "multiply": 232}  # of each thread


def divide_work(copy: Callable[[], None], multiply: Callable[[], None]) -> None:
    """Calls `multiply` in the first groups of threads and `copy` in the last one."""

    @pl.when(launch.group() == HALVES)
    def _():
        plgpu.set_max_registers(REGISTERS["copy"], action="decrease")
        copy()

    @pl.when(launch.group() < HALVES)
    def _():
        plgpu.set_max_registers(REGISTERS["multiply"], action="increase")
        multiply()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Slots(NamedTuple):
    """Places in shared memory that tiles take one after the other."""

    loaded: Any
    used: Any
    number: int

    @staticmethod
    def barriers(number: int, copies: int) -> tuple:
        """`loaded` and `used` for tiles that consist of this many copies."""
        return (
            plgpu.Barrier(num_arrivals=copies, num_barriers=number),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=number),
        )

    def of(self, count) -> jax.Array:
        """The slot of the tile with this number."""
        return lax.rem(count, self.number)

    def fill(self, count, copy: Callable) -> None:
        """Calls `copy` with the slot and its barrier when the slot is free."""
        slot = self.of(count)

        @pl.when(count >= self.number)
        def _():
            plgpu.barrier_wait(self.used.at[slot])

        copy(slot, self.loaded.at[slot])

    def drain(self, count) -> None:
        """Waits until all tiles are used, if `count` tiles were copied.

        The interpreter wants every arrival at a barrier to be seen.
        """

        @pl.loop(jnp.maximum(count - self.number, 0), count)
        def _(past):
            plgpu.barrier_wait(self.used.at[self.of(past)])

    def take(self, count) -> None:
        """Waits for a tile. Each multiplying group must take all tiles in turn."""
        plgpu.barrier_wait(self.loaded.at[self.of(count)])

    def release(self, count) -> None:
        """Says that this group has used a tile."""
        plgpu.barrier_arrive(self.used.at[self.of(count)])


class Products(NamedTuple):
    """A group's products with streamed tiles, and sums of products with weights.

    kept: its tiles [h, K]; each is multiplied by the streamed tile at the same index.
    streamed: in shared memory, [slots, s, K] each. sum_of: indices of the streamed
    tiles that weights [h, s] multiply.
    """

    kept: tuple
    streamed: tuple
    sum_of: tuple[int, ...]
    slots: Slots

    def fold(self, first, last, weigh: Callable, shrink: Callable, carry) -> tuple:
        """The sums of weights @ tile for tiles `first` to `last`, and the last carry.

        weigh: makes the weights and the next carry from the products kept @ tile.T, the
        carry, the slot, and whether the tile is the first one. shrink: is applied to
        the sums before the next weights are added. The first tile has been taken. A
        tile's weights are computed while the products of the tile before run.
        """
        dtype = self.streamed[0].dtype

        def take_after(count):
            @pl.when(count < last)
            def _():
                self.slots.take(count + 1)

        def rounded(weights):
            return tuple(weight_hs.astype(dtype) for weight_hs in weights)

        def visit(count, state):
            sums, weights, carry = state

            def next_weights(products):
                result = weigh(products, carry, self.slots.of(count), False)
                # Without it, the compiler computes weights after the sums.
                result = lax.optimization_barrier(result)
                take_after(count)  # This wait is over before that for the sums.
                return result

            sums, weights, carry = self._overlap(sums, weights, count, next_weights)
            # Until here, products read the last weights in the registers of the next.
            weights = lax.optimization_barrier(weights)
            self.slots.release(count - 1)
            return shrink(sums, carry), rounded(weights), carry

        products = self._products(first)
        weights, carry = weigh(products, carry, self.slots.of(first), True)
        take_after(first)
        zeros = tuple(jnp.zeros(self._sum_shape, jnp.float32) for _ in self.sum_of)
        state = zeros, rounded(weights), carry
        sums, weights, carry = lax.fori_loop(first + 1, last + 1, visit, state)
        sums = self._add(sums, weights, last)
        self.slots.release(last)
        return sums, carry

    @property
    def _sum_shape(self) -> tuple[int, int]:
        return self.kept[0].shape[0], self.streamed[0].shape[2]

    def _products(self, count) -> tuple:
        slot = self.slots.of(count)
        if launch.is_interpreted():
            return tuple(
                _product(kept_hK[...], streamed[slot].T)
                for kept_hK, streamed in zip(self.kept, self.streamed, strict=False)
            )

        def multiply(*refs):
            self._start_products(refs, slot)
            return tuple(ref[...] for ref in refs)

        return pl.run_scoped(multiply, *self._product_accumulators())

    def _add(self, sums, weights, count) -> tuple:
        slot = self.slots.of(count)
        if launch.is_interpreted():
            return tuple(
                sum_hK + _product(weight_hs, self.streamed[index][slot])
                for index, sum_hK, weight_hs in zip(
                    self.sum_of, sums, weights, strict=True
                )
            )

        def multiply(*refs):
            self._start_sums(refs, sums, weights, slot)
            return tuple(ref[...] for ref in refs)

        return pl.run_scoped(multiply, *self._sum_accumulators())

    def _overlap(self, sums, weights, count, next_weights: Callable) -> tuple:
        """The sums with the tile before, and what `next_weights` makes of this tile."""
        if launch.is_interpreted():  # It knows no weights in registers.
            sums = self._add(sums, weights, count - 1)
            return sums, *next_weights(self._products(count))
        products, pending = len(self.kept), len(sums)

        def multiply(*refs):
            product_refs, sum_refs = refs[:products], refs[products:]
            self._start_products(product_refs, self.slots.of(count))
            self._start_sums(sum_refs, sums, weights, self.slots.of(count - 1))
            result = next_weights(
                tuple(
                    plgpu.wgmma_accumulator_load(ref, wait_n=pending)
                    for ref in product_refs
                )
            )
            return tuple(ref[...] for ref in sum_refs), *result

        accumulators = *self._product_accumulators(), *self._sum_accumulators()
        return pl.run_scoped(multiply, *accumulators)

    def _product_accumulators(self) -> list:
        shape = self.kept[0].shape[0], self.streamed[0].shape[1]
        return [plgpu.ACC(shape, jnp.float32)] * len(self.kept)

    def _sum_accumulators(self) -> list:
        return [plgpu.ACC(self._sum_shape, jnp.float32)] * len(self.sum_of)

    def _start_products(self, refs, slot) -> None:
        for ref, kept_hK, streamed in zip(refs, self.kept, self.streamed, strict=False):
            plgpu.wgmma(ref, kept_hK, streamed.at[slot].T)

    def _start_sums(self, refs, sums, weights, slot) -> None:
        for ref, sum_hK in zip(refs, sums, strict=True):
            ref[...] = sum_hK
        for index, ref, weight_hs in zip(self.sum_of, refs, weights, strict=True):
            plgpu.wgmma(ref, weight_hs, self.streamed[index].at[slot])


def columns(values_h, count: int):
    """The values [h] in each of `count` columns."""
    return lax.broadcast_in_dim(values_h, (values_h.shape[0], count), [0])


def rows(values_s, count: int):
    """The values [s] in each of `count` rows."""
    return lax.broadcast_in_dim(values_s, (count, values_s.shape[0]), [1])


def _product(a, b) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
