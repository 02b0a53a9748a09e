"""Loss added by replacing the token table of a model, without training.

Shape letters: B batch, T sequence, W windows, N = B*T, n tokens of a chunk, V
vocabulary, D width, E deciles.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pcagpt.losses import divergence, negative_log_likelihood, scan_chunks
from pcagpt.losses.deciles import DECILES, decile_means
from pcagpt.losses.interval import mean_interval
from pcagpt.model import GPT, HeadBand, head_logits
from pcagpt.rows import SwapScores
from pcagpt.sharding import placement


class TableSwap:
    """Scores replacements of a model's table; all share one compiled program."""

    def __init__(self, model: GPT, variables: dict, mesh: Mesh, chunks: int):
        """Takes a model with a full table; logits are computed in `chunks` parts."""
        self._variables, self._mesh = variables, mesh
        score = functools.partial(_score, model=model, chunks=chunks)
        self._score = placement.jit(score, mesh)

    def __call__(
        self, table_VD: np.ndarray, decile_V: np.ndarray, batches: Iterable
    ) -> SwapScores:
        """Scores a table [V, D] on batches of (inputs, targets), each [B, T].

        `decile_V` is the result of `frequency_deciles`.
        """
        table = jax.device_put(
            np.asarray(table_VD, np.float32), placement.replicated(self._mesh)
        )
        decile_V = jnp.asarray(decile_V)
        score = functools.partial(self._score, self._variables, table, decile_V)
        scored = placement.map_batches(score, batches, self._mesh)
        return swap_scores(sums for _, sums in scored)


def swap_scores(batches: Iterable[dict[str, Any]]) -> SwapScores:
    """The scores of a table from the sums of each batch, as `_score` returns them."""
    found = list(batches)
    windows_W2 = np.concatenate([sums.pop("windows") for sums in found])
    total = jax.tree.map(lambda *sums: sum(map(np.float64, sums)), *found)
    by_decile = decile_means(total.pop("deciles").T)
    count = total.pop("count")
    means = {name: float(value / count) for name, value in total.items()}
    # The last batch may end with windows without targets.
    added_W, count_W = np.float64(windows_W2[windows_W2[:, 1] > 0]).T
    _, interval = mean_interval(added_W / count_W, count_W)
    return SwapScores(
        **means, added_loss_by_decile=by_decile, added_loss_interval=interval
    )


def _score(
    variables, table_VD, decile_V, inputs_BT, targets_BT, *, model: GPT, chunks: int
) -> dict:
    """Sums of all scores over a batch; `windows` has added loss and count of each."""
    dtype = jnp.dtype(model.config.compute_dtype)
    tokens_N = inputs_BT.reshape(-1)
    own_ND = model.apply(variables, inputs_BT, method="hidden")
    swapped_ND = model.apply(
        variables,
        table_VD[tokens_N].astype(dtype),
        inputs_BT.shape[1],
        method="contextualize",
    )
    wte_VD = model.apply(variables, method="head")[0].wte
    own_head, swapped_head = (
        (HeadBand(rows_VD.astype(dtype), None, 0, len(table_VD)),)
        for rows_VD in (wte_VD[: len(table_VD)], table_VD)
    )

    def sums_of(own_nD, swapped_nD, targets_n):
        """(sums over a chunk, added loss [n])."""
        counted_n = targets_n >= 0

        def predict(h_nD, head):
            """(logits of the only band [n, V] in a list, loss of the targets [n])."""
            logits = head_logits(h_nD, head, jnp.float32)
            return logits, negative_log_likelihood(logits, head, targets_n)

        own, own_n = predict(own_nD, own_head)
        both, both_n = predict(swapped_nD, swapped_head)
        kl_n = divergence(both, own, own_head)
        same_n = own[0].argmax(axis=1) == both[0].argmax(axis=1)
        added_n = both_n - own_n
        scalars = {
            "loss": own_n,
            "added_loss": added_n,
            "added_loss_input": predict(swapped_nD, own_head)[1] - own_n,
            "added_loss_head": predict(own_nD, swapped_head)[1] - own_n,
            "kl": jnp.where(counted_n, kl_n, 0),
            "top1_agreement": counted_n & same_n,
            "count": counted_n,
        }
        in_decile_nE = counted_n[:, None] & (
            decile_V[jnp.maximum(targets_n, 0)][:, None] == jnp.arange(DECILES)[None]
        )
        by_decile_E = jnp.sum(jnp.where(in_decile_nE, added_n[:, None], 0), 0)
        sums = {n: jnp.sum(a, dtype=jnp.float32) for n, a in scalars.items()}
        in_decile_E = in_decile_nE.sum(0, dtype=jnp.float32)
        sums["deciles"] = jnp.stack([by_decile_E, in_decile_E])
        return sums, added_n

    def chunk(total, inputs):
        sums, added_n = sums_of(*inputs)
        return jax.tree.map(jnp.add, total, sums), added_n

    arrays = (own_ND, swapped_ND, targets_BT.reshape(-1))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums_of, *arrays)[0])
    sums, added_N = scan_chunks(chunk, zeros, chunks, *arrays)
    by_window = (added_N.reshape(targets_BT.shape), targets_BT >= 0)
    windows_B2 = jnp.stack([jnp.sum(a_BT, 1, jnp.float32) for a_BT in by_window], 1)
    return sums | {"windows": windows_B2}
