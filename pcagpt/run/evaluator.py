"""Loss of a model on a split, and cosines of its output with the next token's row.

Every token of the split after the first is predicted exactly once, in fixed order, in
windows that do not overlap.

Shape letters: B batch, T sequence, N = B*T, n tokens of a chunk, W windows, V rows of a
table, D model width, K rank.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import Corpus, TextSize
from pcagpt.losses import scan_chunks, token_losses
from pcagpt.model import GPT
from pcagpt.sharding import inside, placement
from pcagpt.telemetry.progress import Progress


class TokenScores(NamedTuple):
    """Scores of each target, [B, T] float32; 0 without a target.

    loss is in nats; cosine is between z = h @ scale_down.T and the target's wte row;
    cosine_d is between h and the target's row of the table in D dimensions.
    """

    loss: jax.Array
    cosine: jax.Array
    cosine_d: jax.Array


class Evaluation(NamedTuple):
    """metrics: {name: number or None}.

    window_losses: [W, 2] float64 (summed loss, targets) of each window; target_losses:
    [V, 2] float64, the same of each token id as the target, up to the highest one.
    """

    metrics: dict[str, float | None]
    window_losses: np.ndarray
    target_losses: np.ndarray


class Evaluator:
    """Evaluates weights of one model on one split; compiles only once.

    Two losses are comparable if their `protocol` (JSON values) is the same.
    """

    def __init__(
        self,
        model: GPT,
        mesh: Mesh,
        corpus: Corpus,
        split: str,
        batch_size: int,
        chunks: int,
        max_tokens: int = 0,
    ):
        """Opens the split.

        Args:
          model: full or factorized.
          mesh: of devices.
          corpus: with ids that the model knows.
          split: 'train', 'val' or 'test'.
          batch_size: windows at a time.
          chunks: number of parts that logits are computed in.
          max_tokens: number of tokens to predict, from the start; 0: all.

        Raises:
          UserError: the corpus lacks the split, or the mesh cannot split the batch.
        """
        placement.check_divisible("evaluate.batch_size", batch_size, mesh)
        window, tokens = model.config.block_size, corpus.tokens(split)
        self.batches = EvaluationBatches(tokens, window, batch_size, max_tokens)
        self._corpus, self._split = corpus, split
        score = functools.partial(score_tokens, model=model, chunks=chunks)
        self._score = placement.jit(score, mesh)
        self._mesh = mesh
        self.protocol = {
            "split": split,
            "window": window,
            "stride": window,
            "windows": self.batches.window_count,
            "tokens_predicted": self.batches.target_count,
            "corpus": corpus.name,
            "tokenizer": corpus.tokenizer,
            "tokenizer_sha256": corpus.tokenizer_sha256,
            "tokens_sha256": corpus.tokens_sha256(split),
        }
        if self.batches.is_cut:  # As in the protocol of a sweep.
            self.protocol["evaluated_tokens"] = self.batches.target_count

    @functools.cached_property
    def _text(self) -> TextSize | None:
        """Words and bytes, which are counted for whole splits only."""
        return None if self.batches.is_cut else self._corpus.text_size(self._split)

    def __call__(self, variables: dict, progress: Progress | None = None) -> Evaluation:
        """Evaluates {'params', 'constants'} on all tokens.

        Returns:
          Metrics loss (nats per token), perplexity, word_perplexity and bits_per_byte
          (None if the text is unknown), ln_f_cosine (mean), ln_f_cosine_p05 (its 5th
          percentile), ln_f_cosine_d and tokens_predicted.
        """
        score = functools.partial(self._score, variables)
        found = score_windows(score, self.batches, self._mesh, progress)
        return summarize(*found, self._text)


def score_windows(
    score: Callable,
    batches: EvaluationBatches,
    mesh: Mesh,
    progress: Progress | None = None,
) -> tuple[TokenScores, np.ndarray]:
    """(scores of all targets [W, T], targets [W, T], negative where there is none).

    score: `score_tokens` of (inputs, targets) with a model's variables, jitted on the
    mesh.
    """
    scores, targets = [], []
    tracked = batches if progress is None else progress.track(batches)
    for (_, targets_BT), found in placement.map_batches(score, tracked, mesh):
        scores.append(found)
        targets.append(targets_BT)
    # The last batch may end with windows without targets.
    windows = batches.window_count
    targets_WT = np.concatenate(targets)[:windows]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[:windows], *scores)
    return whole, targets_WT


def summarize(
    scores: TokenScores, targets_WT: np.ndarray, text: TextSize | None
) -> Evaluation:
    """The metrics of a split from the scores and targets [W, T] of all its windows."""
    has_target_WT = targets_WT >= 0
    sums_W = scores.loss.sum(axis=1, dtype=np.float64)
    window_losses = np.stack([sums_W, has_target_WT.sum(axis=1)], axis=1)
    nats, tokens = window_losses.sum(axis=0)
    targets = targets_WT[has_target_WT]
    by_target = np.bincount(targets, scores.loss[has_target_WT]), np.bincount(targets)
    cosines, cosines_d = scores.cosine[has_target_WT], scores.cosine_d[has_target_WT]
    # A split of ends of documents alone has no words.
    words, size = (text.words, text.bytes) if text else (0, 0)
    metrics = {
        "loss": nats / tokens,
        "perplexity": _exp(nats / tokens),
        "word_perplexity": _exp(nats / words) if words else None,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "ln_f_cosine": float(cosines.mean(dtype=np.float64)),
        "ln_f_cosine_p05": float(np.quantile(cosines, 0.05)),
        "ln_f_cosine_d": float(cosines_d.mean(dtype=np.float64)),
        "tokens_predicted": int(tokens),
    }
    return Evaluation(metrics, window_losses, np.stack(by_target, axis=1))


def score_tokens(variables, inputs_BT, targets_BT, *, model: GPT, chunks: int):
    """`TokenScores` of a batch; logits and cosines are in float32."""
    h_ND = model.apply(variables, inputs_BT, method="hidden")
    # Without this, the devices would exchange hidden states in every chunk.
    head = jax.tree.map(inside.gathered, model.apply(variables, method="head"))
    targets_N = targets_BT.reshape(-1)
    columns_N = model.apply(variables, targets_N, method="renumber")

    def chunk(carry, arrays):
        h_nD, columns_n = arrays
        loss_n = token_losses(h_nD, head, columns_n)
        return carry, TokenScores(loss_n, *target_cosines(h_nD, head, columns_n))

    _, scores = scan_chunks(chunk, None, chunks, h_ND, columns_N)
    return jax.tree.map(lambda a_N: a_N.reshape(targets_BT.shape), scores)


def target_cosines(h_ND, head, columns_N) -> tuple[jax.Array, jax.Array]:
    """(cosine in the table's own width, cosine in D dimensions), each [N] float32."""
    h_ND = h_ND.astype(jnp.float32)
    cosine_N = cosine_d_N = jnp.zeros(h_ND.shape[0], jnp.float32)
    for band in head:
        local_N = columns_N - band.start
        row_NK = band.rows(jnp.clip(local_N, 0, band.size - 1))
        z_NK, row_ND = h_ND, row_NK
        if band.scale_down is not None:
            with jax.default_matmul_precision("highest"):
                z_NK, row_ND = h_ND @ band.scale_down.T, row_NK @ band.scale_down
        is_inside_N = (local_N >= 0) & (local_N < band.size)
        cosine_N = jnp.where(is_inside_N, _cosine(z_NK, row_NK), cosine_N)
        cosine_d_N = jnp.where(is_inside_N, _cosine(h_ND, row_ND), cosine_d_N)
    return cosine_N, cosine_d_N


def _cosine(a_NX, b_NX):
    norms_N = jnp.linalg.norm(a_NX, axis=-1) * jnp.linalg.norm(b_NX, axis=-1)
    return jnp.sum(a_NX * b_NX, axis=-1) / jnp.maximum(norms_N, 1e-12)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
