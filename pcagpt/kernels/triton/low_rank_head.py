"""The output head's softmax and gradients as attention, without an [N, V] array.

Softmax over the vocabulary is attention with z as queries and wte as keys and values.
With FlashAttention's running normaliser (Dao et al. 2022, section 3.1), one pass over
the vocabulary gives the loss and its gradient with respect to z. This gradient is the
mean row p @ wte under the softmax p, minus the target's row. One pass over the tokens
then gives the gradient with respect to the table: p.T @ z, minus z at the row of each
token's target.

Shape letters: N tokens, V rows of a table, K rank; n and v: those of one tile; k: the
columns of one of the pieces that a row is cut into (see `_pieces`).
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pcagpt.kernels.constants import LOG2_E
from pcagpt.kernels.triton import launch
from pcagpt.sharding import inside

LEAST_RANK = 16  # the smallest operand of a GPU's matrix units


class Tiles(NamedTuple):
    """A program keeps one tile of an array and loops over the tiles of another."""

    kept: int  # rows of the tile that stays
    streamed: int  # rows loaded per iteration
    warps: int
    stages: int


# {largest rank: tiles}. These are the fastest of 6 to 12 choices on an H200.
SUMMARY_TILES = {
    32: Tiles(128, 128, 4, 3),
    64: Tiles(64, 128, 4, 3),
    96: Tiles(64, 64, 4, 3),
    128: Tiles(64, 128, 4, 2),
    224: Tiles(64, 64, 4, 3),
    256: Tiles(128, 64, 8, 3),
    320: Tiles(64, 32, 4, 3),
}
GRADIENT_TILES = {
    32: Tiles(128, 64, 4, 3),
    64: Tiles(64, 64, 4, 3),
    96: Tiles(64, 128, 4, 3),
    128: Tiles(64, 64, 4, 3),
    256: Tiles(128, 64, 8, 3),
    320: Tiles(64, 32, 4, 3),
}
# For both, on GPUs with less shared memory.
SMALL_TILES = {
    64: Tiles(64, 128, 4, 3),
    128: Tiles(64, 128, 4, 2),
    256: Tiles(64, 64, 4, 2),
    320: Tiles(64, 32, 8, 2),
}
MAX_RANK = max(SUMMARY_TILES)


def fits(rank: int) -> bool:
    """Whether the kernels support a table of that rank."""
    return rank <= MAX_RANK


def summarize(
    z_NK: jax.Array, wte_VK: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """log(sum(exp(z @ wte[:size].T))) [N], and the mean row under the softmax [N, K].

    Both are float32; z and wte have the compute dtype. Only the first `size` rows of
    wte count; the others are padding.
    """
    rank = z_NK.shape[1]
    tiles = _tiles(SUMMARY_TILES, rank)
    wte_VK = _pad(wte_VK, tiles.streamed)

    @inside.by_device([True, False], [True, True])
    def of_rows(z_NK, wte_VK):
        count = z_NK.shape[0]
        z_NK = _pad(z_NK, tiles.kept)
        kept = pl.BlockSpec((tiles.kept, z_NK.shape[1]), lambda i: (i, 0))
        normaliser_N, mean_NK = launch.call(
            functools.partial(_summarize, size=size, rows=tiles.streamed),
            grid=(z_NK.shape[0] // tiles.kept,),
            in_specs=[kept, pl.BlockSpec(wte_VK.shape, lambda i: (0, 0))],
            out_specs=[pl.BlockSpec((tiles.kept,), lambda i: (i,)), kept],
            out_shape=[
                jax.ShapeDtypeStruct(z_NK.shape[:1], jnp.float32),
                jax.ShapeDtypeStruct(z_NK.shape, jnp.float32),
            ],
            warps=tiles.warps,
            stages=tiles.stages,
            name="head_summarize",
        )(z_NK, wte_VK)
        return normaliser_N[:count], mean_NK[:count, :rank]

    return of_rows(z_NK, wte_VK)


def _summarize(z_ref, wte_ref, normaliser_ref, mean_ref, *, size: int, rows: int):
    """Kernel: keeps a tile of tokens and loops over the table."""
    pieces = _pieces(z_ref.shape[1])
    z_nk = [z_ref[:, piece] for piece in pieces]

    def visit(tile, carry, is_last=False):
        mean_nk, sum_n, highest_n = carry
        wte_vk = [wte_ref[pl.ds(tile * rows, rows), piece] for piece in pieces]
        exponent_nv = _products(z_nk, wte_vk) * LOG2_E
        if is_last:
            column_nv = jax.lax.broadcasted_iota(jnp.int32, exponent_nv.shape, 1)
            is_real_nv = column_nv < size - tile * rows
            exponent_nv = jnp.where(is_real_nv, exponent_nv, -jnp.inf)
        new_highest_n = jnp.maximum(highest_n, exponent_nv.max(axis=1))
        p_nv = jnp.exp2(exponent_nv - new_highest_n[:, None])
        # The sums so far are relative to the old maximum.
        shrink_n = jnp.exp2(highest_n - new_highest_n)
        sum_n = sum_n * shrink_n + p_nv.sum(axis=1)
        mean_nk = [
            mean * shrink_n[:, None] + _weighted(p_nv, wte)
            for mean, wte in zip(mean_nk, wte_vk, strict=True)
        ]
        return mean_nk, sum_n, new_highest_n

    count = z_ref.shape[0]
    start = (
        [jnp.zeros((count, piece.size), jnp.float32) for piece in pieces],
        jnp.zeros(count, jnp.float32),
        jnp.full(count, -jnp.inf, jnp.float32),
    )
    full_tiles = size // rows
    carry = jax.lax.fori_loop(0, full_tiles, visit, start)
    if size % rows:  # Only the last tile pays for the mask.
        carry = visit(full_tiles, carry, is_last=True)
    mean_nk, sum_n, highest_n = carry
    normaliser_ref[...] = (highest_n + jnp.log2(sum_n)) / LOG2_E
    for piece, mean in zip(pieces, mean_nk, strict=True):
        mean_ref[:, piece] = mean / sum_n[:, None]


def table_gradient(
    wte_VK: jax.Array, z_NK: jax.Array, normaliser_N: jax.Array, targets_N: jax.Array
) -> jax.Array:
    """(exp(z @ wte.T - normaliser[:, None]) - onehot(targets)).T @ z: [V, K] float32.

    Sums over the tokens of one device; call it inside `inside.by_device`. A token with
    an infinite normaliser has probability 0 in every row. A target that is
    negative or at least V matches no row.
    """
    size, rank = wte_VK.shape
    tiles = _tiles(GRADIENT_TILES, rank)
    wte_VK = _pad(wte_VK, tiles.kept)
    # A short table has few tiles, so the tokens are split as well to keep the GPU busy.
    splits = max(1, launch.PROGRAMS // (wte_VK.shape[0] // tiles.kept))
    splits = min(splits, -(-z_NK.shape[0] // tiles.streamed))
    z_NK = _pad(z_NK, tiles.streamed * splits)
    padding = z_NK.shape[0] - normaliser_N.shape[0]
    normaliser_N = jnp.pad(normaliser_N, (0, padding), constant_values=jnp.inf)
    targets_N = jnp.pad(targets_N, (0, padding), constant_values=-1)
    count, padded_rank = z_NK.shape[0] // splits, z_NK.shape[1]
    number = pl.BlockSpec((count,), lambda i, j: (j,))
    kept = tiles.kept, padded_rank
    parts = launch.call(
        functools.partial(_table_gradient, rows=tiles.streamed),
        grid=(wte_VK.shape[0] // tiles.kept, splits),
        in_specs=[
            pl.BlockSpec(kept, lambda i, j: (i, 0)),
            pl.BlockSpec((count, padded_rank), lambda i, j: (j, 0)),
            number,
            number,
        ],
        out_specs=pl.BlockSpec((None, *kept), lambda i, j: (j, i, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, *wte_VK.shape), jnp.float32),
        warps=tiles.warps,
        stages=tiles.stages,
        name="head_table_gradient",
    )(wte_VK, z_NK, normaliser_N * LOG2_E, targets_N)
    return parts.sum(axis=0)[:size, :rank]


def _table_gradient(
    wte_ref, z_ref, normaliser_ref, target_ref, gradient_ref, *, rows: int
):
    """Kernel: keeps a tile of the table and loops over the tokens."""
    kept, rank = wte_ref.shape
    pieces = _pieces(rank)
    wte_vk = [wte_ref[:, piece] for piece in pieces]
    first_row = pl.program_id(0) * kept

    def visit(tile, gradient_vk):
        place = pl.ds(tile * rows, rows)
        z_nk = [z_ref[place, piece] for piece in pieces]
        normaliser_n = normaliser_ref[place]
        exponent_vn = _products(wte_vk, z_nk) * LOG2_E - normaliser_n[None, :]
        row_vn = jax.lax.broadcasted_iota(jnp.int32, exponent_vn.shape, 0)
        is_target_vn = row_vn == (target_ref[place] - first_row)[None, :]
        p_vn = jnp.exp2(exponent_vn)
        error_vn = jnp.where(is_target_vn, p_vn - 1.0, p_vn)
        return [
            gradient + _weighted(error_vn, z)
            for gradient, z in zip(gradient_vk, z_nk, strict=True)
        ]

    start = [jnp.zeros((kept, piece.size), jnp.float32) for piece in pieces]
    tiles = z_ref.shape[0] // rows
    gradient_vk = jax.lax.fori_loop(0, tiles, visit, start)
    for piece, gradient in zip(pieces, gradient_vk, strict=True):
        gradient_ref[:, piece] = gradient


def _products(a_ak, b_bk) -> jax.Array:
    """a @ b.T from the pieces of both, accumulated in float32: [a, b]."""
    products = [
        jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        for a, b in zip(a_ak, b_bk, strict=True)
    ]
    return functools.reduce(operator.add, products)


def _weighted(p_ab, b_bK) -> jax.Array:
    """p @ b with p in the dtype of b, accumulated in float32: [a, K]."""
    return jnp.dot(p_ab.astype(b_bK.dtype), b_bK, preferred_element_type=jnp.float32)


def _tiles(choices: dict[int, Tiles], rank: int) -> Tiles:
    if not launch.has_large_shared_memory():
        choices = SMALL_TILES
    return choices[min(largest for largest in choices if largest >= rank)]


def _pieces(rank: int) -> list[pl.Slice]:
    """Columns of a row in pieces, since the widths of Triton's arrays are powers of 2.

    Rank 160 has pieces of 128 and 32, where one array would take 256.
    """
    pieces, start = [], 0
    for bit in reversed(range(rank.bit_length())):
        if rank & (width := 1 << bit):
            pieces.append(pl.ds(start, width))
            start += width
    return pieces


def _pad(rows_XK, multiple: int) -> jax.Array:
    """Adds rows of zeros up to a multiple, and columns up to one of LEAST_RANK."""
    count, rank = rows_XK.shape
    return jnp.pad(rows_XK, ((0, -count % multiple), (0, -rank % LEAST_RANK)))
