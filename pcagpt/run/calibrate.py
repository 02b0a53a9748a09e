"""What a model does on calibration text: the statistics that weigh table errors.

Shape letters: B batch, T sequence, N = B*T, n tokens of a chunk, V vocabulary, D width.
"""

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.data.corpus import count_tokens
from pcagpt.factorize import Statistics
from pcagpt.losses import scan_chunks
from pcagpt.model import GPT
from pcagpt.sharding import inside, placement


def token_frequency(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Share of each token id among the tokens: [V] float64."""
    return count_tokens(tokens, vocab_size) / len(tokens)


def collect(
    model: GPT,
    variables: dict,
    frequency_V: np.ndarray,
    batches: Iterable[np.ndarray],
    mesh,
    chunks: int,
) -> Statistics:
    """Runs a model with a full table over batches of token ids, int32 [B, T].

    Products are in float32 at the highest precision, their sums over batches in
    float64; the model itself runs in its compute dtype.
    """
    measure = functools.partial(_measure, model=model, chunks=chunks)
    measure = placement.jit(measure, mesh)
    sharding, total, tokens = placement.batch_sharding(mesh), None, 0
    for number, batch_BT in enumerate(batches):
        placed = placement.put_batch(batch_BT, sharding)
        sums = measure(variables, placed, jax.random.key(number))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        tokens += batch_BT.size
    return Statistics(
        frequency=frequency_V, **{name: value / tokens for name, value in total.items()}
    )


def _measure(variables, tokens_BT, key, *, model: GPT, chunks: int) -> dict:
    """Sums over a batch of every statistic but the frequency."""
    vocab_size = model.config.vocab_size

    def trunk(x_ND):
        return model.apply(variables, x_ND, tokens_BT.shape[1], method="contextualize")

    x_ND = model.apply(
        variables, tokens_BT.reshape(-1), method=lambda gpt, tokens: gpt.embed(tokens)
    )
    h_ND, pull_back = jax.vjp(trunk, x_ND)
    wte_VD = model.apply(variables, method="head")[0].wte
    # Whole before the chunks: else devices would send each other hidden states in each.
    wte_VD = inside.gathered(wte_VD)[:vocab_size]
    compute_VD = wte_VD.astype(h_ND.dtype)
    keys_N = jax.random.split(key, h_ND.shape[0])

    def chunk(probability_V, inputs):
        h_nD, keys_n = inputs
        logits_nV = jnp.dot(h_nD, compute_VD.T, preferred_element_type=jnp.float32)
        p_nV = jax.nn.softmax(logits_nV)
        expected_nD = jnp.dot(
            p_nV.astype(h_nD.dtype), compute_VD, preferred_element_type=jnp.float32
        )
        drawn_n = jax.vmap(jax.random.categorical)(keys_n, logits_nV)
        # Of the loss of the drawn tokens with respect to h.
        gradient_nD = expected_nD - wte_VD[drawn_n]
        return probability_V + p_nV.sum(axis=0), (expected_nD, gradient_nD)

    probability_V, (expected_ND, gradient_ND) = scan_chunks(
        chunk, jnp.zeros(vocab_size), chunks, h_ND, keys_N
    )
    (x_gradient_ND,) = pull_back(gradient_ND.astype(h_ND.dtype))
    h_ND, x_gradient_ND = (a.astype(jnp.float32) for a in (h_ND, x_gradient_ND))
    product = functools.partial(jnp.dot, precision="highest")
    return {
        "probability": probability_V,
        "hidden_mean": h_ND.sum(axis=0),
        "hidden_moment": product(h_ND.T, h_ND),
        "gradient_moment": product(x_gradient_ND.T, x_gradient_ND),
        "context_moment": product(h_ND.T, expected_ND),
    }


def write(path: Path, statistics: Statistics, protocol: dict[str, Any]) -> None:
    """Statistics and how they came about, as one .npz."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        np.savez(file, protocol=json.dumps(protocol), **statistics._asdict())
    temporary.replace(path)


def beside(run_dir: Path, step: int, protocol: dict[str, Any]) -> Path:
    """Where the statistics of a checkpoint under a protocol are kept."""
    text = json.dumps(protocol, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return run_dir / f"statistics_step{step}_{digest[:8]}.npz"


def read(path: Path, protocol: dict[str, Any] | None = None) -> Statistics | None:
    """Statistics from a file, of the same protocol if one is given; else None."""
    try:
        # From memory: of a damaged archive np.load would leave the file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            if protocol and json.loads(str(archive["protocol"])) != protocol:
                return None
            return Statistics(**{name: archive[name] for name in Statistics._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
