"""A token table in codes of a few bits, which lookup and head read in place.

Shape letters: N tokens, V rows of a band, D model width, K directions of a band.

Row v of a band is mean + columns * (scales * levels[codes_v]) @ basis. Eight directions
are a block: their codes have the same width in bits, and as many bytes. Byte i of a
block has bit i of its eight codes. Wide blocks come first.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt.model.config import BLOCK_RANK, LEVELS, WIDTHS, BandSpec

TILE = 2048  # rows of the head that are unpacked at the same time


@flax.struct.dataclass
class SharedArrays:
    """What all bands of a packed table share."""

    basis: jax.Array  # [directions, D] int8
    columns: jax.Array  # [D] float32, scale of each column of the basis
    mean: jax.Array  # [D] float32
    levels: jax.Array  # [sum of 2^width] float32: the values of the codes of each width


@flax.struct.dataclass
class PackedBand:
    """One band of the output head, as a pytree."""

    codes: jax.Array  # [V, bytes] uint8
    scales: jax.Array  # [K] float32
    shared: SharedArrays
    # Static, because they determine shapes; see `BandSpec`.
    blocks: tuple[int, ...] = flax.struct.field(pytree_node=False)
    start: int = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)
    scale_down = None  # Its rows have the model's width.

    def rows(self, rows_N: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Rows of the table: [N, D] in `dtype`."""
        # NumPy refuses rows beyond the table.
        return self.decode(jnp.asarray(self.codes)[rows_N], dtype)

    def decode(self, codes, dtype=jnp.float32):
        """The rows [N, D] of codes [N, bytes]; takes arrays of JAX or of NumPy."""
        shared = self.shared
        values_NK = unpack(codes, self.blocks, shared.levels, dtype)
        values_NK *= self.scales.astype(dtype)
        basis_KD = shared.basis[: len(self.scales)].astype(dtype)
        scaled_ND = (values_NK @ basis_KD) * shared.columns.astype(dtype)
        return scaled_ND + shared.mean.astype(dtype)

    def logits(self, h_ND: jax.Array, dtype) -> jax.Array:
        """[N, V] in `dtype`; only one tile of the table is unpacked at a time."""
        scaled_ND = h_ND * self.shared.columns.astype(h_ND.dtype)
        # All bands project on all directions: XLA then does it once.
        z_NK = scaled_ND @ self.shared.basis.astype(h_ND.dtype).T
        z_NK = z_NK[:, : len(self.scales)] * self.scales.astype(h_ND.dtype)
        offset_N = jnp.matmul(
            h_ND,
            self.shared.mean.astype(h_ND.dtype),
            preferred_element_type=jnp.float32,
        )
        tile = min(TILE, self.size)

        def add_tile(number, logits_NV):
            # The last tile may start earlier, to end with the table.
            start = jnp.minimum(number * tile, self.size - tile)
            codes = jax.lax.dynamic_slice_in_dim(self.codes, start, tile)
            values_VK = unpack(codes, self.blocks, self.shared.levels, h_ND.dtype)
            of_tile = jax.lax.dot_general(
                z_NK, values_VK, (((1,), (1,)), ((), ())), preferred_element_type=dtype
            )
            of_tile += offset_N[:, None].astype(dtype)
            return jax.lax.dynamic_update_slice_in_dim(logits_NV, of_tile, start, 1)

        zeros_NV = jnp.zeros((len(h_ND), self.size), dtype)
        return jax.lax.fori_loop(0, -(-self.size // tile), add_tile, zeros_NV)


def unpack(codes, blocks: tuple[int, ...], levels, dtype):
    """The values of packed rows: [N, bytes] uint8 -> [N, K] in `dtype`.

    Takes arrays of JAX or of NumPy.
    """
    numpy = codes.__array_namespace__()
    values, byte, level = [], 0, 0
    for width, count in zip(WIDTHS, blocks, strict=True):
        size = count * width
        bytes_NSW1 = codes[:, byte : byte + size].reshape(len(codes), count, width, 1)
        bits_NSWI = bytes_NSW1 >> numpy.arange(BLOCK_RANK, dtype=numpy.uint8) & 1
        places_W1 = numpy.arange(width, dtype=numpy.uint8)[:, None]
        numbers_NSI = (bits_NSWI << places_W1).sum(axis=2, dtype=numpy.uint8)
        of_width = numpy.asarray(levels[level : level + 2**width], dtype=dtype)
        values.append(of_width[numbers_NSI].reshape(len(codes), count * BLOCK_RANK))
        byte, level = byte + size, level + 2**width
    return numpy.concatenate(values, axis=1)


class Directions(nn.Module):
    """The arrays that all bands share; they come from a checkpoint."""

    bands: tuple[BandSpec, ...]
    width: int

    def setup(self):
        """Declares the arrays."""
        rows = BLOCK_RANK * max(sum(band.blocks) for band in self.bands)
        shapes = {
            "basis": ((rows, self.width), jnp.int8),
            "columns": (self.width, jnp.float32),
            "mean": (self.width, jnp.float32),
            "levels": (LEVELS, jnp.float32),
        }
        self.arrays = {
            name: self.variable("constants", name, jnp.zeros, *shape)
            for name, shape in shapes.items()
        }

    def __call__(self) -> SharedArrays:
        """The arrays."""
        return SharedArrays(
            **{name: found.value for name, found in self.arrays.items()}
        )


class PackedEmbedding(nn.Module):
    """The codes of one band; they come from a checkpoint and are not trained."""

    band: BandSpec
    directions: Directions
    scale_up: None = None  # `lookup` finds embeddings.

    def setup(self):
        """Declares codes and scales."""
        blocks = self.band.blocks
        row_bytes = sum(n * width for n, width in zip(blocks, WIDTHS, strict=True))
        shape = self.band.size, row_bytes
        self.codes = self.variable("constants", "codes", jnp.zeros, shape, jnp.uint8)
        scales = BLOCK_RANK * sum(blocks)
        self.scales = self.variable("constants", "scales", jnp.zeros, scales)

    def head(self) -> PackedBand:
        """This band of the output head."""
        codes, scales, band = self.codes.value, self.scales.value, self.band
        shared = self.directions()
        return PackedBand(codes, scales, shared, band.blocks, band.start, band.size)

    def lookup(self, rows_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of this band -> their embeddings [N, D]."""
        return self.head().rows(rows_N, dtype)
