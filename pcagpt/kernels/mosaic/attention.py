"""Causal attention and its gradients.

A program keeps a tile of a head in shared memory and streams the tiles that it meets.
The forward pass and the kernel for the gradient of queries keep queries. The kernel for
the gradients of keys and values keeps these. Both kernels for gradients compute the
weights again, as FlashAttention 2 does. They need the mean of the weights' gradients
under the weights of a query: it is result @ gradient of the result.

Queries, keys and values are thirds of one array [N, 3D], and so are their gradients.
So one product makes all three, and nothing must split or join arrays.

Shape letters: B batch, T sequence, N = B*T, H heads, C head width, D = H*C, X = 3D; h
rows of half of a kept tile, s rows of a streamed tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pcagpt.kernels.constants import LOG2_E
from pcagpt.kernels.mosaic import launch
from pcagpt.kernels.mosaic.causal_tiles import KEPT, WIDTH, Sequences, Turn
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

SLOTS = 4  # streamed tiles in shared memory; at least 3: two used, one awaited
TURNS = 2  # kept tiles in shared memory: one used, one awaited
SCALE = WIDTH**-0.5
EXPONENT = SCALE * LOG2_E  # of 2, for a product of a query and a key of 1


def fits(shape: tuple[int, ...], dtype) -> bool:
    """Whether the kernels support queries of that shape [B, T, H, C]."""
    batch, length, _, width = shape
    return (
        launch.has_wgmma()
        and dtype == jnp.bfloat16
        and batch % inside.device_count() == 0
        and length % (2 * KEPT) == 0
        and width == WIDTH
    )


# XLA cannot differentiate a kernel.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv_NX, length: int, heads: int) -> jax.Array:
    """Causal attention [N, D] in sequences of `length` rows, bfloat16.

    Products are added up and the softmax is computed in float32. Weights, and the
    gradients of logits, are rounded to bfloat16 for their products.
    """
    return _results(qkv_NX, length=length, heads=heads)[0]


def _forward(qkv_NX, length, heads):
    y_ND, normaliser_BHT = _results(qkv_NX, length=length, heads=heads)
    return y_ND, (qkv_NX, y_ND, normaliser_BHT)


def _backward(length, heads, residuals, of_y_ND):
    del length, heads
    return _gradient(*residuals, of_y_ND)


attention.defvjp(_forward, _backward)


@inside.by_device([True], [True] * 2)
def _results(qkv_NX, *, length: int, heads: int):
    """Results, and logarithms to base 2 of the sums of exponentials [B, H, T]."""
    count, batch = len(qkv_NX), len(qkv_NX) // length
    y_ND = jax.ShapeDtypeStruct((count, heads * WIDTH), qkv_NX.dtype)
    y_ND, normaliser_HT = _run(
        _Forward,
        _Inputs((qkv_NX,), (qkv_NX,) * 2),
        sizes=Sequences(length, heads, batch * heads),
        results=(y_ND, _numbers(batch * heads, length)),
    )
    return y_ND, normaliser_HT.reshape(batch, heads, length)


@inside.by_device([True] * 4, [True])
def _gradient(qkv_NX, y_ND, normaliser_BHT, of_y_ND):
    """The gradient of queries, keys and values [N, X]."""
    _, heads, length = normaliser_BHT.shape
    normaliser_HT = normaliser_BHT.reshape(-1, length)
    sizes = Sequences(length, heads, len(normaliser_HT))
    of_qkv_NX, mean_HT = _run(
        _OfQueries,
        _Inputs((qkv_NX, of_y_ND, y_ND), (qkv_NX,) * 2, (normaliser_HT,)),
        sizes=sizes,
        results=(
            jax.ShapeDtypeStruct(qkv_NX.shape, qkv_NX.dtype),
            _numbers(*normaliser_HT.shape),
        ),
    )
    # The first kernel has left two thirds unwritten. The next one writes these.
    numbers = normaliser_HT, mean_HT
    inputs = _Inputs((qkv_NX,) * 2, (qkv_NX, of_y_ND), (), numbers)
    return _run(_OfKeys, inputs, sizes=sizes, completes=of_qkv_NX)


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class _Inputs(NamedTuple):
    """Arrays [N, D or X], and numbers [B*H, T] beside them; or where they are."""

    kept: Any
    streamed: Any
    kept_numbers: Any = ()
    streamed_numbers: Any = ()


# All blocks share kernels, which are lowered once.
@functools.partial(jax.jit, static_argnames=("kind", "sizes", "results"))
def _run(
    kind: type,
    inputs: _Inputs,
    *,
    sizes: Sequences,
    results: tuple = (),
    completes=None,
) -> tuple:
    """The results, and the array that the kernel completes, if there is one."""
    arrays, structure = jax.tree.flatten(inputs)
    dtype = arrays[0].dtype
    incomplete = ()
    if completes is not None:
        incomplete = (jax.new_ref(completes, memory_space=plgpu.GMEM),)

    def body(*references):
        sources = jax.tree.unflatten(structure, references[: len(arrays)])
        targets = references[len(arrays) :]

        def run(held, slots, kept_slots, outgoing, outgoing_numbers):
            slots, kept_slots = Slots(*slots, SLOTS), Slots(*kept_slots, TURNS)
            kernel = kind(sizes, sources, held, slots, kept_slots)
            divide_work(
                kernel.copy,
                lambda: kernel.multiply(targets, outgoing, outgoing_numbers),
            )

        def tiles(count, slots, height):
            return [launch.shared((slots, height, WIDTH), dtype, WIDTH)] * count

        def numbers(count, slots, height):
            return [launch.shared((slots, height), jnp.float32)] * count

        counts = _Inputs(*map(len, sources))
        copies = counts.streamed + counts.streamed_numbers
        kept_copies = counts.kept + counts.kept_numbers
        launch.with_scratch(
            run,
            held=_Inputs(
                tiles(counts.kept, TURNS, KEPT),
                tiles(counts.streamed, SLOTS, kind.streamed),
                numbers(counts.kept_numbers, TURNS, KEPT),
                numbers(counts.streamed_numbers, SLOTS, kind.streamed),
            ),
            slots=Slots.barriers(SLOTS, copies),
            kept_slots=Slots.barriers(TURNS, kept_copies),
            outgoing=tiles(len(kind.sum_of), HALVES, HALF),
            outgoing_numbers=launch.shared((HALVES, HALF), jnp.float32),
        )

    found = launch.call(
        body,
        results,
        programs=min(sizes.pairs, launch.multiprocessors()),
        groups=HALVES + 1,
        name=kind.name,
    )(*arrays, *incomplete)
    return tuple(found) + tuple(jax.freeze(array) for array in incomplete)


class _Kernel:
    """What all three kernels do.

    *_thirds: the third of the columns that is read or written; 0 for [N, D].
    streamed: rows of a streamed tile; with 128, gradients do not fit in the registers.
    products: number of products of a kept tile and a streamed one; the first one is of
    queries and keys. sum_of: see `Products`.
    """

    name: str
    keeps_keys = False
    kept_thirds: tuple[int, ...]
    streamed_thirds = 1, 2
    result_thirds: tuple[int, ...] = (0,)
    streamed = HALF
    products = 2
    sum_of: tuple[int, ...] = (0,)

    def __init__(self, sizes, sources: _Inputs, held: _Inputs, slots, kept_slots):
        self.sizes, self.slots, self.kept_slots = sizes, slots, kept_slots
        self.sources, self.held = sources, held

    def start(self, at):
        """The first carry of `weigh`; `at`: slot and rows of half of the kept tile."""
        raise NotImplementedError

    def weigh(self, logit_hs, *of_p_hs, carry, slot):
        """The weights for `sum_of` and the next carry.

        logit: products of queries and keys, not scaled; -inf where they do not see each
        other. of_p: the gradient of the attention weights. slot: of the streamed tile.
        """
        raise NotImplementedError

    def shrink(self, sums: tuple, carry) -> tuple:
        """The sums so far, relative to the new carry."""
        del carry
        return sums

    def finish(self, sums, carry):
        """The results [h, C] of half of a kept tile, and a number [h] or None."""
        raise NotImplementedError

    def turn(self, number) -> Turn:
        """The turn of this number."""
        return Turn(number, self.sizes, self.keeps_keys, self.streamed)

    def copy(self) -> None:
        """Copies all tiles to shared memory."""
        sources, held = self.sources, self.held

        def copy_all(turn, positions, tiles, numbers, slot, loaded):
            for source, target, third in zip(*tiles, strict=True):
                place = turn.place(positions, third)
                plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], loaded)
            for source, target in zip(*numbers, strict=True):
                of_rows = source.at[turn.head, positions]
                plgpu.copy_gmem_to_smem(of_rows, target.at[slot], loaded)

        @pl.loop(0, self.sizes.turns)
        def _(number):
            turn = self.turn(number)
            copy = functools.partial(
                copy_all,
                turn,
                turn.kept(),
                (sources.kept, held.kept, self.kept_thirds),
                (sources.kept_numbers, held.kept_numbers),
            )
            self.kept_slots.fill(number, copy)

            @pl.loop(0, turn.steps)
            def _(step):
                copy = functools.partial(
                    copy_all,
                    turn,
                    turn.met(step),
                    (sources.streamed, held.streamed, self.streamed_thirds),
                    (sources.streamed_numbers, held.streamed_numbers),
                )
                self.slots.fill(turn.before + step, copy)

        last = self.turn(self.sizes.turns - 1)
        self.slots.drain(last.before + last.steps)
        self.kept_slots.drain(self.sizes.turns)

    def multiply(self, targets, outgoing, outgoing_numbers) -> None:
        """Computes the results of all turns; they pass through shared memory."""
        half = launch.group()

        @pl.loop(0, self.sizes.turns)
        def _(number):
            turn = self.turn(number)
            self.kept_slots.take(number)
            at = self.kept_slots.of(number), pl.ds(half * HALF, HALF)
            results, number_h = self.attend(turn, half, at)
            self.kept_slots.release(number)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for result_hC, held in zip(results, outgoing, strict=True):
                held[half] = result_hC.astype(held.dtype)
            if number_h is not None:
                outgoing_numbers[half] = number_h
            plgpu.commit_smem()
            positions = turn.half(half)
            # All results are in one array. The target of numbers comes after it.
            for held, third in zip(outgoing, self.result_thirds, strict=True):
                place = targets[0].at[turn.place(positions, third)]
                plgpu.copy_smem_to_gmem(held.at[half], place)
            if number_h is not None:
                place = targets[1].at[turn.head, positions]
                plgpu.copy_smem_to_gmem(outgoing_numbers.at[half], place)

    def attend(self, turn: Turn, half, at) -> tuple:
        """What `finish` makes for half of a kept tile."""
        skipped = turn.skipped(half)
        first, last = turn.before + skipped, turn.before + turn.steps - 1
        self.slots.take(turn.before)

        # A tile must be taken even by a half that does not meet it.
        @pl.when(skipped == 1)
        def _():
            self.slots.release(turn.before)
            self.slots.take(first)

        def weigh(products, carry, slot, is_first):
            logit_hs, *of_p = products
            if is_first:
                logit_hs = jnp.where(turn.hides(half), -jnp.inf, logit_hs)
            return self.weigh(logit_hs, *of_p, carry=carry, slot=slot)

        kept = tuple(held.at[at] for held in self.held.kept[: self.products])
        products = Products(kept, self.held.streamed, self.sum_of, self.slots)
        sums, carry = products.fold(first, last, weigh, self.shrink, self.start(at))
        return self.finish(sums, carry)


class _Forward(_Kernel):
    """The forward pass; keeps queries, streams keys and values."""

    name = "attention"
    kept_thirds = (0,)
    streamed = KEPT
    products = 1
    sum_of = (1,)

    def start(self, at) -> tuple:
        del at
        zero_h = jnp.zeros(HALF, jnp.float32)
        return jnp.full(HALF, -jnp.inf, jnp.float32), zero_h, zero_h

    def weigh(self, logit_hs, *, carry, slot):
        del slot
        highest_h, sum_h, _ = carry
        new_highest_h = jnp.maximum(highest_h, logit_hs.max(axis=1) * EXPONENT)
        # One instruction multiplies and subtracts.
        p_hs = jnp.exp2(logit_hs * EXPONENT - columns(new_highest_h, self.streamed))
        # The sums so far are relative to the old maximum.
        shrink_h = jnp.exp2(highest_h - new_highest_h)
        sum_h = sum_h * shrink_h + p_hs.sum(axis=1)
        return (p_hs,), (new_highest_h, sum_h, shrink_h)

    def shrink(self, sums, carry) -> tuple:
        return (sums[0] * columns(carry[2], WIDTH),)

    def finish(self, sums, carry) -> tuple:
        highest_h, sum_h, _ = carry
        return (sums[0] * columns(1 / sum_h, WIDTH),), highest_h + jnp.log2(sum_h)


class _OfQueries(_Kernel):
    """Gradients of queries; keeps these, the gradients of results, and results."""

    name = "attention_of_queries"
    kept_thirds = 0, 0, 0

    def start(self, at) -> tuple:
        """Normalisers, and means of the weights' gradients, [h]."""
        _, of_y, y = self.held.kept
        of_y_hC, y_hC = (held[at].astype(jnp.float32) for held in (of_y, y))
        (normaliser,) = self.held.kept_numbers
        return normaliser[at], (of_y_hC * y_hC).sum(axis=1)

    def weigh(self, logit_hs, of_p_hs, *, carry, slot):
        del slot
        normaliser_h, mean_h = carry
        p_hs = jnp.exp2(logit_hs * EXPONENT - columns(normaliser_h, HALF))
        return (p_hs * (of_p_hs - columns(mean_h, HALF)),), carry

    def finish(self, sums, carry) -> tuple:
        return (sums[0] * SCALE,), carry[1]


class _OfKeys(_Kernel):
    """Gradients of keys and values; streams queries and the gradients of results."""

    name = "attention_of_keys"
    keeps_keys = True
    kept_thirds = result_thirds = 1, 2
    streamed_thirds = 0, 0
    sum_of = (0, 1)

    def start(self, at) -> tuple:
        del at
        return ()

    def weigh(self, logit_hs, of_p_hs, *, carry, slot):
        normaliser, mean = self.held.streamed_numbers
        p_hs = jnp.exp2(logit_hs * EXPONENT - rows(normaliser[slot], HALF))
        return (p_hs * (of_p_hs - rows(mean[slot], HALF)), p_hs), carry

    def finish(self, sums, carry) -> tuple:
        return (sums[0] * SCALE, sums[1]), None
