"""Causal attention and its gradients.

A program keeps a tile of a head in shared memory and streams the tiles that it meets:
queries meet the keys before them, keys the queries after them. The forward pass and the
kernel for the gradient of queries keep queries. The kernel for the gradients of keys
and values keeps these. Both kernels for gradients compute the weights again.

A program works on two tiles in turn that together meet as many tiles as any other two:
a tile and its mirror image in the sequence.

Shape letters: B batch, T sequence, N = B*T, H heads, C head width, D = H*C; h rows of
half of a kept tile, s rows of a streamed tile.
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

KEPT = HALVES * HALF  # rows of a kept tile
WIDTH = 64  # of a head
SLOTS = 4  # streamed tiles in shared memory; at least 3: two used, one awaited
TURNS = 2  # kept tiles in shared memory: one used, one awaited
SCALE = WIDTH**-0.5
EXPONENT = SCALE * LOG2_E  # of 2, for a product of a query and a key of 1


def fits(shape: tuple[int, ...], dtype) -> bool:
    """Whether the kernels support queries of that shape [B, T, H, C]."""
    _, length, _, width = shape
    has_pairs = length % (2 * KEPT) == 0
    return launch.has_wgmma() and dtype == jnp.bfloat16 and has_pairs and width == WIDTH


# XLA cannot differentiate a kernel.
@jax.custom_vjp
def attention(q_BTHC, k_BTHC, v_BTHC) -> jax.Array:
    """Causal attention [B, T, H, C] of bfloat16 arrays of that shape.

    Products are added up and the softmax is computed in float32. Weights, and the
    gradients of logits, are rounded to bfloat16 for their products.
    """
    return _forward(q_BTHC, k_BTHC, v_BTHC)[0]


def _forward(q_BTHC, k_BTHC, v_BTHC):
    y_BTHC, normaliser_BHT = _results(q_BTHC, k_BTHC, v_BTHC)
    return y_BTHC, (q_BTHC, k_BTHC, v_BTHC, y_BTHC, normaliser_BHT)


def _backward(residuals, of_y_BTHC):
    return _gradients(*residuals, of_y_BTHC)


attention.defvjp(_forward, _backward)


@inside.by_device([True] * 3, [True] * 2)
def _results(q_BTHC, k_BTHC, v_BTHC):
    """Results, and logarithms to base 2 of the sums of exponentials [B, H, T]."""
    batch, length, heads, _ = q_BTHC.shape
    q_ND, k_ND, v_ND = map(_as_rows, (q_BTHC, k_BTHC, v_BTHC))
    y_ND, normaliser_HT = _run(
        _Results,
        _Inputs((q_ND,), (k_ND, v_ND)),
        results=(_like(q_ND), _numbers(batch * heads, length)),
        length=length,
    )
    return y_ND.reshape(q_BTHC.shape), normaliser_HT.reshape(batch, heads, length)


@inside.by_device([True] * 6, [True] * 3)
def _gradients(q_BTHC, k_BTHC, v_BTHC, y_BTHC, normaliser_BHT, of_y_BTHC):
    """Gradients of q, k and v [B, T, H, C]."""
    arrays = q_BTHC, k_BTHC, v_BTHC, y_BTHC, of_y_BTHC
    q_ND, k_ND, v_ND, y_ND, of_y_ND = map(_as_rows, arrays)
    length = q_BTHC.shape[1]
    normaliser_HT = normaliser_BHT.reshape(-1, length)
    of_q_ND, mean_HT = _run(
        _OfQueries,
        _Inputs((q_ND, of_y_ND, y_ND), (k_ND, v_ND), (normaliser_HT,)),
        results=(_like(q_ND), _numbers(*normaliser_HT.shape)),
        length=length,
    )
    of_k_ND, of_v_ND = _run(
        _OfKeys,
        _Inputs((k_ND, v_ND), (q_ND, of_y_ND), (), (normaliser_HT, mean_HT)),
        results=(_like(k_ND), _like(v_ND)),
        length=length,
    )
    return tuple(array.reshape(q_BTHC.shape) for array in (of_q_ND, of_k_ND, of_v_ND))


def _as_rows(array_BTHC) -> jax.Array:
    batch, length, heads, width = array_BTHC.shape
    return array_BTHC.reshape(batch * length, heads * width)


def _like(array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class _Inputs(NamedTuple):
    """Arrays [N, D], and numbers [B*H, T] beside them; or where they are in memory."""

    kept: Any
    streamed: Any
    kept_numbers: Any = ()
    streamed_numbers: Any = ()


class _Place(NamedTuple):
    """Sizes of the work."""

    length: int  # of a sequence
    heads: int  # of a sequence
    all_heads: int

    @property
    def tiles(self) -> int:
        """Number of kept tiles of a head."""
        return self.length // KEPT

    @property
    def pairs(self) -> int:
        """Number of pairs of tiles."""
        return self.all_heads * (self.tiles // 2)

    def turns(self) -> jax.Array:
        """Number of turns of this program."""
        program, programs = launch.program()
        return 2 * lax.div(self.pairs - program + programs - 1, programs)


class _Turn:
    """What a program does in a turn: a kept tile and the tiles that it meets."""

    def __init__(self, number, place: _Place, kind: "type[_Kernel]"):
        program, programs = launch.program()
        tiles, is_mirror = place.tiles, lax.rem(number, 2)
        pair = lax.div(number, 2) * programs + program
        self.head = lax.div(pair, tiles // 2)
        # The tile that meets more comes first.
        shorter_by = lax.rem(pair, tiles // 2)
        tile = jnp.where(is_mirror == 1, tiles - 1 - shorter_by, shorter_by)
        in_kept = KEPT // kind.streamed
        self.steps = in_kept * (tiles - tile)
        before = lax.div(number, 2) * (tiles + 1) + is_mirror * (tiles - shorter_by)
        self.before = in_kept * before  # streamed tiles of the turns before
        self.kind = kind
        self.tile = tile if kind.keeps_keys else tiles - 1 - tile
        self.row = lax.div(self.head, place.heads) * place.length
        self.columns = pl.ds(lax.rem(self.head, place.heads) * WIDTH, WIDTH)

    def positions(self, half=None):
        """Those of the kept tile, or of a half of it, in the sequence."""
        if half is None:
            return pl.ds(self.tile * KEPT, KEPT)
        return pl.ds(self.tile * KEPT + half * HALF, HALF)

    def met(self, step):
        """Those of a streamed tile; the nearest tile comes first."""
        size = self.kind.streamed
        back = KEPT // size - 1 - step
        number = self.tile * (KEPT // size) + (step if self.kind.keeps_keys else back)
        return pl.ds(number * size, size)

    def first_step(self, half) -> jax.Array:
        """The first step of a half; one does not meet a nearest tile of 64 rows."""
        if self.kind.streamed == KEPT:
            return jnp.zeros_like(half)
        return half if self.kind.keeps_keys else HALVES - 1 - half

    def in_array(self, positions) -> tuple:
        """Rows and columns of an array [N, D]."""
        return pl.ds(self.row + positions.start, positions.size), self.columns


# All blocks share kernels, which are lowered once.
@functools.partial(jax.jit, static_argnames=("kind", "results", "length"))
def _run(kind: type, inputs: _Inputs, *, results: tuple, length: int):
    count, width = inputs.kept[0].shape
    heads, dtype = width // WIDTH, inputs.kept[0].dtype
    place = _Place(length, heads, count // length * heads)
    arrays, structure = jax.tree.flatten(inputs)

    def body(*references):
        sources = jax.tree.unflatten(structure, references[: len(arrays)])
        targets = references[len(arrays) :]

        def run(held, slots, kept_slots, result, numbers):
            slots, kept_slots = Slots(*slots, SLOTS), Slots(*kept_slots, TURNS)
            kernel = kind(place, sources, held, slots, kept_slots)
            divide_work(kernel.copy, lambda: kernel.multiply(targets, result, numbers))

        def tiles(references, slots, rows):
            return [launch.shared((slots, rows, WIDTH), dtype, WIDTH)] * len(references)

        def numbers(references, slots, rows):
            return [launch.shared((slots, rows), jnp.float32)] * len(references)

        launch.with_scratch(
            run,
            held=_Inputs(
                tiles(sources.kept, TURNS, KEPT),
                tiles(sources.streamed, SLOTS, kind.streamed),
                numbers(sources.kept_numbers, TURNS, KEPT),
                numbers(sources.streamed_numbers, SLOTS, kind.streamed),
            ),
            slots=Slots.barriers(
                SLOTS, len(sources.streamed) + len(sources.streamed_numbers)
            ),
            kept_slots=Slots.barriers(
                TURNS, len(sources.kept) + len(sources.kept_numbers)
            ),
            result=tiles(kind.sum_of, HALVES, HALF),
            numbers=launch.shared((HALVES, HALF), jnp.float32),
        )

    return launch.call(
        body,
        results,
        programs=min(place.pairs, launch.multiprocessors()),
        groups=HALVES + 1,
        name=kind.name,
    )(*arrays)


class _Kernel:
    """What all three kernels do.

    streamed: rows of a streamed tile; with 128, gradients do not fit in the registers.
    products: number of products of a kept tile and a streamed one; the first one is of
    queries and keys. sum_of, `weigh` and `shrink`: see `Products`. `start` makes the
    first carry of `weigh`; `finish` makes the results from the sums and the last carry.
    """

    name: str
    keeps_keys = False
    streamed = HALF
    products = 2
    sum_of: tuple[int, ...] = (0,)

    def __init__(self, place, sources: _Inputs, held: _Inputs, slots, kept_slots):
        self.place, self.slots, self.kept_slots = place, slots, kept_slots
        self.sources, self.held = sources, held

    def copy(self) -> None:
        """Copies all tiles to shared memory."""
        sources, held = self.sources, self.held

        def copy_all(turn, positions, tiles, numbers, slot, loaded):
            place = turn.in_array(positions)
            for source, target in zip(*tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], loaded)
            for source, target in zip(*numbers, strict=True):
                of_rows = source.at[turn.head, positions]
                plgpu.copy_gmem_to_smem(of_rows, target.at[slot], loaded)

        turns = self.place.turns()

        @pl.loop(0, turns)
        def _(number):
            turn = _Turn(number, self.place, type(self))
            copy = functools.partial(
                copy_all,
                turn,
                turn.positions(),
                (sources.kept, held.kept),
                (sources.kept_numbers, held.kept_numbers),
            )
            self.kept_slots.fill(number, copy)

            @pl.loop(0, turn.steps)
            def _(step):
                copy = functools.partial(
                    copy_all,
                    turn,
                    turn.met(step),
                    (sources.streamed, held.streamed),
                    (sources.streamed_numbers, held.streamed_numbers),
                )
                self.slots.fill(turn.before + step, copy)

        last = _Turn(turns - 1, self.place, type(self))
        self.slots.drain(last.before + last.steps)
        self.kept_slots.drain(turns)

    def multiply(self, targets, result, numbers) -> None:
        """Computes the results of all turns."""
        half = launch.group()

        @pl.loop(0, self.place.turns())
        def _(number):
            turn = _Turn(number, self.place, type(self))
            self.kept_slots.take(number)
            sums, number_h = self.results(turn, self.kept_slots.of(number), half)
            self.kept_slots.release(number)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for index, sum_hC in enumerate(sums):
                result[index][half] = sum_hC.astype(result[index].dtype)
            if number_h is not None:
                numbers[half] = number_h
            plgpu.commit_smem()
            positions = turn.positions(half)
            for index in range(len(sums)):
                target = targets[index].at[turn.in_array(positions)]
                plgpu.copy_smem_to_gmem(result[index].at[half], target)
            if number_h is not None:
                target = targets[-1].at[turn.head, positions]
                plgpu.copy_smem_to_gmem(numbers.at[half], target)

    def results(self, turn: _Turn, kept_slot, half) -> tuple:
        """The results [h, C] of a half of a kept tile, and the number of each row."""
        first, last = turn.first_step(half), turn.before + turn.steps - 1
        at = kept_slot, pl.ds(half * HALF, HALF)
        self.slots.take(turn.before)

        @pl.when(first == 1)
        def _():
            self.slots.release(turn.before)
            self.slots.take(turn.before + 1)

        def weigh(products, carry, slot, is_first):
            logit_hs, *others = products
            if is_first:  # Queries do not see the later keys of this tile.
                positions = [
                    lax.broadcasted_iota(jnp.int32, logit_hs.shape, axis)
                    for axis in (0, 1)
                ]
                query_hs, key_hs = reversed(positions) if self.keeps_keys else positions
                if self.streamed == KEPT:
                    query_hs += half * HALF
                logit_hs = jnp.where(query_hs >= key_hs, logit_hs, -jnp.inf)
            return self.weigh(logit_hs, *others, carry=carry, slot=slot)

        of_tiles = Products(
            tuple(held.at[at] for held in self.held.kept[: self.products]),
            self.held.streamed,
            self.sum_of,
            self.slots,
        )
        first = turn.before + first
        sums, carry = of_tiles.fold(first, last, weigh, self.shrink, self.start(at))
        return self.finish(sums, carry)

    def shrink(self, sums: tuple, carry) -> tuple:
        """The sums as they are."""
        del carry
        return sums


class _Results(_Kernel):
    """The forward pass; keeps queries, streams keys and values."""

    name = "attention"
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

    def start(self, at) -> tuple:
        """Normalisers, and the means of the weights' gradients, [h]."""
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
