"""Control experiments: random factors that keep one property of a factorized table.

Training from them shows whether a model gains from the directions of an imported table,
or only from the scale of its factors.

Shape letters: V rows, D width, K rank, R = min(V, K).
"""

from collections.abc import Callable

import numpy as np

from pcagpt.errors import UserError


def _std(wte_VK, scale_KD, random):
    """Gaussian factors of mean 0 with the same root mean squares."""

    def gaussian(factor):
        size = np.sqrt(np.mean(np.square(factor)))
        return random.normal(scale=size, size=factor.shape)

    return gaussian(wte_VK), None if scale_KD is None else gaussian(scale_KD)


def _spectrum(wte_VK, scale_KD, random):
    """Random orthonormal bases on both sides, with the product's singular values."""
    if scale_KD is None:
        return np.matmul(*_spectrum(wte_VK, np.eye(wte_VK.shape[1]), random)), None
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
    if not length_R.all():
        raise UserError(
            "a scale matrix has a row of zeros, so that it cannot get A's spectrum: "
            "factorize the table again, with a lower rank"
        )
    wte, scale = left_VR * (singular_R / length_R), right_DR.T * length_R[:, None]
    missing = rank - len(singular_R)  # positive if a band has fewer tokens than K
    return np.pad(wte, ((0, 0), (0, missing))), np.pad(scale, ((0, missing), (0, 0)))


def _rows(wte_VK, scale_KD, random):
    """The same rows, assigned to other tokens."""
    return random.permutation(wte_VK), scale_KD


# Each takes (wte [V, K], scale [K, D] or None in a band at full width, generator) and
# returns new factors of these shapes.
CONTROLS: dict[str, Callable] = {"std": _std, "spectrum": _spectrum, "rows": _rows}


def control(
    wte_VK: np.ndarray,
    scale_KD: np.ndarray | None,
    keep: str,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Random float32 factors of the same shapes that keep one property.

    `keep` is a key of `CONTROLS`. `wte_VK` has no padding rows. A band at full width
    has no scale.
    """
    wte, scale = CONTROLS[keep](wte_VK, scale_KD, random)
    return wte.astype(np.float32), None if scale is None else scale.astype(np.float32)
