"""A transformer block for one new token of each of few sequences.

Such a step reads every weight once and computes little. So it takes as long as its
kernels take to start, and to get their data. A block has five kernels: four products
and attention. A product with many rows of weights is cut along them, too, so that all
of the GPU loads them. The kernel that follows adds up the parts and does what is left
to do: it adds the bias, applies GELU, or adds to the residual stream and normalises it.

Shape letters: B sequences, S parts, X and Y any width, D model width, T tokens of the
cache, H heads, C head width; x, y and t: those of one tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pcagpt.kernels.constants import LOG2_E
from pcagpt.kernels.triton import launch
from pcagpt.kernels.triton.gelu import tanh_gelu

LEAST_PIECE = 16  # of a row, and least width of a head
MOST_PIECE = 128
FEW = 4  # sequences; products of more need the GPU's matrix units
COLUMNS, ROWS = 64, 128  # most of a weight matrix that a program loads
PRODUCT_WARPS = 4


class Tiles(NamedTuple):
    """How a program of `attend` reads the cache."""

    tokens: int  # most per tile
    warps: int
    ahead: bool  # whether it loads a tile while it works on the one before


# Many heads fill the GPU with programs. The registers of a program of few hold one
# large tile, but not two.
TILES_OF_MANY, TILES_OF_FEW = Tiles(32, 2, True), Tiles(512, 8, False)


class Sum(NamedTuple):
    """A product in parts: parts.sum(axis=0) + bias, all float32.

    parts: [S, B, X]. bias: [X].
    """

    parts: jax.Array
    bias: jax.Array

    def total(self) -> jax.Array:
        """The sum, [B, X]."""
        return self.parts.sum(axis=0) + self.bias


class Norm(NamedTuple):
    """A LayerNorm: scale and offset [X] float32, and what is added to the variance."""

    scale: jax.Array
    offset: jax.Array
    epsilon: float


def fits(width: int, heads: int) -> bool:
    """Whether `attend` supports heads of this width, and products rows of it."""
    head_width = width // heads
    is_power = head_width == launch.power_of_2(head_width, head_width)
    piece = launch.power_of_2(width, MOST_PIECE)
    return is_power and min(head_width, piece) >= LEAST_PIECE


def product(x_BX: jax.Array, kernel_XY: jax.Array) -> jax.Array:
    """x @ kernel, in parts: [S, B, Y] float32."""

    def row(named, number, place):
        return named["x"][number, place].astype(jnp.float32)

    return _product({"x": x_BX}, row, kernel_XY)[0]


def gelu_product(h: Sum, kernel_XY: jax.Array) -> jax.Array:
    """gelu(h) @ kernel, in parts: [S, B, Y] float32; GELU in the tanh form."""

    def row(named, number, place):
        return tanh_gelu(_total(named, number, place))

    return _product(h._asdict(), row, kernel_XY)[0]


def norm_product(
    stream_BX: jax.Array, update: Sum, norm: Norm, kernel_XY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(stream + update, norm(stream + update) @ kernel in parts [S, B, Y] float32).

    The stream has the compute dtype, and is rounded to it before the norm.
    """
    count, width = stream_BX.shape
    places = _pieces(width)

    def added(named, number, place):
        x_x = named["stream"][number, place].astype(jnp.float32)
        x_x = (x_x + _total(named, number, place)).astype(stream_BX.dtype)
        return x_x.astype(jnp.float32)

    def statistics(named, number):
        xs = [added(named, number, place) for place in places]
        mean = sum(xs).sum() / width
        variance = sum((x_x - mean) * (x_x - mean) for x_x in xs).sum() / width
        return mean, jax.lax.rsqrt(variance + norm.epsilon)

    def row(named, number, place, mean, inverse):
        scale_x, offset_x = named["scale"][place], named["offset"][place]
        return (added(named, number, place) - mean) * inverse * scale_x + offset_x

    def write_stream(named, stream_ref):
        for number in range(count):
            for place in places:
                x_x = added(named, number, place)
                stream_ref[number, place] = x_x.astype(stream_BX.dtype)

    inputs = {
        "stream": stream_BX,
        **update._asdict(),
        "scale": norm.scale,
        "offset": norm.offset,
    }
    parts_SBY, stream_BX = _product(inputs, row, kernel_XY, statistics, write_stream)
    return stream_BX, parts_SBY


def _total(named: dict, number: int, place) -> jax.Array:
    """A piece of a row of a `Sum`."""
    parts_ref = named["parts"]
    parts = [parts_ref[part, number, place] for part in range(parts_ref.shape[0])]
    return sum(parts) + named["bias"][place]


def _product(
    inputs: dict, row, kernel_XY, statistics=lambda *_: (), write_stream=None
) -> list[jax.Array]:
    """rows @ kernel in parts [S, B, Y], and the stream if there is one to write.

    Args:
      inputs: arrays, which each program gets whole, as references by name.
      row: (references, number, place, *statistics) -> piece of this row, float32.
      kernel_XY: a program loads a tile of it.
      statistics: (references, number) -> what `row` needs of the whole row.
      write_stream: (references, reference of the stream) -> writes it.
    """
    first = next(iter(inputs.values()))
    count, width = first.shape[-2:]
    splits = -(-width // ROWS)
    while width % splits:
        splits += 1
    columns = launch.power_of_2(kernel_XY.shape[1], COLUMNS)
    height = width // splits

    def visit(*references):
        named = dict(zip([*inputs, "kernel"], references, strict=False))
        parts_ref, *stream_ref = references[len(inputs) + 1 :]
        places = _pieces(height, pl.program_id(1) * height)
        # All loads of the kernel begin before the first is needed.
        kernels = [named["kernel"][place, :] for place in places]
        for number in range(count):
            of_row = statistics(named, number)
            # Summing over the pieces first leaves one sum over threads.
            products_xy = sum(
                row(named, number, place, *of_row)[:, None]
                * kernel_xy.astype(jnp.float32)
                for place, kernel_xy in zip(places, kernels, strict=True)
            )
            parts_ref[number, :] = products_xy.sum(axis=0)
        if write_stream:

            @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
            def _():
                write_stream(named, *stream_ref)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda j, s: (0,) * array.ndim)

    parts = jax.ShapeDtypeStruct((splits, count, kernel_XY.shape[1]), jnp.float32)
    streams = [jax.ShapeDtypeStruct(first.shape, first.dtype)] if write_stream else []
    return launch.call(
        visit,
        grid=(kernel_XY.shape[1] // columns, splits),
        in_specs=[
            *map(whole, inputs.values()),
            pl.BlockSpec((width, columns), lambda j, s: (0, j)),
        ],
        out_specs=[
            pl.BlockSpec((None, count, columns), lambda j, s: (s, 0, j)),
            *map(whole, streams),
        ],
        out_shape=[parts, *streams],
        warps=PRODUCT_WARPS,
        name="one_token_product",
    )(*inputs.values(), kernel_XY)


def _pieces(width: int, start=0) -> list:
    """Slices of `width` elements from `start`; their sizes are powers of 2."""
    size = launch.power_of_2(width, MOST_PIECE)
    return [pl.ds(start + first, size) for first in range(0, width, size)]


def attend(
    qkv: Sum,
    keys_BTHC: jax.Array,
    values_BTHC: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token of each sequence to itself and all earlier ones.

    Args:
      qkv: its query, key and value, [B, 3D]. The key's bias has no effect, and that of
        the value is added after attention; see `model.attention`. So the cache has
        neither.
      keys_BTHC: the cache, in which the tokens before `position` count.
      values_BTHC: the same.
      position: int32 scalar, place of the token in the cache.

    Returns:
      The result [B, D], and keys and values with those of the token. These overwrite
      the cache.
    """
    batch, capacity, heads, head_width = keys_BTHC.shape

    splits, has_many = qkv.parts.shape[0], batch * heads >= launch.PROGRAMS
    tiles = TILES_OF_MANY if has_many else TILES_OF_FEW
    size = launch.power_of_2(capacity, tiles.tokens)

    def head(part: int):
        shape = splits, None, head_width
        return pl.BlockSpec(shape, lambda b, h: (0, b, part * heads + h))

    def bias(part: int):
        return pl.BlockSpec((head_width,), lambda b, h: (part * heads + h,))

    kept = pl.BlockSpec((None, capacity, None, head_width), lambda b, h: (b, 0, h, 0))
    number = pl.BlockSpec((1,), lambda b, h: (0,))
    result = pl.BlockSpec((None, head_width), lambda b, h: (b, h))
    return tuple(
        launch.call(
            functools.partial(_visit_head, size=size, ahead=tiles.ahead),
            grid=(batch, heads),
            in_specs=[number, *map(head, range(3)), bias(0), bias(2), kept, kept],
            out_specs=[result, kept, kept],
            out_shape=[
                jax.ShapeDtypeStruct((batch, heads * head_width), keys_BTHC.dtype),
                jax.ShapeDtypeStruct(keys_BTHC.shape, keys_BTHC.dtype),
                jax.ShapeDtypeStruct(values_BTHC.shape, values_BTHC.dtype),
            ],
            input_output_aliases={6: 1, 7: 2},
            warps=tiles.warps,
            name="one_token_attend",
        )(
            jnp.asarray(position, jnp.int32)[None],
            *(qkv.parts,) * 3,
            *(qkv.bias,) * 2,
            keys_BTHC,
            values_BTHC,
        )
    )


def _visit_head(position_ref, q_ref, k_ref, v_ref, *references, size: int, ahead: bool):
    """Kernel: one head of one sequence."""
    q_bias_ref, v_bias_ref, *references = references
    _, _, y_ref, keys_ref, values_ref = references  # The inputs are the same memory.
    capacity, head_width = keys_ref.shape
    position = position_ref[0]
    scale = LOG2_E / head_width**0.5
    q_C, k_C, v_C = (
        sum(ref[part, :] for part in range(ref.shape[0]))
        for ref in (q_ref, k_ref, v_ref)
    )
    q_1C = (q_C + q_bias_ref[...])[None, :] * scale
    k_1C = k_C.astype(keys_ref.dtype)[None, :]
    v_1C = v_C.astype(values_ref.dtype)[None, :]
    # What is written here is not read below: the new token starts the sums.
    keys_ref[pl.ds(position, 1), :] = k_1C
    values_ref[pl.ds(position, 1), :] = v_1C

    def load(tile):
        place = pl.ds(tile * size, size)
        return keys_ref[place, :], values_ref[place, :]

    def visit(tile, carry):
        *loaded, sum_, highest, mean_C = carry
        following = load(jnp.minimum(tile + 1, capacity // size - 1)) if ahead else ()
        loaded = loaded or load(tile)
        keys_tC, values_tC = (kept_tC.astype(jnp.float32) for kept_tC in loaded)
        token_t = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        exponent_t = jnp.sum(keys_tC * q_1C, axis=1)
        exponent_t = jnp.where(token_t < position, exponent_t, -jnp.inf)
        new_highest = jnp.maximum(highest, exponent_t.max())
        p_t = jnp.exp2(exponent_t - new_highest)
        shrink = jnp.exp2(highest - new_highest)
        mean_C = mean_C * shrink + jnp.sum(p_t[:, None] * values_tC, axis=0)
        return *following, sum_ * shrink + p_t.sum(), new_highest, mean_C

    own = jnp.sum(k_1C.astype(jnp.float32) * q_1C)
    start = jnp.float32(1), own, v_1C.astype(jnp.float32).sum(axis=0)
    if ahead:
        start = *load(0), *start
    tiles = (position + size - 1) // size
    *_, sum_, _, mean_C = jax.lax.fori_loop(0, tiles, visit, start)
    y_ref[...] = (mean_C / sum_ + v_bias_ref[...]).astype(y_ref.dtype)
