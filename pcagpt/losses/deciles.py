"""Means by frequency decile: groups of tokens that each make up a tenth of a text.

Shape letters: V vocabulary, E deciles.
"""

import numpy as np

DECILES = 10
_ROUNDING = 1e-10  # deciles; above the error of a sum of a million shares


def frequency_deciles(frequency_V: np.ndarray) -> np.ndarray:
    """Decile of each token, int32 [V]; 0 covers the most frequent tenth of the text."""
    order = np.argsort(-frequency_V, kind="stable")
    before = np.cumsum(frequency_V[order]) - frequency_V[order]
    decile_V = np.empty(len(frequency_V), np.int32)
    tenths = DECILES * before / max(frequency_V.sum(), 1e-300)
    # Sums of shares are a little off. A token that begins with a decile belongs to it.
    decile_V[order] = np.minimum(tenths + _ROUNDING, DECILES - 1).astype(np.int32)
    return decile_V


def means_by_decile(
    pairs_V2: np.ndarray, frequency_V: np.ndarray
) -> list[float | None]:
    """`decile_means` from the (sum, number of targets) of each token id.

    Tokens at the end of the vocabulary may be left out of `pairs_V2`.
    """
    decile_V = frequency_deciles(frequency_V)[: len(pairs_V2)]
    pairs_E2 = np.zeros((DECILES, 2))
    np.add.at(pairs_E2, decile_V, pairs_V2)
    return decile_means(pairs_E2)


def decile_means(pairs_E2: np.ndarray) -> list[float | None]:
    """Means from the (sum, number of targets) of each decile; None without targets."""
    return [float(total / n) if n else None for total, n in pairs_E2]
