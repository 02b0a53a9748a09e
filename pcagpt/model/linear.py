"""Linear layers of a block, and what becomes of their results.

A layer does not add its result to the residual stream: see `model.block`.

Shape letters: N tokens, D model width, X any width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt.model.config import INIT_STD, GPTConfig
from pcagpt.sharding import inside


class Linear(nn.Module):
    """The parameters of a linear layer."""

    config: GPTConfig
    features: int
    std: float = INIT_STD

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Kernel [inputs, features] in the compute dtype, bias [features] float32."""
        init = nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (inputs, self.features))
        kernel = inside.gathered(kernel.astype(self.config.compute_dtype))
        return kernel, bias_of(self, self.features)


def bias_of(module: nn.Module, features: int) -> jax.Array:
    """The parameter 'bias', or zeros for a model without biases."""
    if not module.config.bias:
        return jnp.zeros(features)
    return module.param("bias", nn.initializers.zeros, (features,))


def add_bias(y_NX: jax.Array, bias_X: jax.Array) -> jax.Array:
    """The sum, in the dtype of y; XLA adds it in the same kernel as a product."""
    return y_NX + bias_X.astype(y_NX.dtype)


def projection(config: GPTConfig) -> Linear:
    """The caller's layer 'proj', which projects back to the width of the stream."""
    residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
    return Linear(config, config.n_embd, residual_std, name="proj")


def drop(config: GPTConfig, y_ND, bias_D, deterministic: bool):
    """An update of the stream, y + bias, after dropout: (update, bias)."""
    if not config.dropout or deterministic:
        return y_ND, bias_D
    # Dropout applies to the sum, so the bias is added here and not in the next norm.
    y_ND = nn.Dropout(config.dropout)(add_bias(y_ND, bias_D), deterministic=False)
    return y_ND, jnp.zeros_like(bias_D)
