"""A transformer block: attention and MLP, each after a norm.

Activations between layers are [N, D], not [B, T, D], because XLA then needs no
transposes in the backward pass of LayerNorm. A layer does not add its result to the
residual stream. It returns an update (y [N, D], bias [D]), and the next norm adds it.
So only one kernel reads and writes the stream.

Shape letters: T rows of an update, N tokens, D model width, F = 4D.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt import kernels
from pcagpt.kernels import norm
from pcagpt.kernels.mosaic import mlp
from pcagpt.kernels.triton import gelu
from pcagpt.model.attention import Attention
from pcagpt.model.config import GPTConfig
from pcagpt.model.linear import Linear, add_bias, bias_of, drop, projection

LAYER_NORM_EPSILON = 1e-5  # as in GPT-2; flax's default is 1e-6


class ResidualNorm(nn.Module):
    """Adds an update to the residual stream and normalises the sum."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        update_TD: jax.Array,
        bias_D: jax.Array,
        *,
        has_few_rows: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """x + update + bias, and its LayerNorm; each [N, D] in the compute dtype.

        The T rows of an update are repeated if there are fewer than N.
        XLA's own form is faster for few rows, such as one token of each sequence.
        """
        width = x_ND.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,))
        parameters = bias_D, scale_D, bias_of(self, width)
        form = None if has_few_rows else norm.form_of(self.config.kernels, width)
        if form is None:
            update_ND = repeated(update_TD, x_ND.shape[0])
            return _add_and_norm(x_ND, update_ND, *parameters)
        epsilon = LAYER_NORM_EPSILON
        return norm.add_and_norm(x_ND, update_TD, *parameters, epsilon, form)


def repeated(rows_TD: jax.Array, count: int) -> jax.Array:
    """The rows again and again, [count, D]."""
    length, width = rows_TD.shape
    repeats = jnp.broadcast_to(rows_TD, (count // length, length, width))
    return repeats.reshape(count, width)


def _add_and_norm(x_ND, update_ND, bias_D, scale_D, offset_D):
    """The plain form of `norm.add_and_norm`; statistics are in float32."""
    x_ND = (x_ND + (update_ND + bias_D)).astype(x_ND.dtype)  # rounded once
    exact_ND = x_ND.astype(jnp.promote_types(x_ND.dtype, jnp.float32))
    # The mean and the mean square come from one read of the stream. The kernel, which
    # holds its rows in registers, sums the squares after subtracting the mean instead.
    mean_N1 = exact_ND.mean(axis=-1, keepdims=True)
    square_N1 = (exact_ND * exact_ND).mean(axis=-1, keepdims=True)
    variance_N1 = jnp.maximum(square_N1 - mean_N1 * mean_N1, 0.0)
    scale_ND = jax.lax.rsqrt(variance_N1 + LAYER_NORM_EPSILON) * scale_D
    return x_ND, ((exact_ND - mean_N1) * scale_ND + offset_D).astype(x_ND.dtype)


class MLP(nn.Module):
    """The feed-forward half of a block."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_ND, deterministic: bool):
        """Normed stream [N, D] -> its update."""
        config, width = self.config, self.config.n_embd
        kernel, bias = Linear(config, 4 * width, name="fc")(width)
        proj, proj_bias_D = projection(config)(4 * width)
        is_exact, backend = config.gelu == "exact", config.kernels
        sizes = *x_ND.shape, 4 * width
        if backend == "mosaic" and not is_exact and mlp.fits(*sizes, x_ND.dtype):
            y_ND = mlp.mlp(x_ND, kernel, bias, proj)
        elif kernels.use_triton(backend) and gelu.fits(4 * width) and not is_exact:
            y_ND = gelu.bias_gelu(x_ND @ kernel, bias) @ proj
        else:
            y_ND = _bias_gelu(x_ND @ kernel, bias, is_exact) @ proj
        return drop(config, y_ND, proj_bias_D, deterministic)


# The backward pass adds the bias again. This saves storing an [N, F] array per layer.
@functools.partial(jax.checkpoint, static_argnums=2)
def _bias_gelu(h_NF: jax.Array, bias_F: jax.Array, is_exact: bool) -> jax.Array:
    """The plain form of `gelu.bias_gelu`, or GELU by the error function."""
    return nn.gelu(add_bias(h_NF, bias_F), approximate=not is_exact)


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_ND, update, sequence_length: int, deterministic: bool, position=None
    ):
        """(stream [N, D], update to add to it) -> the same after this block."""
        has_few_rows = position is not None
        x_ND, y_ND = ResidualNorm(self.config, name="ln_1")(
            x_ND, *update, has_few_rows=has_few_rows
        )
        update = Attention(self.config, name="attn")(
            y_ND, sequence_length, deterministic, position
        )
        x_ND, y_ND = ResidualNorm(self.config, name="ln_2")(
            x_ND, *update, has_few_rows=has_few_rows
        )
        return x_ND, MLP(self.config, name="mlp")(y_ND, deterministic)
