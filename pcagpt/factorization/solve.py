"""Solves the weighted low-rank approximation of all methods.

Shape letters: V rows of a table, D model width, R = min(V, D), K rank. `Factors` hold
all ranks at once; rank k is a prefix:

    W ~ 1 mean + table[:, :k] @ directions[:k]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt.factorization.table import BandFactors, FactorizedTable
from pcagpt.methods import Weighting

# Smaller eigenvalues of a metric are raised to this share of the largest one, because a
# direction of weight 0 would make the root of the metric singular.
SMALLEST_EIGENVALUE = 1e-10


class Factors(NamedTuple):
    """All ranks of one factorization.

    The weighted squared error of rank k is the sum of the squared singular values
    beyond k. Without token weights, singular values are the column norms of `table`.
    """

    table: np.ndarray  # [V, R], columns in order of importance
    directions: np.ndarray  # [R, D], orthonormal without a metric
    singular_values: np.ndarray  # [R], descending
    mean: np.ndarray | None  # [D]
    contexts: np.ndarray | None  # [V, R], those of `Weighting` in the basis of `table`


def centred(
    table_VD: np.ndarray, weighting: Weighting
) -> tuple[np.ndarray, np.ndarray | None]:
    """(the table minus the mean of the weighting, the mean in the table's dtype)."""
    if weighting.mean is None:
        return table_VD, None
    mean_D = weighting.mean.astype(table_VD.dtype)
    return table_VD - mean_D, mean_D


def solve(
    table_VD: np.ndarray,
    weighting: Weighting,
    rows: np.ndarray | None = None,
    roots: tuple[np.ndarray, np.ndarray] | None = None,
) -> Factors:
    """Finds the best approximation of every rank under a weighting.

    Minimises |L^1/2 (W - 1 mean - Z P) M^1/2| in Frobenius norm, where L holds the
    token weights and M is the metric. It never divides by a weight, because a token may
    have weight 0. The signs are fixed: the largest entry of each direction, times M^1/2
    with a metric, is positive.

    Args:
      table_VD: the table, floating point.
      weighting: of the whole table.
      rows: indices of the rows to approximate; None: all.
      roots: `metric_roots` of the metric, if already known.

    Returns:
      Factors of those rows, in the dtype of the table.
    """
    chosen = slice(None) if rows is None else rows
    rows_VD, mean_D = centred(table_VD[chosen], weighting)
    unroot_DD = None
    if weighting.metric is not None:
        root_DD, unroot_DD = roots or metric_roots(weighting.metric)
        rows_VD = rows_VD @ root_DD.astype(table_VD.dtype)
    if weighting.token_weights is None:
        # JAX runs this on the device, where float32 products may be TF32 by default.
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
    """Squared singular values [R] (descending) and directions [D, R] of weighted rows.

    The squares are float64, the directions in the dtype of the rows.
    The eigenvectors of the Gram matrix take much less time than an SVD of a tall
    matrix. It computes in float64 on the host, because the Gram matrix squares the
    condition number.
    """
    scaled_VD = rows_VD.astype(np.float64) * np.sqrt(weights_V)[:, None]
    squares_D, basis_DD = np.linalg.eigh(scaled_VD.T @ scaled_VD)
    count = min(rows_VD.shape)
    basis_DR = basis_DD[:, ::-1][:, :count].astype(rows_VD.dtype)
    return np.clip(squares_D[::-1][:count], 0, None), basis_DR


def metric_roots(metric_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M^1/2 and M^-1/2 [D, D] float64 of a symmetric, possibly singular metric."""
    values_D, vectors_DD = np.linalg.eigh(np.asarray(metric_DD, np.float64))
    values_D = np.clip(values_D, SMALLEST_EIGENVALUE * values_D[-1], None)
    root_D = np.sqrt(values_D)
    return (vectors_DD * root_D) @ vectors_DD.T, (vectors_DD / root_D) @ vectors_DD.T


def truncate(
    factors: Factors, rank: int, singular_value_split: float = 0.0
) -> BandFactors:
    """Cuts factors to rank k and splits the singular values between wte and scale.

    Let s_i be the norm of column i of `table` times the norm of row i of `directions`
    (without weights, the singular value). Row i of scale then has the norm s_i^a.
    Column i of wte has the norm s_i^(1-a), until a method refits the rows of wte. All
    splits give the same product, but training from them differs.

    Args:
      factors: of any method. If they have contexts, rows are refitted.
      rank: k; ValueError if it is not in 1..R.
      singular_value_split: a in [0, 1]; at 0 the rows of `scale` have norm 1.
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
    """The table of a single band; arguments as for `truncate`."""
    band = truncate(factors, rank, singular_value_split)
    return FactorizedTable.of_one_band(band, factors.mean)


def _context_step(factors: Factors, rank: int) -> np.ndarray:
    """Change of the first k columns that keeps each row's logit in its context: [V, K].

    It minimises |E|^2 + (E c)^2 for the error E and the context c of each row. The
    Sherman-Morrison formula solves this for the logit error of rank k.
    """
    seen_VK = factors.contexts[:, :rank]
    residual_V = np.einsum(
        "vr,vr->v", factors.table[:, rank:], factors.contexts[:, rank:]
    )
    gain_V = residual_V / (1 + np.einsum("vk,vk->v", seen_VK, seen_VK))
    return gain_V[:, None] * seen_VK


def energy_kept(singular_values: np.ndarray) -> np.ndarray:
    """One minus the squared relative (weighted) error of ranks 1..R: [R] float64."""
    squares = np.square(singular_values, dtype=np.float64)
    return np.cumsum(squares) / np.sum(squares)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of S^2 / sum S^2 (Roy and Vetterli 2007)."""
    shares = np.square(singular_values, dtype=np.float64)
    shares = shares[shares > 0] / np.sum(shares)
    return float(np.exp(-np.sum(shares * np.log(shares))))
