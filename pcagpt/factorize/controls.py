"""Control experiments: random factors that keep one property of a factorized table.

Training from them shows whether a model gains from the directions of another model's
table or only from their scale. Shape letters: V rows, D model width, K rank.
"""

from collections.abc import Callable

import numpy as np


def _std(wte_VK, scale_KD, random):
    """Gaussian factors with the same root mean squares, so also that of the product."""
    return tuple(
        random.normal(scale=np.sqrt(np.mean(np.square(factor))), size=factor.shape)
        for factor in (wte_VK, scale_KD)
    )


def _spectrum(wte_VK, scale_KD, random):
    """Random orthonormal bases on both sides, with the product's singular values."""
    rank = wte_VK.shape[1]
    # QR first: the SVD is then of a K x K matrix instead of V x D.
    singular_R = np.linalg.svd(
        np.linalg.qr(wte_VK, "r") @ np.linalg.qr(scale_KD.T, "r").T, compute_uv=False
    )
    left_VR, right_DR = (
        np.linalg.qr(random.normal(size=(length, len(singular_R))))[0]
        for length in (len(wte_VK), scale_KD.shape[1])
    )
    # The rows of scale keep their lengths, which decide how training moves them.
    length_R = np.linalg.norm(scale_KD, axis=1)[: len(singular_R)]
    wte, scale = left_VR * (singular_R / length_R), right_DR.T * length_R[:, None]
    missing = rank - len(singular_R)  # More than 0 if a band has fewer tokens than K.
    return np.pad(wte, ((0, 0), (0, missing))), np.pad(scale, ((0, missing), (0, 0)))


def _rows(wte_VK, scale_KD, random):
    """The same rows, assigned to other tokens."""
    return random.permutation(wte_VK), scale_KD


CONTROLS: dict[str, Callable] = {"std": _std, "spectrum": _spectrum, "rows": _rows}


def control(
    wte_VK: np.ndarray,
    scale_KD: np.ndarray | None,
    keep: str,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Makes random factors that keep the 'std', the 'spectrum' or the 'rows'.

    Args:
      wte_VK: the table of a band, without padding rows.
      scale_KD: its scale matrix; None for a band at full width, which counts as the
        factor of an identity matrix.
      keep: a name in `CONTROLS`.
      random: the source of randomness.

    Returns:
      A table and scale matrix of the same shapes, float32.
    """
    if scale_KD is None:
        wte, scale = CONTROLS[keep](wte_VK, np.eye(wte_VK.shape[1]), random)
        return (wte @ scale if keep == "spectrum" else wte).astype(np.float32), None
    wte, scale = CONTROLS[keep](wte_VK, scale_KD, random)
    return wte.astype(np.float32), scale.astype(np.float32)
