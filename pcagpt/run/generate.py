"""Generates text from a model, token by token.

Shape letters: B samples, T tokens of a window, H heads, C head width, D model width,
V vocabulary.
"""

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.model import GPT, GPTConfig
from pcagpt.model.next_token import next_hidden

# Limits of the samples that are drawn at once.
BATCH_BYTES, BATCH_SAMPLES = 2**32, 512
# The device draws many tokens in one call, so that it never waits for the host. A call
# takes about this many seconds. Text appears after each call, and Ctrl-C waits for it.
CALL_SECONDS, CALL_TOKENS, CALL_GROWTH = 0.1, 256, 32
# A GPU draws this many tokens before it asks the host whether to go on.
TOKENS_UNASKED = 8
LEAST_CAPACITY = 128  # tokens; a power of 2
LEAST_TEMPERATURE = 1e-6  # below, logits would overflow; the likeliest token is drawn


class Sampler(NamedTuple):
    """The static arguments of the compiled functions; see `generate`."""

    model: GPT
    temperature: float
    top_k: int
    top_p: float


def key_of(seed: int) -> jax.Array:
    """As `jax.random.key`, but no setting that a program chose for JAX changes it."""
    bits = np.array([0, seed % 2**32], np.uint32)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


def samples_at_once(config: GPTConfig) -> int:
    """How many samples need about BATCH_BYTES in float32, from 1 to BATCH_SAMPLES.

    It does not depend on the device, so that a seed draws the same samples on all.
    """
    length, width = config.block_size, config.n_embd
    kept = (2 * config.n_layer + 12) * length * width  # keys, values; one block's x
    scores = 2 * config.n_head * length**2
    logits = 4 * config.padded_vocab_size
    fitting = BATCH_BYTES // (4 * (kept + scores + logits))
    return max(1, min(fitting, BATCH_SAMPLES))


def generate(
    model: GPT,
    variables: dict,
    prompt: np.ndarray,
    samples: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    ids: np.ndarray | None = None,
    batch: int = 0,
    top_p: float = 1.0,
    limit: int | None = None,
) -> Iterator[np.ndarray]:
    """Draws the next token of each sample, int32 [B], until `limit`.

    The model sees the last `block_size` tokens, prompt included. It uses a KV cache for
    the first `block_size` tokens. After that, every new token shifts the positions of
    all others, so the model reads the whole window each time.

    Args:
      model: a GPT.
      variables: its variables; matrices are cast to its compute dtype.
      prompt: int32, at least one token id.
      samples: B, the number of continuations of the prompt.
      seed: the same seed draws the same tokens.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws from the k most likely tokens only; 0 means all.
      ids: draws only ids that are True in it, those with a text: bool [n]; None means
        all.
      batch: another number draws other samples.
      top_p: draws from the likeliest tokens only, as many as it takes until their
        probabilities, at the temperature and among `top_k`, sum to at least this share
        (Holtzman et al. 2020); 1 means all.
      limit: number of tokens of each sample; None: without end.
    """
    length, key = model.config.block_size, key_of(seed)
    key = jax.random.fold_in(key, batch) if batch else key
    rows = model.config.vocab_size
    ids = jax.device_put(np.ones(rows, bool) if ids is None else ids[:rows])
    sampler = Sampler(model, temperature, top_k, top_p)
    prompt = np.asarray(prompt, np.int32)[-length:]
    window_BT = jnp.zeros((samples, length), jnp.int32).at[:, : len(prompt)].set(prompt)
    variables = jax.device_put(in_compute_dtype(variables, model))
    known, unasked = len(prompt), _tokens_unasked()
    end = known + limit if limit is not None else 2**31 - 1  # int32 counts tokens
    if known < min(length, end):
        capacity, pace = cache_capacity(known, length), _Pace(unasked)
        with pace:  # No device reads a prompt faster than it draws a token.
            window_BT, cache = _read(
                variables, window_BT, known, key, sampler, capacity, ids
            )
            drawn_BT = np.array(window_BT)
        yield drawn_BT[:, known]
        known += 1
        while known < min(length, end):
            if known > capacity:
                capacity = cache_capacity(known, length)
                cache = _enlarge(cache, capacity)
            count = pace.tokens(min(capacity + 1, length, end) - known)
            with pace:
                window_BT, cache = _read_next(
                    variables, window_BT, cache, known, known + count, key, sampler,
                    ids, unasked,
                )  # fmt: skip
                drawn_BT = np.array(window_BT)[:, known : known + count]
            yield from drawn_BT.T
            known += count
        del cache  # frees its memory for the rest of the loop
    pace = _Pace(1)
    while known < end:
        count = pace.tokens(min(length, end - known))
        with pace:
            window_BT = _read_full(
                variables, window_BT, known, known + count, key, sampler, ids
            )
            drawn_BT = np.array(window_BT)[:, -count:]
        yield from drawn_BT.T
        known += count


class _Pace:
    """How many tokens a call draws, so that it takes about CALL_SECONDS.

    unit: the device draws as many without asking, so calls draw multiples of it.
    Before the first call, it may time the prompt as a call of one token.
    """

    def __init__(self, unit: int):
        self._tokens = self._unit = unit
        self._asked = 1

    def tokens(self, most: int) -> int:
        """The tokens of the next call, at most `most`."""
        self._asked = min(self._tokens, most)
        return self._asked

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *_):
        seconds = max(time.monotonic() - self._start, 1e-6)
        fitting = int(self._asked * CALL_SECONDS / seconds)
        # A short call is mostly overhead, and hides how long a token takes.
        most = min(fitting, CALL_GROWTH * self._asked, CALL_TOKENS)
        self._tokens = max(most // self._unit, 1) * self._unit


def cache_capacity(known: int, block_size: int) -> int:
    """KV-cache capacity for `known` tokens: a power of 2, at most block_size.

    Attention reads the whole cache, so the cache starts small. Every size needs a new
    compilation, so the cache grows by doubling.
    """
    return min(block_size, max(LEAST_CAPACITY, 1 << (known - 1).bit_length()))


def in_compute_dtype(variables: dict, model: GPT) -> dict:
    """The variables with the matrices of 'params' in the model's compute dtype."""
    dtype = model.config.compute_dtype
    params = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, variables["params"]
    )
    return variables | {"params": params}


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _read(variables, window_BT, known, key, sampler: Sampler, capacity: int, ids):
    """Reads `capacity` tokens; returns (window with a new token, cache)."""
    read_BT = window_BT[:, :capacity]
    h_ND, written = sampler.model.apply(
        variables, read_BT, method="hidden", mutable="cache"
    )
    h_BD = h_ND.reshape(*read_BT.shape, -1)[:, known - 1]
    drawn_B = _draw(variables, h_BD, known, key, sampler, ids)
    return window_BT.at[:, known].set(drawn_B), written["cache"]


@functools.partial(jax.jit, static_argnums=1)
def _enlarge(cache, capacity: int):
    """The cache, padded to `capacity` keys and values [B, T, H, C]."""

    def pad(kept_BTHC):
        more = capacity - kept_BTHC.shape[1]
        return jnp.pad(kept_BTHC, ((0, 0), (0, more), (0, 0), (0, 0)))

    return jax.tree.map(pad, cache)


def _tokens_unasked() -> int:
    """A loop of unknown length makes a GPU wait for the host at each turn."""
    return TOKENS_UNASKED if jax.default_backend() == "gpu" else 1


@functools.partial(jax.jit, static_argnums=(6, 8), donate_argnums=(1, 2))
def _read_next(
    variables, window_BT, cache, known, end, key, sampler: Sampler, ids, unasked: int
):
    """Draws tokens `known` to `end` with the cache; returns the same as `_read`.

    It draws `unasked` at a time, and the last token again if some of them are too many.
    """

    def draw_next(known, carry):
        window_BT, cache = carry
        h_BD, cache = next_hidden(
            sampler.model, variables, cache, window_BT[:, known - 1], known - 1
        )
        drawn_B = _draw(variables, h_BD, known, key, sampler, ids)
        return window_BT.at[:, known].set(drawn_B), cache

    def draw_some(turn, carry):
        first = known + turn * unasked

        def draw(place, carry):
            return draw_next(jnp.minimum(first + place, end - 1), carry)

        return jax.lax.fori_loop(0, unasked, draw, carry)

    turns = (end - known + unasked - 1) // unasked
    return jax.lax.fori_loop(0, turns, draw_some, (window_BT, cache))


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def _read_full(variables, window_BT, known, end, key, sampler: Sampler, ids):
    """Draws tokens `known` to `end` from full windows; returns the shifted window."""

    def draw_next(known, window_BT):
        h_ND = sampler.model.apply(variables, window_BT, method="hidden")
        h_BD = h_ND.reshape(*window_BT.shape, -1)[:, -1]
        drawn_B = _draw(variables, h_BD, known, key, sampler, ids)
        return jnp.roll(window_BT, -1, axis=1).at[:, -1].set(drawn_B)

    return jax.lax.fori_loop(known, end, draw_next, window_BT)


def _draw(variables, h_BD, known, key, sampler: Sampler, ids) -> jax.Array:
    """Draws tokens [B] that follow the output of ln_f at the last known ones."""
    model, *options = sampler
    logits_BV = model.apply(variables, h_BD, method="logits")
    return draw(logits_BV, ids, known, key, *options)


def draw(
    logits_BV, ids, known, key, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Draws a token from each row of logits: int32 [B]; as `generate`.

    known: the number of tokens before it; with the same key, another number draws
    others.
    """
    count = min(len(ids), logits_BV.shape[-1])  # A table may be padded, or too short.
    logits_BV = jnp.where(ids[:count], logits_BV[:, :count], -jnp.inf)
    if top_k and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if temperature < LEAST_TEMPERATURE:
        drawn_B = jnp.argmax(logits_BV, axis=-1)
    else:
        key = jax.random.fold_in(key, known)
        logits_BV = logits_BV / temperature
        if top_p < 1:
            logits_BV = _nucleus(logits_BV, top_p)
        drawn_B = jax.random.categorical(key, logits_BV, mode="low")
    return drawn_B.astype(jnp.int32)


def _nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits of the fewest tokens with the probability `top_p`; others are -inf.

    Tokens as likely as the last of them stay, too.
    """
    falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    p_BV = jax.nn.softmax(falling_BV)
    needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
    needed_BV = needed_BV.at[:, 0].set(True)  # float32 takes a tiny top_p for 0.
    least_B1 = jnp.where(needed_BV, falling_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
