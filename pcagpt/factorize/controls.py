"""Control experiments: random factors that keep one property of a factorized table.

Training from them shows whether a model gains from the directions of an imported table,
or only from the scale of its factors.

Shape letters: V rows, D width, K rank, R = min(V, K).
"""

from collections.abc import Callable

import numpy as np


def _std(wte_VK, scale_KD, random):
    """Gaussian factors with the same root mean squares."""
    return tuple(
        random.normal(scale=np.sqrt(np.mean(np.square(factor))), size=factor.shape)
        for factor in (wte_VK, scale_KD)
    )


def _spectrum(wte_VK, scale_KD, random):
    """Random orthonormal bases on both sides, with the product's singular values."""
    rank = wte_VK.shape[1]
    # QR reduces the SVD from a V x D to a K x K matrix.
    singular_R = np.linalg.svd(
        np.linalg.qr(wte_VK, "r") @ np.linalg.qr(scale_KD.T, "r").T, compute_uv=False
    )
    left_VR, right_DR = (
        np.linalg.qr(random.normal(size=(length, len(singular_R))))[0]
        for length in (len(wte_VK), scale_KD.shape[1])
    )
    # The rows of scale keep their lengths, because training depends on these.
    length_R = np.linalg.norm(scale_KD, axis=1)[: len(singular_R)]
    wte, scale = left_VR * (singular_R / length_R), right_DR.T * length_R[:, None]
    missing = rank - len(singular_R)  # positive if a band has fewer tokens than K
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
    """Random float32 factors of the same shapes that keep one property.

    `keep` is a key of `CONTROLS`. `wte_VK` has no padding rows. A band at full width
    (scale None) is treated as the product with an identity matrix.
    """
    is_full = scale_KD is None
    if is_full:
        scale_KD = np.eye(wte_VK.shape[1])
    wte, scale = CONTROLS[keep](wte_VK, scale_KD, random)
    if is_full and keep == "spectrum":
        wte = wte @ scale  # With the other controls, wte alone keeps the property.
    return wte.astype(np.float32), None if is_full else scale.astype(np.float32)
