"""Text from a model, token by token.

Shape letters: B samples, T tokens of a window, D width, V vocabulary.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.model import GPT


def generate(
    model: GPT,
    variables: dict,
    prompt: np.ndarray,
    samples: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Iterator[jax.Array]:
    """Draws one token after the other, without end.

    What the model sees is the last `block_size` tokens, prompt included. Until they are
    that many, keys and values of earlier tokens are kept and each token is read once;
    from then on every token has another position with each that is drawn, and the whole
    window is read again.

    Args:
      model: any, factorized or not.
      variables: its own; matrices are used in the model's compute dtype.
      prompt: int32, one token id or more.
      samples: B, drawn side by side from the one prompt.
      seed: the same seed draws the same tokens.
      temperature: that logits are divided by; 0 takes the likeliest token.
      top_k: draw from the k likeliest only; 0: from all.

    Yields:
      int32 [B], the next token of each sample.
    """
    length = model.config.block_size
    prompt = np.asarray(prompt, np.int32)[-length:]
    window_BT = jnp.zeros((samples, length), jnp.int32).at[:, : len(prompt)].set(prompt)
    variables, key, known = _cast(variables, model), jax.random.key(seed), len(prompt)
    settings = {"model": model, "temperature": temperature, "top_k": top_k}
    read, read_next = (
        jax.jit(functools.partial(function, **settings), donate_argnums=1)
        for function in (_read, _read_next)
    )
    state, drawn_B = read(variables, {"window": window_BT, "cache": {}}, known, key)
    yield drawn_B
    while known + 1 < length:
        known += 1
        state, drawn_B = read_next(variables, state, known, key)
        yield drawn_B
    while True:
        known += 1
        state["cache"] = {}
        state, drawn_B = read(variables, state, known, key)
        yield drawn_B


def _cast(variables: dict, model: GPT) -> dict:
    """Matrices in the compute dtype, once and not for every token."""
    dtype = model.config.compute_dtype
    return jax.jit(
        functools.partial(
            jax.tree.map, lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf
        )
    )(variables)


def _read(variables, state, known, key, **settings):
    """Reads the window anew and draws the token behind its `known` ones.

    A window that has no place for it moves on by one token. Returns the state, with
    keys and values of all of the window, and the drawn tokens [B].
    """
    model, window_BT = settings["model"], state["window"]
    length = window_BT.shape[1]
    h_ND, written = model.apply(variables, window_BT, method="hidden", mutable="cache")
    h_BTD = h_ND.reshape(*window_BT.shape, -1)
    h_BD = h_BTD[:, jnp.minimum(known, length) - 1]
    drawn_B = _draw(variables, h_BD, known, key, **settings)
    is_full = known >= length
    window_BT = jnp.where(is_full, jnp.roll(window_BT, -1, axis=1), window_BT)
    place = jnp.where(is_full, length - 1, known)
    window_BT = window_BT.at[:, place].set(drawn_B)
    return {"window": window_BT, **written}, drawn_B


def _read_next(variables, state, known, key, **settings):
    """Reads the last of the `known` tokens and draws the one behind it.

    Returns the state with its keys and values added, and the drawn tokens [B].
    """
    model, window_BT = settings["model"], state["window"]
    h_BD, written = model.apply(
        variables | {"cache": state["cache"]},
        window_BT[:, known - 1],
        known - 1,
        method="next_hidden",
        mutable="cache",
    )
    drawn_B = _draw(variables, h_BD, known, key, **settings)
    return {"window": window_BT.at[:, known].set(drawn_B), **written}, drawn_B


def _draw(variables, h_BD, known, key, *, model: GPT, temperature, top_k) -> jax.Array:
    """The token behind the `known` ones, by the output of ln_f at the last: [B]."""
    logits_BV = model.apply(variables, h_BD, method="logits")
    if top_k and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if temperature == 0:
        drawn_B = jnp.argmax(logits_BV, axis=-1)
    else:
        key = jax.random.fold_in(key, known)
        drawn_B = jax.random.categorical(key, logits_BV / temperature)
    return drawn_B.astype(jnp.int32)
