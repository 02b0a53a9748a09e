"""The hidden state of one new token of each sequence, with a KV cache.

`GPT.next_hidden` computes it for any number of sequences. The form for few sequences
has kernels of its own; it reads the same parameters and the same cache.
"""

import jax
import jax.numpy as jnp

from pcagpt import kernels
from pcagpt.kernels.triton import one_token
from pcagpt.kernels.triton.one_token import Norm, Sum
from pcagpt.model.block import LAYER_NORM_EPSILON
from pcagpt.model.gpt import GPT


def next_hidden(
    model: GPT,
    variables: dict,
    cache: dict,
    tokens_B: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, dict]:
    """(output of ln_f [B, D], cache with the new keys and values).

    Args:
      model: a GPT; `model.kernels` chooses the form.
      variables: its variables, with matrices in the compute dtype.
      cache: as `GPT.hidden` writes it; its memory is used again.
      tokens_B: int32, the token at `position` of each sequence.
      position: int32 scalar.
    """
    config = model.config
    has_few = (
        kernels.use_triton(config.kernels)
        and config.gelu == "tanh"
        and len(tokens_B) <= one_token.FEW
        and one_token.fits(config.n_embd, config.n_head)
    )
    if not has_few:
        h_BD, written = model.apply(
            variables | {"cache": cache},
            tokens_B,
            position,
            method="next_hidden",
            mutable="cache",
        )
        return h_BD, written["cache"]
    params, cache = variables["params"], dict(cache)
    x_BD = model.apply(variables, tokens_B, method=lambda gpt, t: gpt.embed(t))
    x_BD += params["wpe"][position].astype(x_BD.dtype)
    update = Sum(jnp.zeros((1, *x_BD.shape)), jnp.zeros(config.n_embd))
    for number in range(config.n_layer):
        name = f"block_{number}"
        x_BD, update, kept = _block(
            params[name], x_BD, update, cache[name]["attn"], position
        )
        cache[name] = {"attn": kept}
    last = x_BD, update.total(), jnp.zeros(config.n_embd)
    h_BD = model.apply(
        variables, method=lambda gpt: gpt.ln_f(*last, has_few_rows=True)[1]
    )
    return h_BD, cache


def _block(
    params: dict, x_BD: jax.Array, update: Sum, kept: dict, position
) -> tuple[jax.Array, Sum, dict]:
    """The stream before the last update, this update, and the cache of a block."""
    attention, mlp = params["attn"], params["mlp"]

    def norm(name: str) -> Norm:
        scale_D = params[name]["scale"]
        return Norm(scale_D, _bias(params[name], scale_D), LAYER_NORM_EPSILON)

    kernel, bias = _linear(attention["qkv"])
    x_BD, qkv = one_token.norm_product(x_BD, update, norm("ln_1"), kernel)
    y_BD, keys, values = one_token.attend(
        Sum(qkv, bias), kept["keys"], kept["values"], position
    )
    kernel, bias = _linear(attention["proj"])
    update = Sum(one_token.product(y_BD, kernel), bias)
    kernel, bias = _linear(mlp["fc"])
    x_BD, h = one_token.norm_product(x_BD, update, norm("ln_2"), kernel)
    h = Sum(h, bias)
    kernel, bias = _linear(mlp["proj"])
    update = Sum(one_token.gelu_product(h, kernel), bias)
    return x_BD, update, {"keys": keys, "values": values}


def _linear(params: dict) -> tuple[jax.Array, jax.Array]:
    return params["kernel"], _bias(params, params["kernel"])


def _bias(params: dict, beside: jax.Array) -> jax.Array:
    """The bias; zeros in a model without biases."""
    return params.get("bias", jnp.zeros(beside.shape[-1]))
