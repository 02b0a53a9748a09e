"""Text from a model, token by token.

Shape letters: B samples, T tokens of a window, D width, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.model import GPT

LEAST_REACH = 128  # tokens that there is place for from the start, a power of 2


class Drawing(NamedTuple):
    """What tokens are drawn by; `generate` says what it means."""

    model: GPT
    temperature: float
    top_k: int


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
    length, key = model.config.block_size, jax.random.key(seed)
    drawing = Drawing(model, temperature, top_k)
    prompt = np.asarray(prompt, np.int32)[-length:]
    window_BT = jnp.zeros((samples, length), jnp.int32).at[:, : len(prompt)].set(prompt)
    variables = jax.device_put(in_compute_dtype(variables, model))
    start = len(prompt)
    if start < length:
        reach = places(start, length)
        window_BT, cache, drawn_B = _read(
            variables, window_BT, start, key, drawing, reach
        )
        yield drawn_B
        for known in range(start + 1, length):
            if known > reach:
                reach = places(known, length)
                cache = _widened(cache, reach)
            window_BT, cache, drawn_B = _read_next(
                variables, window_BT, cache, known, key, drawing
            )
            yield drawn_B
        del cache
    for known in itertools.count(length):
        window_BT, drawn_B = _read_again(variables, window_BT, known, key, drawing)
        yield drawn_B


def places(known: int, block_size: int) -> int:
    """For how many tokens keys and values have a place when so many are known.

    A power of 2 up to block_size: what is behind the last is attended to in vain.
    """
    return min(block_size, max(LEAST_REACH, 1 << (known - 1).bit_length()))


def in_compute_dtype(variables: dict, model: GPT) -> dict:
    """The variables with matrices in the model's compute dtype."""
    dtype = model.config.compute_dtype
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, variables
    )


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _read(variables, window_BT, known, key, drawing: Drawing, reach: int):
    """Reads `reach` tokens of a window and draws the one behind the `known` ones.

    Returns the window with it, keys and values of what was read, and the drawn [B].
    """
    read_BT = window_BT[:, :reach]
    h_ND, written = drawing.model.apply(
        variables, read_BT, method="hidden", mutable="cache"
    )
    h_BD = h_ND.reshape(*read_BT.shape, -1)[:, known - 1]
    drawn_B = _draw(variables, h_BD, known, key, drawing)
    return window_BT.at[:, known].set(drawn_B), written["cache"], drawn_B


@functools.partial(jax.jit, static_argnums=1)
def _widened(cache, reach: int):
    """Keys and values with place for so many tokens."""
    return jax.tree.map(
        lambda kept_BTHC: jnp.pad(
            kept_BTHC, ((0, 0), (0, reach - kept_BTHC.shape[1]), (0, 0), (0, 0))
        ),
        cache,
    )


@functools.partial(jax.jit, static_argnums=5, donate_argnums=(1, 2))
def _read_next(variables, window_BT, cache, known, key, drawing: Drawing):
    """Reads the last of the `known` tokens and draws the one behind it.

    Returns the window with it, keys and values with those of what was read, and the
    drawn [B].
    """
    h_BD, written = drawing.model.apply(
        variables | {"cache": cache},
        window_BT[:, known - 1],
        known - 1,
        method="next_hidden",
        mutable="cache",
    )
    drawn_B = _draw(variables, h_BD, known, key, drawing)
    return window_BT.at[:, known].set(drawn_B), written["cache"], drawn_B


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _read_again(variables, window_BT, known, key, drawing: Drawing):
    """Reads a full window and draws the token behind it, for which it moves on by one.

    Returns the window and the drawn [B]; `known` is how many tokens there were.
    """
    h_ND = drawing.model.apply(variables, window_BT, method="hidden")
    h_BD = h_ND.reshape(*window_BT.shape, -1)[:, -1]
    drawn_B = _draw(variables, h_BD, known, key, drawing)
    return jnp.roll(window_BT, -1, axis=1).at[:, -1].set(drawn_B), drawn_B


def _draw(variables, h_BD, known, key, drawing: Drawing) -> jax.Array:
    """The token behind the `known` ones, by the output of ln_f at the last: [B]."""
    model, temperature, top_k = drawing
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
