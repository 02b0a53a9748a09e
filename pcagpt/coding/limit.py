"""The rate-distortion line of Gaussian coefficients: a reference for coded tables.

Shape letters: V vocabulary, R = min(V, D) directions.
"""

import numpy as np

from pcagpt.factorization import Weighting, solve

MOST_BITS = 8  # for each number of the table: the line ends there


def gaussian_limit(
    table_VD: np.ndarray, weighting: Weighting
) -> list[tuple[float, float]]:
    """Points (bytes, `second_order_loss`) of the line, by reverse water-filling.

    Coefficient i of token v counts as an independent Gaussian. Its variance, times the
    weight of the token, is s = p_v lambda_i, where lambda_i is the mean energy of the
    direction. At a level L it gets max(0, log2(s / L) / 2) bits and costs min(s, L) / 2
    (Cover and Thomas 2006, section 10.3). From point to point, L falls by half. It
    ignores the weighting's contexts.
    """
    weights_V = weighting.token_weights
    weights_V = np.ones(len(table_VD)) if weights_V is None else np.sort(weights_V)
    weights_V = weights_V[::-1][: np.count_nonzero(weights_V)]
    spectrum = solve(table_VD, weighting._replace(contexts=None)).singular_values
    energy_R = spectrum[spectrum > 0].astype(np.float64) ** 2 / weights_V.sum()
    # Over the n tokens of greatest weight, for n = 0, 1, ...: sums of log2 p, and of p.
    bits_V = np.cumsum([0, *np.log2(weights_V)])
    mass_V = np.cumsum([0, *weights_V])
    points, level = [], weights_V[0] * energy_R.max(initial=0)
    while level > 0:
        count_R = np.searchsorted(-weights_V, -level / energy_R)  # of tokens above it
        bits = (count_R * np.log2(energy_R / level) + bits_V[count_R]).sum() / 2
        if bits > MOST_BITS * table_VD.size:
            break
        below_R = mass_V[-1] - mass_V[count_R]
        points.append((bits / 8, (count_R * level + energy_R * below_R).sum() / 2))
        level /= 2
    return [(float(size), float(loss)) for size, loss in points]
