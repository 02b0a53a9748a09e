"""Coordinates in which an error costs the same in every direction.

Shape letters: V vocabulary, D model width, K directions that are coded, N rows of a
chunk.

A weighting counts the error E of a row v as

    1/2 p_v (E M E' + (E c_v)^2)

with the token weight p_v, the metric M and the context c_v of `pcagpt.methods`. A
synthesis S [K, D] turns coefficients into rows: W ~ 1 mean + A S. If S M S' = I, errors
of coefficients cost 1/2 p_v (|e|^2 + (e C_v)^2) with C_v = c_v S'.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pcagpt.factorization import Weighting
from pcagpt.factorization.chunks import chunks
from pcagpt.factorization.solve import metric_roots

RIDGE = 1e-12  # relative; keeps systems of equations solvable


class Coefficients(NamedTuple):
    """A table in the coordinates of a synthesis."""

    values: np.ndarray  # [K, V] float32
    contexts: np.ndarray | None  # [K, V] float32
    # [V] float64, error of each token's logit in its context that the missing
    # directions cause.
    left_out: np.ndarray | None


def karhunen_loeve(table_VD: np.ndarray, weighting: Weighting) -> np.ndarray:
    """The synthesis with S M S' = I and uncorrelated coefficients: [D, D] float64.

    The weighted energy of the coefficients falls from row to row.
    """
    vocab_size, width = table_VD.shape
    weights_V, mean_D = weighting.token_weights, mean_row(weighting, width)
    moment_DD = np.zeros((width, width))
    for rows in chunks(vocab_size):
        rows_ND = table_VD[rows].astype(np.float64) - mean_D
        weighted_ND = rows_ND if weights_V is None else rows_ND * weights_V[rows, None]
        moment_DD += weighted_ND.T @ rows_ND
    if weighting.metric is None:
        return np.linalg.eigh(moment_DD)[1].T[::-1]
    root_DD, unroot_DD = metric_roots(weighting.metric)
    return np.linalg.eigh(root_DD @ moment_DD @ root_DD)[1].T[::-1] @ unroot_DD


def coefficients(
    table_VD: np.ndarray,
    weighting: Weighting,
    synthesis_KD: np.ndarray,
    mean_D: np.ndarray,
) -> Coefficients:
    """The coefficients A of the rows W - 1 mean with the least error in the metric."""
    values_KV = np.empty((len(synthesis_KD), len(table_VD)), np.float32)
    contexts_KV = left_V = None
    if weighting.contexts is not None:
        contexts_KV, left_V = np.empty_like(values_KV), np.empty(len(table_VD))
    for rows, part in coefficient_chunks(table_VD, weighting, synthesis_KD, mean_D):
        values_KV[:, rows] = part.values
        if weighting.contexts is not None:
            contexts_KV[:, rows], left_V[rows] = part.contexts, part.left_out
    return Coefficients(values_KV, contexts_KV, left_V)


def coefficient_chunks(
    table_VD: np.ndarray,
    weighting: Weighting,
    synthesis_KD: np.ndarray,
    mean_D: np.ndarray,
) -> Iterator[tuple[slice, Coefficients]]:
    """The rows of each chunk, and their part of `coefficients`."""
    seen_DK, contexts_KN, left_N = synthesis_KD.T, None, None
    if weighting.metric is not None:
        seen_DK = weighting.metric @ seen_DK
    gram_KK = synthesis_KD @ seen_DK
    # A row of the synthesis may have been rounded to zeros.
    gram_KK += RIDGE * np.diag(1 + gram_KK.diagonal())
    analysis_KD = np.linalg.solve(gram_KK, seen_DK.T).astype(np.float32)
    single_KD = synthesis_KD.astype(np.float32)
    for rows in chunks(len(table_VD)):
        rows_ND = (table_VD[rows] - mean_D).astype(np.float32)
        values_KN = analysis_KD @ rows_ND.T
        if weighting.contexts is not None:
            contexts_ND = weighting.contexts[rows].astype(np.float32)
            contexts_KN = single_KD @ contexts_ND.T
            rows_ND -= values_KN.T @ single_KD
            # Float64, because the errors of all directions are added to it.
            left_N = -np.einsum("nd,nd->n", rows_ND, contexts_ND).astype(np.float64)
        yield rows, Coefficients(values_KN, contexts_KN, left_N)


def mean_row(weighting: Weighting, width: int) -> np.ndarray:
    """The mean of a weighting; zeros if it has none: [D] float64."""
    return np.zeros(width) if weighting.mean is None else weighting.mean
