"""Token embedding and output head, which share their tables.

Shape letters: N tokens, V rows of a table, D model width, K rank.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.model.config import INIT_STD, BandSpec, GPTConfig
from pcagpt.model.packed import Directions, PackedBand, PackedEmbedding
from pcagpt.sharding.inside import by_device, device_count


@flax.struct.dataclass
class HeadBand:
    """One band of the output head, as a pytree."""

    wte: jax.Array  # [V, K]; rows from `size` on are padding
    scale_down: jax.Array | None  # [K, D]; None: wte is [V, D]
    # Static, because they determine shapes; see `BandSpec`.
    start: int = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)

    def logits(self, h_ND: jax.Array, dtype) -> jax.Array:
        """[N, V] in `dtype`, padding columns included."""
        z_NK, wte_VK = project(h_ND, self.scale_down), self.wte.astype(h_ND.dtype)
        return products(z_NK, wte_VK, dtype)

    def rows(self, rows_N: jax.Array) -> jax.Array:
        """Rows of the table [N, K], which `scale_down` maps to [N, D]."""
        return self.wte[rows_N]


# A row beyond any table. JAX reads the last row instead, and adds no gradient anywhere.
# If a row of the table stood for it, a GPU would add the gradients of most tokens to
# this row, one after the other.
NO_ROW = 2**31 - 1

ALIGNED = 16  # GPUs multiply faster if the widths of matrices are multiples of 16.

Head = tuple[HeadBand | PackedBand, ...]  # in the order of their columns


def project(h_ND: jax.Array, scale_down_KD: jax.Array | None) -> jax.Array:
    """z = h @ scale_down.T [N, K], or h itself at full width; logits are z @ wte.T."""
    if scale_down_KD is None:
        return h_ND
    return h_ND @ scale_down_KD.astype(h_ND.dtype).T


def products(z_NK: jax.Array, wte_VK: jax.Array, dtype) -> jax.Array:
    """z @ wte.T in `dtype`, without a transposed copy of the table: [N, V]."""
    return jax.lax.dot_general(
        z_NK, wte_VK, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )


def concatenated(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """The factors of several bands along their ranks, as one factor of a product.

    If there are several, zeros fill the rank up to a multiple of ALIGNED.
    """
    if len(arrays) == 1:
        return arrays[0]
    missing = -sum(array.shape[axis] for array in arrays) % ALIGNED
    shape = list(arrays[0].shape)
    shape[axis] = missing
    return jnp.concatenate([*arrays, jnp.zeros(shape, arrays[0].dtype)], axis)


def head_logits(h_ND, head: Head, logits_dtype) -> list[jax.Array]:
    """Logits of each band, padding columns included: [N, V] float32."""
    return [band.logits(h_ND, logits_dtype).astype(jnp.float32) for band in head]


class BandEmbedding(nn.Module):
    """The parameters of one band, shared by the input lookup and the output head."""

    band: BandSpec
    n_embd: int
    scale_tying: bool

    def setup(self):
        """Declares wte [V, K] and, at a rank K, the scale matrices [K, D]."""
        rows, rank = self.band.size + self.band.padding, self.band.rank
        init = nn.initializers.normal(INIT_STD)
        self.wte = self.param("wte", init, (rows, rank or self.n_embd))
        self.scale_up = self.scale_down = None
        if rank:
            shape = rank, self.n_embd
            self.scale_up = self.scale_down = self.param("scale_up", init, shape)
            if not self.scale_tying:
                self.scale_down = self.param("scale_down", init, shape)

    def lookup(self, rows_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of this band [N, K]; without `scale_up` they are the embeddings."""
        return _take_rows(self.wte, rows_N, dtype)

    def head(self) -> HeadBand:
        """This band of the output head."""
        return HeadBand(self.wte, self.scale_down, self.band.start, self.band.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(wte_VK: jax.Array, rows_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [N, K] in `dtype`; the gradient is summed in the table's own dtype."""
    # The cast comes first, so that devices exchange a split table in the smaller dtype.
    # Arrays of NumPy refuse NO_ROW.
    return jnp.asarray(wte_VK).astype(dtype)[rows_N]


def _take_rows_backward(dtype, residuals, gradient_NK):
    del dtype
    wte_VK, rows_N = residuals
    shape, table_dtype = wte_VK.shape, wte_VK.dtype

    # Each device first sums the gradients of its own tokens. Without this, XLA scatters
    # into the gradient of the head, and every device needs all of that gradient.
    @by_device([True, True], [False])
    def of_table(gradient_NK, rows_N):
        zeros_VK = jnp.zeros(shape, table_dtype)
        return (zeros_VK.at[rows_N].add(gradient_NK.astype(table_dtype)),)

    return *of_table(gradient_NK, rows_N), None


_take_rows.defvjp(
    lambda wte_VK, rows_N, dtype: (_take_rows(wte_VK, rows_N, dtype), (wte_VK, rows_N)),
    _take_rows_backward,
)


class TokenEmbedding(nn.Module):
    """The input embedding and the output head, which are tied."""

    config: GPTConfig

    def setup(self):
        """Declares the bands and, if there are several, the column of each token."""
        config = self.config
        width, tying = config.n_embd, config.n_embd_wte_scale_tying
        if config.band_blocks:
            self.directions = Directions(config.bands, width)
        self.band_embeddings = [
            PackedEmbedding(band, self.directions, name=f"band_{i}")
            if band.blocks
            else BandEmbedding(band, width, tying, name=f"band_{i}")
            for i, band in enumerate(config.bands)
        ]
        if len(config.bands) > 1:
            self.position_of_token = self.variable(
                "constants",
                "position_of_token",
                lambda: jnp.arange(config.vocab_size, dtype=jnp.int32),
            )

    def renumber(self, tokens: jax.Array) -> jax.Array:
        """Token ids -> columns of the logits of all bands together; -1 stays -1."""
        if len(self.config.bands) == 1:
            return tokens
        return jnp.where(tokens < 0, tokens, self.position_of_token.value[tokens])

    def __call__(self, tokens_N: jax.Array) -> jax.Array:
        """Embeds tokens [N] as [N, D] in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        columns_N = self.renumber(tokens_N)
        x_ND, rows, scales = 0, [], []
        # Every band looks up all tokens, since a program needs static shapes.
        for embedding in self.band_embeddings:
            rows_NK = self._rows(embedding, columns_N, dtype)
            if embedding.scale_up is None:
                x_ND += rows_NK
            else:
                rows.append(rows_NK)
                scales.append(embedding.scale_up.astype(dtype))
        # One product for all bands is faster. But it joins matrices, and if these were
        # split over devices, all of them would have to exchange parts.
        if scales and device_count() == 1:
            rows, scales = [concatenated(rows, axis=1)], [concatenated(scales, axis=0)]
        return x_ND + sum(map(jnp.matmul, rows, scales))

    def _rows(self, embedding: nn.Module, columns_N, dtype) -> jax.Array:
        """Rows of a band [N, K]; zeros for tokens of other bands."""
        if len(self.config.bands) == 1:
            return embedding.lookup(columns_N, dtype)
        rows_N, size = columns_N - embedding.band.start, embedding.band.size
        is_here_N = (rows_N >= 0) & (rows_N < size)
        rows_NK = embedding.lookup(jnp.where(is_here_N, rows_N, NO_ROW), dtype)
        return jnp.where(is_here_N[:, None], rows_NK, 0)


# Other packages reach the arrays above through these paths and functions.

CONSTANTS = "constants"  # the collection of arrays that are not trained
FULL_TABLE = "embed/band_0/wte"  # of a model at full width
TABLES, SCALES = r"embed/band_\d+/wte", r"embed/band_\d+/scale_(up|down)"


class BandLeaves(NamedTuple):
    """The parameters of one band, as host arrays without padding; None: left out."""

    wte: np.ndarray | None = None  # [V, K]
    scale_up: np.ndarray | None = None  # [K, D]
    scale_down: np.ndarray | None = None  # [K, D]; left out if tied


def table_leaves(bands: Sequence[BandLeaves], padding: int) -> dict[str, np.ndarray]:
    """{parameter path: float32 array}; the last table gets `padding` rows of zeros."""
    leaves = {}
    for number, band in enumerate(bands):
        for name, array in band._asdict().items():
            if array is not None:
                is_padded = name == "wte" and number == len(bands) - 1
                rows = (0, padding if is_padded else 0)
                padded = np.pad(array, (rows, (0, 0)))
                leaves[f"embed/band_{number}/{name}"] = padded.astype(np.float32)
    return leaves


def without_embedding(params: Mapping[str, Any]) -> dict:
    """The parameters of a model except those of its embedding."""
    return {name: part for name, part in params.items() if name != "embed"}


def full_table(variables: Mapping[str, Any]) -> np.ndarray:
    """The table of a model at full width, padding included: [V, D]."""
    return variables["params"]["embed"]["band_0"]["wte"]


def order_constants(order_V: np.ndarray) -> dict:
    """The constants of a model of several bands with its rows in this token order."""
    position_V = np.empty(len(order_V), np.int32)
    position_V[order_V] = np.arange(len(order_V), dtype=np.int32)
    return {"embed": {"position_of_token": position_V}}


def packed_constants(order_V: np.ndarray, bands: Sequence[PackedBand]) -> dict:
    """The constants of a model with a packed table in this token order."""
    embed = {
        f"band_{number}": {"codes": band.codes, "scales": band.scales}
        for number, band in enumerate(bands)
    }
    embed["directions"] = dataclasses.asdict(bands[0].shared)
    if len(bands) > 1:
        embed |= order_constants(order_V)["embed"]
    return {"embed": embed}


def is_order(constants: Mapping[str, Any]) -> bool:
    """Whether the constants give every token a row of its own, or no order at all."""
    position_V = constants.get("embed", {}).get("position_of_token")
    if position_V is None:
        return True
    return np.array_equal(np.sort(position_V), np.arange(np.size(position_V)))


def token_order(constants: Mapping[str, Any], vocab_size: int) -> np.ndarray:
    """The inverse of `order_constants`; a model of one band has the order of ids."""
    position_V = constants.get("embed", {}).get("position_of_token")
    if position_V is None:
        return np.arange(vocab_size)
    return np.argsort(np.asarray(position_V))
