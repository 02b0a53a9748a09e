"""Tiles of sequences that meet in causal attention, and which program works on them.

A program keeps a tile of queries, which meets the keys before it, or a tile of keys,
which meets the queries after it. It works on two tiles in turn: a tile and its mirror
image in the sequence. Together they meet as many tiles as any other two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pcagpt.kernels.mosaic import launch
from pcagpt.kernels.mosaic.streamed import HALF, HALVES

KEPT = HALVES * HALF  # rows of a kept tile
WIDTH = 64  # of a head


class Sequences(NamedTuple):
    """Sizes of the work."""

    length: int
    heads: int  # of a sequence
    all_heads: int

    @property
    def tiles(self) -> int:
        """Number of kept tiles of a head, which is even."""
        return self.length // KEPT

    @property
    def pairs(self) -> int:
        """Number of pairs of tiles."""
        return self.all_heads * (self.tiles // 2)

    @property
    def turns(self) -> jax.Array:
        """Number of turns of this program, at least 2."""
        program, programs = launch.program()
        return 2 * lax.div(self.pairs - program + programs - 1, programs)


class Turn:
    """What a program does in a turn: a kept tile and the streamed tiles that it meets.

    keeps_keys: instead of queries. streamed: rows of a streamed tile, 64 or 128. steps:
    number of streamed tiles; before: that of all turns before.
    """

    def __init__(self, number, sizes: Sequences, keeps_keys: bool, streamed: int):
        program, programs = launch.program()
        tiles, is_mirror = sizes.tiles, lax.rem(number, 2)
        pair = lax.div(number, 2) * programs + program
        self.head = lax.div(pair, tiles // 2)
        # The tile that meets more comes first.
        shorter_by = lax.rem(pair, tiles // 2)
        tile = jnp.where(is_mirror == 1, tiles - 1 - shorter_by, shorter_by)
        before = lax.div(number, 2) * (tiles + 1) + is_mirror * (tiles - shorter_by)
        self.steps = KEPT // streamed * (tiles - tile)
        self.before = KEPT // streamed * before
        self._keeps_keys, self._streamed = keeps_keys, streamed
        self._tile = tile if keeps_keys else tiles - 1 - tile
        self._row = lax.div(self.head, sizes.heads) * sizes.length
        self._column = lax.rem(self.head, sizes.heads) * WIDTH
        self._width = sizes.heads * WIDTH

    def kept(self) -> pl.Slice:
        """Positions of the kept tile in its sequence."""
        return pl.ds(self._tile * KEPT, KEPT)

    def half(self, half) -> pl.Slice:
        """Positions of half of the kept tile."""
        return pl.ds(self._tile * KEPT + half * HALF, HALF)

    def met(self, step) -> pl.Slice:
        """Positions of a streamed tile; the nearest one comes first."""
        in_kept = KEPT // self._streamed
        number = step if self._keeps_keys else in_kept - 1 - step
        start = (self._tile * in_kept + number) * self._streamed
        return pl.ds(start, self._streamed)

    def skipped(self, half) -> jax.Array:
        """Number of streamed tiles that half of the kept tile does not meet, 0 or 1."""
        if self._streamed == KEPT:
            return jnp.zeros_like(half)
        return half if self._keeps_keys else HALVES - 1 - half

    def hides(self, half) -> jax.Array:
        """Where a query does not see a key, bool [64, streamed].

        Rows are of half of the kept tile, columns of the first tile that it meets.
        """
        shape = HALF, self._streamed
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        if self._streamed == KEPT:
            row += half * HALF
        return row > column if self._keeps_keys else row < column

    def place(self, positions: pl.Slice, third: int) -> tuple:
        """Rows and columns of positions in a third of an array [N, X]."""
        rows = pl.ds(self._row + positions.start, positions.size)
        return rows, pl.ds(self._column + third * self._width, WIDTH)
