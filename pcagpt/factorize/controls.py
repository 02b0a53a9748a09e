"""Controls of a factorized table: random tables that share one thing with it.

Whether a model gains from the directions of another's table, or only from their scale,
is seen by training it from these instead. Shape letters: V rows, D width, K rank.
"""

from collections.abc import Callable

import numpy as np


def _std(wte_VK, scale_KD, random):
    """Gaussian factors of the same root mean squares, and so the product's, too."""
    return tuple(
        random.normal(scale=np.sqrt(np.mean(np.square(factor))), size=factor.shape)
        for factor in (wte_VK, scale_KD)
    )


def _spectrum(wte_VK, scale_KD, random):
    """Random orthonormal bases on both sides, with the product's singular values."""
    rank = wte_VK.shape[1]
    # Of the product, by way of two small triangles.
    singular_R = np.linalg.svd(
        np.linalg.qr(wte_VK, "r") @ np.linalg.qr(scale_KD.T, "r").T, compute_uv=False
    )
    left_VR, right_DR = (
        np.linalg.qr(random.normal(size=(length, len(singular_R))))[0]
        for length in (len(wte_VK), scale_KD.shape[1])
    )
    # The scale's rows keep their lengths: they decide how training moves.
    length_R = np.linalg.norm(scale_KD, axis=1)[: len(singular_R)]
    wte, scale = left_VR * (singular_R / length_R), right_DR.T * length_R[:, None]
    missing = rank - len(singular_R)  # Of a band with fewer tokens than its rank.
    return np.pad(wte, ((0, 0), (0, missing))), np.pad(scale, ((0, missing), (0, 0)))


def _rows(wte_VK, scale_KD, random):
    """The same rows, each at another token."""
    return random.permutation(wte_VK), scale_KD


CONTROLS: dict[str, Callable] = {"std": _std, "spectrum": _spectrum, "rows": _rows}


def control(
    wte_VK: np.ndarray,
    scale_KD: np.ndarray | None,
    keep: str,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Random factors that keep the 'std', the 'spectrum' or the 'rows' of others.

    Args:
      wte_VK: the table of a band, without padding rows.
      scale_KD: its scale matrix; None for a band at full width, whose rows are then
        taken for factors of a scale matrix of ones on the diagonal.
      keep: a name in `CONTROLS`.
      random: where the rest comes from.

    Returns:
      A table and scale matrix of the same shapes, float32.
    """
    if scale_KD is None:
        wte, scale = CONTROLS[keep](wte_VK, np.eye(wte_VK.shape[1]), random)
        return (wte @ scale if keep == "spectrum" else wte).astype(np.float32), None
    wte, scale = CONTROLS[keep](wte_VK, scale_KD, random)
    return wte.astype(np.float32), scale.astype(np.float32)
