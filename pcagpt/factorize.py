"""Low-rank factorization of a token table: arrays in, arrays out.

Shape letters: V vocabulary, D model width, R = min(V, D), K rank. A method turns the
table W [V, D] into factors of which every rank k is a prefix:

    W ~ 1 mean + table[:, :k] @ directions[:k]
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Factors(NamedTuple):
    """All ranks of one factorization.

    table: [V, R], columns in order of importance; directions: [R, D], orthonormal rows;
    singular_values: [R] descending, the column norms of `table`; mean: [D] or None.
    """

    table: np.ndarray
    directions: np.ndarray
    singular_values: np.ndarray
    mean: np.ndarray | None


class LowRank(NamedTuple):
    """A table of rank k: wte [V, K], scale [K, D] for both sides, mean [D] or None."""

    wte: np.ndarray
    scale: np.ndarray
    mean: np.ndarray | None


def svd(table_VD: np.ndarray) -> Factors:
    """The best approximation in Frobenius norm at every rank (Eckart and Young 1936).

    What the original system calls PCA: the table is not centred. Signs are fixed so
    that the largest entry of each direction is positive. dtype as given, at the
    device's highest precision.
    """
    with jax.default_matmul_precision("highest"):
        u_VR, s_R, vt_RD = jnp.linalg.svd(jnp.asarray(table_VD), full_matrices=False)
    u_VR, s_R, vt_RD = (np.asarray(array) for array in (u_VR, s_R, vt_RD))
    largest_R = np.argmax(np.abs(vt_RD), axis=1)
    sign_R = np.sign(vt_RD[np.arange(len(s_R)), largest_R])
    return Factors(u_VR * (s_R * sign_R), vt_RD * sign_R[:, None], s_R, None)


def pca(table_VD: np.ndarray) -> Factors:
    """Principal components: the same after subtracting the mean row."""
    mean_D = table_VD.mean(axis=0)
    return svd(table_VD - mean_D)._replace(mean=mean_D)


METHODS: dict[str, Callable[[np.ndarray], Factors]] = {"svd": svd, "pca": pca}


def truncate(factors: Factors, rank: int, singular_value_split: float = 0.0) -> LowRank:
    """The rank-k table, with the singular values shared out as S^(1-a) | S^a.

    Every split is the same function of the tokens; they differ in how training moves.

    Args:
      factors: of any method.
      rank: k, from 1 to R.
      singular_value_split: a in [0, 1]; 0 leaves the scale matrix orthonormal.

    Raises:
      ValueError: the rank is out of range.
    """
    if not 1 <= rank <= len(factors.singular_values):
        raise ValueError(f"rank {rank} is not in 1..{len(factors.singular_values)}")
    moved_K = factors.singular_values[:rank] ** singular_value_split
    # A zero singular value has nothing to move.
    moved_K = np.where(moved_K > 0, moved_K, 1).astype(factors.table.dtype)
    return LowRank(
        factors.table[:, :rank] / moved_K,
        factors.directions[:rank] * moved_K[:, None],
        factors.mean,
    )


def energy_kept(singular_values: np.ndarray) -> np.ndarray:
    """Share of the squared singular values in the first k, for k = 1..R: [R] float64.

    One minus the squared relative Frobenius error of rank k.
    """
    squares = np.square(singular_values, dtype=np.float64)
    return np.cumsum(squares) / np.sum(squares)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of S^2 / sum S^2 (Roy and Vetterli 2007)."""
    shares = np.square(singular_values, dtype=np.float64)
    shares = shares[shares > 0] / np.sum(shares)
    return float(np.exp(-np.sum(shares * np.log(shares))))
