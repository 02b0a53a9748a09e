"""Solves all methods: one solver, one truncation.

Shape letters: V rows of a table, D model width, R = min(V, D), K rank. Factors hold
all ranks at once, rank k is a prefix of them:

    W ~ 1 mean + table[:, :k] @ directions[:k]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.factorize.methods import Weighting
from pcagpt.factorize.table import BandFactors, FactorizedTable

# Eigenvalues of a metric are raised to this share of the largest one: a direction of
# weight 0 would make the metric's root singular.
SMALLEST_EIGENVALUE = 1e-10


class Factors(NamedTuple):
    """All ranks of one factorization.

    table: [V, R], columns in order of importance; directions: [R, D];
    singular_values: [R] descending, the sum of their squares beyond k is the weighted
    squared error of rank k; mean: [D] or None; contexts: [V, R] or None, the contexts
    of `Weighting` in the basis of the columns of `table`.

    Without a metric, directions are orthonormal. Without token weights, singular values
    are the column norms of `table`.
    """

    table: np.ndarray
    directions: np.ndarray
    singular_values: np.ndarray
    mean: np.ndarray | None
    contexts: np.ndarray | None = None


def solve(
    table_VD: np.ndarray,
    weighting: Weighting,
    rows: np.ndarray | None = None,
    roots: tuple[np.ndarray, np.ndarray] | None = None,
) -> Factors:
    """Finds the best approximation of every rank under a weighting.

    Minimises |L^1/2 (W - 1 mean - Z P) M^1/2| in Frobenius norm, L the token weights,
    M the metric. The weights are never divided by: a token may have weight 0. The
    largest entry of each direction is positive, which fixes the signs.

    Args:
      table_VD: the table, floating point.
      weighting: for all its rows.
      rows: int, the rows to approximate; None: all.
      roots: `metric_roots` of the metric, if already known.

    Returns:
      Factors of those rows, in the dtype of the table.
    """
    chosen = slice(None) if rows is None else rows
    rows_VD, mean_D = table_VD[chosen], None
    if weighting.mean is not None:
        mean_D = weighting.mean.astype(table_VD.dtype)
        rows_VD = rows_VD - mean_D
    unroot_DD = None
    if weighting.metric is not None:
        root_DD, unroot_DD = roots or metric_roots(weighting.metric)
        rows_VD = rows_VD @ root_DD.astype(table_VD.dtype)
    if weighting.token_weights is None:
        # JAX decomposes float32 on the device, where the default may be TF32.
        with jax.default_matmul_precision("highest"):
            parts = jnp.linalg.svd(jnp.asarray(rows_VD), full_matrices=False)
        u_VR, singular_R, basis_RD = (np.asarray(part) for part in parts)
        scores_VR = u_VR * singular_R
    else:
        squares_R, basis_DR = principal(rows_VD, weighting.token_weights[chosen])
        singular_R, basis_RD = np.sqrt(squares_R), basis_DR.T
        scores_VR = rows_VD @ basis_DR
    largest_R = np.argmax(np.abs(basis_RD), axis=1)
    sign_R = np.sign(basis_RD[np.arange(len(basis_RD)), largest_R])
    basis_RD, scores_VR = basis_RD * sign_R[:, None], scores_VR * sign_R
    contexts_VR = None
    if weighting.contexts is not None:
        back_DR = basis_RD.T if unroot_DD is None else unroot_DD @ basis_RD.T
        contexts_VR = weighting.contexts[chosen] @ back_DR
        contexts_VR = contexts_VR.astype(table_VD.dtype)
    directions_RD = basis_RD if unroot_DD is None else basis_RD @ unroot_DD
    return Factors(
        scores_VR,
        directions_RD.astype(table_VD.dtype),
        singular_R.astype(table_VD.dtype),
        mean_D,
        contexts_VR,
    )


def principal(
    rows_VD: np.ndarray, weights_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values [R] (float64, descending) and directions [D, R].

    Each row is multiplied by the root of its weight. Eigenvectors of the Gram matrix in
    float64 give the directions.
    """
    scaled_VD = rows_VD.astype(np.float64) * np.sqrt(weights_V)[:, None]
    squares_D, basis_DD = np.linalg.eigh(scaled_VD.T @ scaled_VD)
    count = min(rows_VD.shape)
    basis_DR = basis_DD[:, ::-1][:, :count].astype(rows_VD.dtype)
    return np.clip(squares_D[::-1][:count], 0, None), basis_DR


def metric_roots(metric_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M^1/2 and M^-1/2 of a symmetric, possibly singular metric [D, D], in float64."""
    values_D, vectors_DD = np.linalg.eigh(np.asarray(metric_DD, np.float64))
    values_D = np.clip(values_D, SMALLEST_EIGENVALUE * values_D[-1], None)
    root_D = np.sqrt(values_D)
    return (vectors_DD * root_D) @ vectors_DD.T, (vectors_DD / root_D) @ vectors_DD.T


def truncate(
    factors: Factors, rank: int, singular_value_split: float = 0.0
) -> BandFactors:
    """Cuts factors to rank k and shares the singular values between wte and scale.

    Let s_i be the norm of column i of `table` times the norm of row i of `directions`
    (the singular value, without weights). Then columns of wte get s^(1-a) and rows of
    scale s^a. Every split is the same function of the tokens, but trains differently.

    Args:
      factors: of any method; with contexts, rows are refitted to them.
      rank: k, from 1 to R.
      singular_value_split: a in [0, 1]; at 0 the rows of `scale` have norm 1.

    Raises:
      ValueError: the rank is out of range.
    """
    if not 1 <= rank <= len(factors.singular_values):
        raise ValueError(f"rank {rank} is not in 1..{len(factors.singular_values)}")
    wte_VK, scale_KD = factors.table[:, :rank], factors.directions[:rank]
    if factors.contexts is not None:
        wte_VK = wte_VK + _context_step(factors, rank)
    row_norm_K = np.linalg.norm(scale_KD, axis=1)
    strength_K = np.linalg.norm(factors.table[:, :rank], axis=0) * row_norm_K
    moved_K = np.where(strength_K > 0, strength_K, 1) ** singular_value_split
    factor_K = (moved_K / row_norm_K).astype(factors.table.dtype)
    return BandFactors(wte_VK / factor_K, scale_KD * factor_K[:, None])


def table_of_rank(
    factors: Factors, rank: int, singular_value_split: float = 0.0
) -> FactorizedTable:
    """The table of a single band at rank k; see `truncate`."""
    band = truncate(factors, rank, singular_value_split)
    return FactorizedTable.of_one_band(band, factors.mean)


def _context_step(factors: Factors, rank: int) -> np.ndarray:
    """Change of the first k columns that keeps each row's logit in its context: [V, K].

    It minimises |E|^2 + (E c)^2 for the error E and the context c of each row. The gain
    is the Sherman-Morrison formula, applied to the logit error that rank k leaves.
    """
    seen_VK = factors.contexts[:, :rank]
    residual_V = np.einsum(
        "vr,vr->v", factors.table[:, rank:], factors.contexts[:, rank:]
    )
    gain_V = residual_V / (1 + np.einsum("vk,vk->v", seen_VK, seen_VK))
    return gain_V[:, None] * seen_VK


def energy_kept(singular_values: np.ndarray) -> np.ndarray:
    """Share of the squared singular values in the first k, for k = 1..R: [R] float64.

    It is one minus the squared relative (weighted) error of rank k.
    """
    squares = np.square(singular_values, dtype=np.float64)
    return np.cumsum(squares) / np.sum(squares)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of S^2 / sum S^2 (Roy and Vetterli 2007)."""
    shares = np.square(singular_values, dtype=np.float64)
    shares = shares[shares > 0] / np.sum(shares)
    return float(np.exp(-np.sum(shares * np.log(shares))))
