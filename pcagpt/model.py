"""GPT-2 whose token table may be factorized, in one or several frequency bands.

Shape letters: B batch, T sequence, N = B*T, V vocabulary, D model width, K rank,
H heads, C head width, F = 4D.

    x = wte[t] @ scale_up + wpe           [N,K] @ [K,D]
    h = ln_f(blocks(x))                   [N,D]
    logits = (h @ scale_down.T) @ wte.T   [N,K] @ [K,V]

A band is a run of consecutive token ids with a table and scale matrices of its own. The
baseline is one band without scale matrices; a single rank is one band with them.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt.kernels import gelu, norm
from pcagpt.layout import by_device

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a `GPT`; the defaults are GPT-2 small."""

    vocab_size: int = 50257
    vocab_multiple: int = 64
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_embd_wte: int | None = None
    n_embd_wte_scale_tying: bool = True
    band_sizes: tuple[int, ...] = ()
    band_ranks: tuple[int, ...] = ()
    bias: bool = True
    dropout: float = 0.0
    compute_dtype: str = "float32"
    attention: str = "xla"
    kernels: str = "xla"

    @property
    def padded_vocab_size(self) -> int:
        """Rows stored: the vocabulary rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def bands(self) -> tuple["Band", ...]:
        """The bands in order of token position; padding rows belong to the last."""
        padding = self.padded_vocab_size - self.vocab_size
        if not self.band_sizes:
            return (Band(0, self.vocab_size, padding, self.n_embd_wte),)
        starts = [sum(self.band_sizes[:i]) for i in range(len(self.band_sizes))]
        last = len(self.band_sizes) - 1
        return tuple(
            Band(start, size, padding if i == last else 0, rank)
            for i, (start, size, rank) in enumerate(
                zip(starts, self.band_sizes, self.band_ranks, strict=True)
            )
        )


class Band(NamedTuple):
    """Token positions start .. start + size - 1, stored at `rank` (None: at full D)."""

    start: int
    size: int
    padding: int
    rank: int | None


class HeadBand(NamedTuple):
    """What the output head reads of a band.

    wte: [size + padding, K] float32; scale_down: [K, D] float32, None at full width;
    size: real rows, the rest is padding.
    """

    wte: jax.Array
    scale_down: jax.Array | None
    size: int


class BandTable(nn.Module):
    """The tables of one band."""

    band: Band
    n_embd: int
    scale_tying: bool

    def setup(self):
        """Declares wte [V,K] and, if the band has a rank, its scale matrices [K,D]."""
        rows, rank = self.band.size + self.band.padding, self.band.rank
        init = nn.initializers.normal(INIT_STD)
        self.wte = self.param("wte", init, (rows, rank or self.n_embd))
        self.scale_up = self.scale_down = None
        if rank is not None:
            scale_shape = (rank, self.n_embd)
            self.scale_up = self.param("scale_up", init, scale_shape)
            self.scale_down = (
                self.scale_up
                if self.scale_tying
                else self.param("scale_down", init, scale_shape)
            )

    def lookup(self, rows_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of this band -> their embeddings [N, D]."""
        x_NK = _take_rows(self.wte, rows_N, dtype)
        return x_NK if self.scale_up is None else x_NK @ self.scale_up.astype(dtype)

    def head(self) -> HeadBand:
        """The output side of this band."""
        return HeadBand(self.wte, self.scale_down, self.band.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(wte_VK: jax.Array, rows_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table in another dtype, [N, K]; their gradients are summed in its own.

    The head casts the table, too: where it is split over devices it so travels once.
    """
    return wte_VK.astype(dtype)[rows_N]


def _take_rows_forward(wte_VK, rows_N, dtype):
    return _take_rows(wte_VK, rows_N, dtype), (wte_VK, rows_N)


def _take_rows_backward(dtype, residuals, gradient_NK):
    del dtype
    wte_VK, rows_N = residuals
    shape, table_dtype = wte_VK.shape, wte_VK.dtype

    def of_table(gradient_NK, rows_N):
        zeros_VK = jnp.zeros(shape, table_dtype)
        return (zeros_VK.at[rows_N].add(gradient_NK.astype(table_dtype)),)

    # Each device sums its own before they are added up. Left to itself, XLA would add
    # the head's gradient first, for which all devices would need all of it.
    split = by_device(of_table, [True, True], [False])
    return *split(gradient_NK, rows_N), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class TokenEmbedding(nn.Module):
    """Token ids to vectors, and the tables of the tied output head."""

    config: GPTConfig

    def setup(self):
        """Declares a `BandTable` a band and, for several bands, the token order."""
        config = self.config
        self.tables = [
            BandTable(
                band, config.n_embd, config.n_embd_wte_scale_tying, name=f"band_{i}"
            )
            for i, band in enumerate(config.bands)
        ]
        if len(config.bands) > 1:
            self.position_of_token = self.variable(
                "constants",
                "position_of_token",
                lambda: jnp.arange(config.vocab_size, dtype=jnp.int32),
            )

    def renumber(self, tokens: jax.Array) -> jax.Array:
        """Token ids -> positions in the order of the bands; -1 (no token) stays."""
        if len(self.config.bands) == 1:
            return tokens
        return jnp.where(tokens < 0, tokens, self.position_of_token.value[tokens])

    def __call__(self, tokens_N: jax.Array) -> jax.Array:
        """Embeds tokens [N] as [N, D] in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        bands = self.config.bands
        if len(bands) == 1:
            return self.tables[0].lookup(tokens_N, dtype)
        positions_N = self.renumber(tokens_N)
        x_ND = jnp.zeros((tokens_N.shape[0], self.config.n_embd), dtype)
        for band, table in zip(bands, self.tables, strict=True):
            rows_N = positions_N - band.start
            inside_N1 = ((rows_N >= 0) & (rows_N < band.size))[:, None]
            found_ND = table.lookup(jnp.clip(rows_N, 0, band.size - 1), dtype)
            x_ND += jnp.where(inside_N1, found_ND, 0)
        return x_ND

    def head(self) -> tuple[HeadBand, ...]:
        """The output side of every band, in order of position."""
        return tuple(table.head() for table in self.tables)


class Linear(nn.Module):
    """The parameters of a linear layer."""

    config: GPTConfig
    features: int
    std: float = INIT_STD

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Kernel [inputs, features] in the compute dtype, bias [features] float32.

        The bias is no parameter but 0 in a model without biases.
        """
        init = nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (inputs, self.features))
        return kernel.astype(self.config.compute_dtype), _bias(self, self.features)


def _bias(module: nn.Module, features: int) -> jax.Array:
    if not module.config.bias:
        return jnp.zeros(features)
    return module.param("bias", nn.initializers.zeros, (features,))


def _add_bias(y_NX: jax.Array, bias_X: jax.Array) -> jax.Array:
    return y_NX + bias_X.astype(y_NX.dtype)


class ResidualNorm(nn.Module):
    """Adds to the residual stream and normalises it, with statistics in float32."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, update_ND: jax.Array, bias_D: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x + update + bias, and its LayerNorm; each [N, D] in the compute dtype."""
        width = x_ND.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,))
        parameters = bias_D, scale_D, _bias(self, width)
        if self.config.kernels == "pallas" and norm.fits(width):
            return norm.add_and_norm(x_ND, update_ND, *parameters, LAYER_NORM_EPSILON)
        return _add_and_norm(x_ND, update_ND, *parameters)


def _add_and_norm(x_ND, update_ND, bias_D, scale_D, offset_D):
    """`kernels.norm.add_and_norm` in its plain form."""
    x_ND = (x_ND + (update_ND + bias_D)).astype(x_ND.dtype)  # One rounding.
    exact_ND = x_ND.astype(jnp.promote_types(x_ND.dtype, jnp.float32))
    mean_N1 = exact_ND.mean(axis=-1, keepdims=True)
    square_N1 = (exact_ND * exact_ND).mean(axis=-1, keepdims=True)
    variance_N1 = jnp.maximum(square_N1 - mean_N1 * mean_N1, 0.0)
    scale_ND = jax.lax.rsqrt(variance_N1 + LAYER_NORM_EPSILON) * scale_D
    return x_ND, ((exact_ND - mean_N1) * scale_ND + offset_D).astype(x_ND.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_ND, sequence_length: int, deterministic: bool, position=None):
        """[N, D] -> [N, D] and its bias [D]; positions attend within their sequence.

        With a position, each sequence is the one token there, and attends to those
        before it, whose keys and values are in the collection 'cache', which has place
        for its own. Without one, they are written there where that collection can be
        written.
        """
        config, width = self.config, self.config.n_embd
        drops = config.dropout > 0 and not deterministic
        kernel, bias = Linear(config, 3 * width, name="qkv")(width)
        q_ND, k_ND, v_ND = _thirds(x_ND, kernel)
        # A key's bias adds the same to all logits of a query: the softmax does not see
        # it. A value's goes through the average unchanged, if nothing is dropped.
        q_bias_D, _, v_bias_D = jnp.split(bias, 3)
        q_ND = _add_bias(q_ND, q_bias_D)
        if drops:
            v_ND, v_bias_D = _add_bias(v_ND, v_bias_D), None
        shape = -1, sequence_length, config.n_head, width // config.n_head
        q_BTHC, k_BTHC, v_BTHC = (a_ND.reshape(shape) for a_ND in (q_ND, k_ND, v_ND))
        if drops:
            # The fused kernels cannot drop attention probabilities; flax's can.
            mask = jnp.tri(sequence_length, dtype=bool)[None, None]
            y_BTHC = nn.dot_product_attention(
                q_BTHC,
                k_BTHC,
                v_BTHC,
                mask=mask,
                dropout_rng=self.make_rng("dropout"),
                dropout_rate=config.dropout,
                broadcast_dropout=False,
                deterministic=False,
            )
        elif position is not None:
            keys_BTHC = self._cached("keys", k_BTHC, position)
            values_BTHC = self._cached("values", v_BTHC, position)
            y_BTHC = jax.nn.dot_product_attention(
                q_BTHC,
                keys_BTHC,
                values_BTHC,
                key_value_seq_lengths=jnp.full(len(q_BTHC), position + 1),
            )
        else:
            if self.is_mutable_collection("cache") and not self.is_initializing():
                self._cached("keys", k_BTHC, 0)
                self._cached("values", v_BTHC, 0)
            y_BTHC = jax.nn.dot_product_attention(
                q_BTHC, k_BTHC, v_BTHC, is_causal=True, implementation=config.attention
            )
        return project_back(config, y_BTHC.reshape(x_ND.shape), v_bias_D, deterministic)

    def _cached(self, name: str, new_BtHC: jax.Array, start) -> jax.Array:
        """All that is cached, [B, T, H, C], with the new from `start` on."""
        cached = self.variable("cache", name, lambda: new_BtHC)
        cached.value = jax.lax.dynamic_update_slice_in_dim(
            cached.value, new_BtHC, start, axis=1
        )
        return cached.value


@jax.custom_vjp
def _thirds(x_ND: jax.Array, kernel_DX: jax.Array) -> tuple[jax.Array, ...]:
    """Three [N, D] that make up x @ kernel.

    By a product each, whose results need not be copied out of one; their gradients are
    brought together, so that one product gives that of x and one that of the kernel.
    """
    # The barriers keep XLA from merging products of one array, here and in
    # the gradients, and from then slicing the result after all.
    xs = jax.lax.optimization_barrier((x_ND,) * 3)
    parts = jnp.split(kernel_DX, 3, axis=1)
    return tuple(x_ND @ part_DD for x_ND, part_DD in zip(xs, parts, strict=True))


def _thirds_forward(x_ND, kernel_DX):
    return _thirds(x_ND, kernel_DX), (x_ND, kernel_DX)


def _thirds_backward(residuals, gradients):
    x_ND, kernel_DX = residuals
    gradient_NX = jax.lax.optimization_barrier(jnp.concatenate(gradients, axis=1))
    return gradient_NX @ kernel_DX.T, x_ND.T @ gradient_NX


_thirds.defvjp(_thirds_forward, _thirds_backward)


class MLP(nn.Module):
    """The feed-forward half of a block."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_ND, deterministic: bool):
        """[N, D] -> [N, D] and its bias [D]."""
        width = self.config.n_embd
        kernel, bias = Linear(self.config, 4 * width, name="fc")(width)
        has_kernel = self.config.kernels == "pallas" and gelu.fits(4 * width)
        bias_gelu = gelu.bias_gelu if has_kernel else _bias_gelu
        h_NF = bias_gelu(x_ND @ kernel, bias)
        return project_back(self.config, h_NF, None, deterministic)


# The backward pass adds the bias again, which saves an [N, F] array a layer.
@jax.checkpoint
def _bias_gelu(h_NF: jax.Array, bias_F: jax.Array) -> jax.Array:
    """`kernels.gelu.bias_gelu` in its plain form."""
    return nn.gelu(_add_bias(h_NF, bias_F), approximate=True)


def project_back(config: GPTConfig, x_NX, input_bias_X, deterministic: bool):
    """The layer 'proj' back into the residual stream: [N, D], and a bias [D] to add.

    Of x + input_bias, if there is one.
    """
    residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
    linear = Linear(config, config.n_embd, residual_std, name="proj")
    kernel, bias_D = linear(x_NX.shape[-1])
    y_ND = x_NX @ kernel
    if input_bias_X is not None:
        bias_D += input_bias_X @ kernel
    if not config.dropout or deterministic:
        return y_ND, bias_D
    dropped_ND = nn.Dropout(config.dropout)(
        _add_bias(y_ND, bias_D), deterministic=False
    )
    return dropped_ND, jnp.zeros_like(bias_D)


class Block(nn.Module):
    """One pre-norm transformer block, between two additions to the residual stream."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_ND, update, sequence_length: int, deterministic: bool, position=None
    ):
        """The residual stream [N, D] and what is still to be added, to the same.

        What is to be added is ([N, D], a bias [D]); position as for `Attention`.
        """
        x_ND, y_ND = ResidualNorm(self.config, name="ln_1")(x_ND, *update)
        update = Attention(self.config, name="attn")(
            y_ND, sequence_length, deterministic, position
        )
        x_ND, y_ND = ResidualNorm(self.config, name="ln_2")(x_ND, *update)
        return x_ND, MLP(self.config, name="mlp")(y_ND, deterministic)


class GPT(nn.Module):
    """GPT-2 with a tied, possibly factorized token embedding.

    Activations are [N, D] between the blocks, not [B, T, D]: XLA then needs no
    transposes in the backward pass of LayerNorm.
    """

    config: GPTConfig

    def setup(self):
        """Declares embedding, positions, blocks and the final norm."""
        config = self.config
        self.embed = TokenEmbedding(config)
        self.wpe = self.param(
            "wpe",
            nn.initializers.normal(INIT_STD),
            (config.block_size, config.n_embd),
        )
        self.blocks = [Block(config, name=f"block_{i}") for i in range(config.n_layer)]
        self.ln_f = ResidualNorm(config)
        self.embedding_dropout = nn.Dropout(config.dropout)

    def hidden(self, tokens_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """Token ids [B, T] int32 -> output of ln_f [N, D] in the compute dtype.

        With dropout on and not deterministic, needs an rng named 'dropout'.
        """
        x_ND = self.embed(tokens_BT.reshape(-1))
        return self.contextualize(x_ND, tokens_BT.shape[1], deterministic)

    def contextualize(
        self, x_ND: jax.Array, sequence_length: int, deterministic: bool = True
    ) -> jax.Array:
        """Token embeddings [N, D], sequence after sequence -> output of ln_f [N, D].

        All of the model but its tables: positions, blocks and the final norm.
        """
        wpe_TD, length = self.wpe[:sequence_length].astype(x_ND.dtype), sequence_length
        wpe_BTD = jnp.broadcast_to(wpe_TD, (x_ND.shape[0] // length, *wpe_TD.shape))
        wpe_ND, bias_D = wpe_BTD.reshape(x_ND.shape), jnp.zeros(x_ND.shape[-1])
        if self.config.dropout and not deterministic:
            x_ND = self.embedding_dropout(x_ND + wpe_ND, deterministic=False)
            wpe_ND = jnp.zeros_like(x_ND)
        update = wpe_ND, bias_D
        for block in self.blocks:
            x_ND, update = block(x_ND, update, length, deterministic)
        return self.ln_f(x_ND, *update)[1]

    def next_hidden(self, tokens_B: jax.Array, position: jax.Array) -> jax.Array:
        """One more token of each sequence, at this position -> output of ln_f [B, D].

        What is before it was read by `hidden` or here, with the collection 'cache' kept
        from call to call.
        """
        x_BD = self.embed(tokens_B)
        wpe_D = self.wpe[position].astype(x_BD.dtype)
        update = jnp.broadcast_to(wpe_D, x_BD.shape), jnp.zeros(wpe_D.shape)
        for block in self.blocks:
            x_BD, update = block(x_BD, update, 1, True, position)
        return self.ln_f(x_BD, *update)[1]

    def head(self) -> tuple[HeadBand, ...]:
        """The tables of the output head, band by band."""
        return self.embed.head()

    def renumber(self, tokens: jax.Array) -> jax.Array:
        """Token ids -> columns of the head's concatenated bands; -1 stays -1."""
        return self.embed.renumber(tokens)

    def logits(self, h_ND: jax.Array) -> jax.Array:
        """Outputs of ln_f [N, D] -> logits [N, V] float32, by the users' token ids.

        Computed in the dtype of the tables, without padding columns. For inspection
        and sampling; training and evaluation use `pcagpt.losses`.
        """
        logits = []
        for wte_VK, scale_down_KD, size in self.head():
            z_NK = h_ND.astype(wte_VK.dtype)
            if scale_down_KD is not None:
                z_NK = z_NK @ scale_down_KD.T
            logits.append(
                jnp.matmul(z_NK, wte_VK[:size].T, preferred_element_type=jnp.float32)
            )
        logits_NV = jnp.concatenate(logits, axis=-1)
        return logits_NV[:, self.renumber(jnp.arange(self.config.vocab_size))]

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 of the token after each, as `logits` has them."""
        return self.logits(self.hidden(tokens_BT)).reshape(*tokens_BT.shape, -1)


def embedding_parameters(config: GPTConfig) -> int:
    """Stored values of token tables and scale matrices, padding rows not counted.

    In several bands each token's position counts, too.
    """
    scales = 1 if config.n_embd_wte_scale_tying else 2
    positions = config.vocab_size if len(config.bands) > 1 else 0
    return positions + sum(
        band.size * (band.rank or config.n_embd)
        + (scales * band.rank * config.n_embd if band.rank else 0)
        for band in config.bands
    )


def total_parameters(config: GPTConfig) -> int:
    """Stored values of the whole model, padding rows not counted."""
    width, biases = config.n_embd, int(config.bias)
    norm = width * (1 + biases)
    attention = 4 * width * width + biases * 4 * width
    mlp = 8 * width * width + biases * 5 * width
    blocks = config.n_layer * (2 * norm + attention + mlp)
    return embedding_parameters(config) + config.block_size * width + blocks + norm


def training_flops_per_token(config: GPTConfig) -> float:
    """Floating-point operations of one token's forward and backward pass.

    Six per weight of every matrix product, attention counted in full (not halved for
    causality): 12 * L * T * D, as in PaLM (Chowdhery et al. 2022, appendix B).
    """
    width = config.n_embd
    weights = config.n_layer * 12 * width * width
    for band in config.bands:
        rank = band.rank or width
        weights += (band.size + band.padding) * rank
        if band.rank:
            weights += 2 * rank * width
    attention = 12 * config.n_layer * config.block_size * width
    return 6.0 * weights + attention
