"""Loss over a split, and how the final hidden state points at the next token.

Every token of the split after the first is predicted exactly once, in non-overlapping
windows, in fixed order.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.losses import scan_chunks, token_losses
from pcagpt.model import GPT
from pcagpt.sharding import inside, placement


class TokenScores(NamedTuple):
    """Per target, [B, T] float32; 0 where there is none.

    loss: nats; cosine: of z = h @ scale_down.T with the target's wte row; cosine_d: of
    h with the target's row of the table in D dimensions.
    """

    loss: jax.Array
    cosine: jax.Array
    cosine_d: jax.Array


class TextSize(NamedTuple):
    """Words (whitespace-separated, plus line ends) and bytes of a split's text."""

    words: int
    bytes: int

    @classmethod
    def of(cls, counts: tuple[int, int] | None) -> "TextSize | None":
        """From (words, bytes), None where the text is not known."""
        return cls(*counts) if counts else None


class Evaluation(NamedTuple):
    """metrics: name -> number or None; window_losses: [W, 2] float64 (sum, targets)."""

    metrics: dict[str, float | None]
    window_losses: np.ndarray


def target_cosines(h_ND, head, positions_N) -> tuple[jax.Array, jax.Array]:
    """(cosine in the table's own width, cosine in D dimensions), each [N] float32."""
    h_ND = h_ND.astype(jnp.float32)
    cosine_N = cosine_d_N = jnp.zeros(h_ND.shape[0], jnp.float32)
    start = 0
    for band in head:
        wte_VK, scale_down_KD, size = band.wte, band.scale_down, band.size
        local_N = positions_N - start
        row_NK = wte_VK[jnp.clip(local_N, 0, size - 1)]
        z_NK, row_ND = h_ND, row_NK
        if scale_down_KD is not None:
            with jax.default_matmul_precision("highest"):
                z_NK, row_ND = h_ND @ scale_down_KD.T, row_NK @ scale_down_KD
        inside_N = (local_N >= 0) & (local_N < size)
        cosine_N = jnp.where(inside_N, _cosine(z_NK, row_NK), cosine_N)
        cosine_d_N = jnp.where(inside_N, _cosine(h_ND, row_ND), cosine_d_N)
        start += size
    return cosine_N, cosine_d_N


def _cosine(a_NX, b_NX):
    norms_N = jnp.linalg.norm(a_NX, axis=-1) * jnp.linalg.norm(b_NX, axis=-1)
    return jnp.sum(a_NX * b_NX, axis=-1) / jnp.maximum(norms_N, 1e-12)


def score_tokens(variables, inputs_BT, targets_BT, *, model: GPT, chunks: int):
    """Scores of a batch: logits and cosines in float32 whatever the compute dtype."""
    h_ND = model.apply(variables, inputs_BT, method="hidden")
    # Whole before the chunks: else devices would send each other hidden states in each.
    head = [
        band.replace(wte=inside.gathered(band.wte))
        for band in model.apply(variables, method="head")
    ]
    targets_N = targets_BT.reshape(-1)
    positions_N = model.apply(variables, targets_N, method="renumber")

    def chunk(carry, arrays):
        h_nD, positions_n = arrays
        loss_n = token_losses(h_nD, head, positions_n)
        return carry, TokenScores(loss_n, *target_cosines(h_nD, head, positions_n))

    _, scores = scan_chunks(chunk, None, chunks, h_ND, positions_N)
    return jax.tree.map(lambda a_N: a_N.reshape(targets_BT.shape), scores)


def scorer(model: GPT, mesh, chunks: int):
    """`score_tokens` compiled for a mesh: (variables, inputs, targets) -> scores."""
    score = functools.partial(score_tokens, model=model, chunks=chunks)
    return placement.jit(score, mesh)


def evaluate(
    score, variables, batches: Iterable, window_count: int, batch_sharding, text=None
) -> Evaluation:
    """Loss and cosines over all batches.

    Args:
      score: what `scorer` returns.
      variables: {'params', 'constants'} of the model.
      batches: (inputs, targets), int32 [B, T]; targets are -1 where there is none.
      window_count: rows that hold windows; the last batch may be padded beyond it.
      batch_sharding: how a batch is laid out.
      text: `TextSize` of the text that the batches cover, or None.

    Returns:
      loss (nats per token), perplexity, word_perplexity and bits_per_byte (None without
      text), ln_f_cosine (mean), ln_f_cosine_p05, ln_f_cosine_d, and tokens_predicted.
    """
    scores, targets = [], []
    for inputs_BT, targets_BT in batches:
        placed = [
            placement.put_batch(array, batch_sharding)
            for array in (inputs_BT, targets_BT)
        ]
        scores.append(score(variables, *placed))
        targets.append(targets_BT)
        if len(scores) > 1:  # Read one batch late, so that the device never waits.
            scores[-2] = jax.tree.map(np.asarray, scores[-2])
    loss_WT, cosine_WT, cosine_d_WT = (
        np.concatenate([np.asarray(a_BT) for a_BT in parts])[:window_count]
        for parts in zip(*scores, strict=True)
    )
    counted_WT = np.concatenate(targets)[:window_count] >= 0
    window_losses = np.stack(
        [loss_WT.sum(axis=1, dtype=np.float64), counted_WT.sum(axis=1)], axis=1
    )
    nats, tokens = window_losses.sum(axis=0)
    cosines = cosine_WT[counted_WT]
    metrics = {
        "loss": nats / tokens,
        "perplexity": _exp(nats / tokens),
        "word_perplexity": _exp(nats / text.words) if text else None,
        "bits_per_byte": nats / math.log(2) / text.bytes if text else None,
        "ln_f_cosine": float(cosines.mean(dtype=np.float64)),
        "ln_f_cosine_p05": float(np.quantile(cosines, 0.05)),
        "ln_f_cosine_d": float(cosine_d_WT[counted_WT].mean(dtype=np.float64)),
        "tokens_predicted": int(tokens),
    }
    return Evaluation(metrics, window_losses)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
