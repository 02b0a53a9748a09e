"""Text from a model, token by token.

Shape letters: B samples, T tokens of a window, V vocabulary.
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

    What the model sees is the last `block_size` tokens, prompt included.

    Args:
      model: any, factorized or not.
      variables: its own.
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
    draw = jax.jit(
        functools.partial(_draw, model=model, temperature=temperature, top_k=top_k),
        donate_argnums=1,
    )
    key, known = jax.random.key(seed), len(prompt)
    while True:
        window_BT, drawn_B = draw(variables, window_BT, known, key)
        yield drawn_B
        known += 1


def _draw(variables, window_BT, known, key, *, model: GPT, temperature, top_k):
    """The window with one more token behind the `known` ones, and that token: [B].

    A window that is full moves on by one token first.
    """
    length = window_BT.shape[1]
    last = jnp.minimum(known, length) - 1
    h_ND = model.apply(variables, window_BT, method="hidden")
    h_BD = h_ND.reshape(*window_BT.shape, -1)[:, last]
    logits_BV = model.apply(variables, h_BD, method="logits")
    if top_k and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if temperature == 0:
        drawn_B = jnp.argmax(logits_BV, axis=-1)
    else:
        key = jax.random.fold_in(key, known)
        drawn_B = jax.random.categorical(key, logits_BV / temperature)
    drawn_B = drawn_B.astype(jnp.int32)
    is_full = known >= length
    window_BT = jnp.where(is_full, jnp.roll(window_BT, -1, axis=1), window_BT)
    place = jnp.where(is_full, length - 1, known)
    return window_BT.at[:, place].set(drawn_B), drawn_B
