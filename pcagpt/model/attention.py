"""Causal self-attention of whole sequences, and of one token after others.

Shape letters: B batch, T sequence, N = B*T, D model width, H heads, C head width,
X = 3D.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt import kernels
from pcagpt.kernels.mosaic import attention as mosaic
from pcagpt.kernels.triton import one_token
from pcagpt.model.config import GPTConfig
from pcagpt.model.linear import Linear, add_bias, drop, projection
from pcagpt.sharding import inside

# Of XLA's causal attention: fewer queries make slow products, more blocks compile long.
LEAST_QUERIES, MOST_BLOCKS = 64, 4


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_ND, sequence_length: int, deterministic: bool, position=None):
        """Normed stream [N, D] -> its update.

        Without a position, it reads whole sequences of `sequence_length` rows. It
        writes their keys and values to the collection 'cache' if that is mutable. With
        a position, it reads one token of each sequence. This token attends to the
        earlier tokens in 'cache', and its keys and values are added there.
        """
        config, width = self.config, self.config.n_embd
        drops = config.dropout > 0 and not deterministic
        kernel, bias = Linear(config, 3 * width, name="qkv")(width)
        if position is not None:
            y_ND, bias_D = self._attend_to_cache(x_ND @ kernel, bias, position)
            return _project_back(config, y_ND, bias_D, deterministic)
        # The key's bias adds the same number to all logits of a query, so the softmax
        # cancels it. Attention weights sum to 1, so the value's bias can be added
        # afterwards. Dropout of the weights breaks this.
        q_bias_D, _, v_bias_D = jnp.split(bias, 3)
        # Without this, XLA splits the bias like the rows of 'proj' and gathers it.
        v_bias_D = inside.whole(v_bias_D)
        heads = config.n_head, width // config.n_head
        shape = len(x_ND) // sequence_length, sequence_length, *heads
        is_mosaic = config.attention == "mosaic" and not drops
        if is_mosaic and mosaic.fits(shape, x_ND.dtype):
            return self._attend_in_kernel(x_ND @ kernel, q_bias_D, v_bias_D, shape)
        if config.attention == "xla":  # It copies all three in any case.
            q_ND, k_ND, v_ND = jnp.split(x_ND @ kernel, 3, axis=1)
        else:
            q_ND, k_ND, v_ND = _split_product(x_ND, kernel)
        q_ND = add_bias(q_ND, q_bias_D)
        if drops:
            v_ND, v_bias_D = add_bias(v_ND, v_bias_D), None
        q_BTHC, k_BTHC, v_BTHC = (a_ND.reshape(shape) for a_ND in (q_ND, k_ND, v_ND))
        if drops:
            # Fused attention cannot drop probabilities; flax's plain form can.
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
        else:
            self._fill_cache(k_BTHC, v_BTHC)
            y_BTHC = _causal_attention(q_BTHC, k_BTHC, v_BTHC, config.attention)
        y_ND = y_BTHC.reshape(x_ND.shape)
        return _project_back(config, y_ND, v_bias_D, deterministic)

    def _attend_in_kernel(self, qkv_NX, q_bias_D, v_bias_D, shape):
        """The update of whole sequences without dropout, by a kernel for one array."""
        _, length, heads, _ = shape
        _, k_ND, v_ND = jnp.split(qkv_NX, 3, axis=1)
        self._fill_cache(k_ND.reshape(shape), v_ND.reshape(shape))
        qkv_NX = _add_to_queries_and_values(qkv_NX, q_bias_D, v_bias_D)
        y_ND = mosaic.attention(qkv_NX, length, heads)
        proj_DD, bias_D = projection(self.config)(self.config.n_embd)
        bias_D = _with_gradient_of_values(bias_D, v_bias_D, proj_DD)
        return y_ND @ proj_DD, bias_D

    def _fill_cache(self, k_BTHC, v_BTHC) -> None:
        """Writes keys and values without biases to 'cache' if that is mutable."""
        if self.is_mutable_collection("cache") and not self.is_initializing():
            self._cached("keys", k_BTHC, 0)
            self._cached("values", v_BTHC, 0)

    def _attend_to_cache(self, qkv_B3D, bias_3D, position):
        """(result [B, D] for one token of each sequence, value bias [D] to be added).

        The value bias is None if the result contains it.
        """
        config, width = self.config, self.config.n_embd
        has_kernels = kernels.use_triton(config.kernels)
        if has_kernels and one_token.fits(width, config.n_head):
            kept = [self.variable("cache", name, None) for name in ("keys", "values")]
            qkv = one_token.Sum(qkv_B3D.astype(jnp.float32)[None], bias_3D)
            y_BD, *new = one_token.attend(qkv, *(k.value for k in kept), position)
            for one, value in zip(kept, new, strict=True):
                one.value = value
            return y_BD, None
        q_bias_D, _, v_bias_D = jnp.split(bias_3D, 3)
        q_BD, k_BD, v_BD = jnp.split(qkv_B3D, 3, axis=1)
        shape = len(qkv_B3D), 1, config.n_head, width // config.n_head
        y_B1HC = jax.nn.dot_product_attention(
            add_bias(q_BD, q_bias_D).reshape(shape),
            self._cached("keys", k_BD.reshape(shape), position),
            self._cached("values", v_BD.reshape(shape), position),
            key_value_seq_lengths=jnp.full(len(qkv_B3D), position + 1),
        )
        return y_B1HC.reshape(-1, width), v_bias_D

    def _cached(self, name: str, new_BtHC: jax.Array, start) -> jax.Array:
        """Writes new keys or values to the cache and returns all of it [B, T, H, C]."""
        cached = self.variable("cache", name, lambda: new_BtHC)
        cached.value = jax.lax.dynamic_update_slice_in_dim(
            cached.value, new_BtHC, start, axis=1
        )
        return cached.value


def _causal_attention(q_BTHC, k_BTHC, v_BTHC, implementation: str) -> jax.Array:
    """Causal attention [B, T, H, C]; XLA's form does not compute most masked logits.

    A block of queries reads the keys up to its end only.
    """
    if implementation != "xla":
        # Mosaic's kernel does not fit.
        implementation = "cudnn" if implementation == "mosaic" else implementation
        return jax.nn.dot_product_attention(
            q_BTHC, k_BTHC, v_BTHC, is_causal=True, implementation=implementation
        )
    blocks, length = [], q_BTHC.shape[1]
    queries = max(LEAST_QUERIES, -(-length // MOST_BLOCKS))
    for start in range(0, length, queries):
        end = min(start + queries, length)
        y_BtHC = jax.nn.dot_product_attention(
            q_BTHC[:, start:end],
            k_BTHC[:, :end],
            v_BTHC[:, :end],
            mask=jnp.tri(end - start, end, start, dtype=bool)[None, None],
            implementation="xla",
        )
        blocks.append(y_BtHC)
    return jnp.concatenate(blocks, axis=1)


@jax.custom_vjp
def _add_to_queries_and_values(qkv_NX, q_bias_D, v_bias_D) -> jax.Array:
    """Adds the biases to their thirds of the columns, in the same kernel as a product.

    The bias of values gets its gradient from `_with_gradient_of_values`.
    """
    biases = q_bias_D, jnp.zeros_like(q_bias_D), v_bias_D
    return add_bias(qkv_NX, jnp.concatenate(biases))


def _add_to_queries_and_values_backward(width, gradient_NX):
    of_q_ND = gradient_NX[:, :width].astype(jnp.float32)
    return gradient_NX, of_q_ND.sum(axis=0), None


_add_to_queries_and_values.defvjp(
    lambda qkv_NX, *biases: (
        _add_to_queries_and_values(qkv_NX, *biases),
        len(biases[0]),
    ),
    _add_to_queries_and_values_backward,
)


@jax.custom_vjp
def _with_gradient_of_values(bias_D, v_bias_D, proj_DD) -> jax.Array:
    """The bias of a projection, which passes a gradient to the bias of its inputs.

    Attention weights sum to 1, so a bias of values is added to each input of the
    projection. Its gradient is proj @ that of the projection's bias: no sum over rows.
    """
    del v_bias_D, proj_DD
    return bias_D


_with_gradient_of_values.defvjp(
    lambda bias_D, v_bias_D, proj_DD: (bias_D, proj_DD),
    lambda proj_DD, of_bias_D: (of_bias_D, proj_DD @ of_bias_D, None),
)


@jax.custom_vjp
def _split_product(x_ND, kernel_DX) -> tuple[jax.Array, ...]:
    """The thirds of x @ kernel as three arrays [N, D].

    Three products need no copies from one large result. The gradient with respect to x
    is one product instead of three that must be added.
    """
    parts = jnp.split(kernel_DX, 3, axis=1)
    # Without the barrier, XLA would merge the products and slice their result.
    three = jax.lax.optimization_barrier((x_ND,) * 3)
    return tuple(x @ part for x, part in zip(three, parts, strict=True))


def _split_product_backward(residuals, gradients):
    x_ND, kernel_DX = residuals
    # Without the barrier, XLA would join the gradients once for each product.
    gradient_NX = jax.lax.optimization_barrier(jnp.concatenate(gradients, axis=1))
    return gradient_NX @ kernel_DX.T, x_ND.T @ gradient_NX


_split_product.defvjp(
    lambda x_ND, kernel_DX: (_split_product(x_ND, kernel_DX), (x_ND, kernel_DX)),
    _split_product_backward,
)


def _project_back(config: GPTConfig, x_ND, input_bias_D, deterministic: bool):
    """Projects x + input_bias to an update of the stream.

    It projects the bias separately, so that no sum with an [N, D] array is needed.
    """
    kernel, bias_D = projection(config)(config.n_embd)
    if input_bias_D is not None:
        bias_D += input_bias_D @ kernel
    return drop(config, x_ND @ kernel, bias_D, deterministic)
