"""The weighting under which a coded table keeps a model's loss.

Shape letters: V vocabulary, D model width.
"""

import numpy as np

from pcagpt.factorization import Statistics, Weighting
from pcagpt.methods import METHODS

# Part of a sweep's protocol: raise it when codes of the same statistics would change.
CODES_VERSION = 2
# All four were chosen by the loss and the KL divergence that coded tables add to a
# GPT-2 small and to SmolLM2-135M on WikiText-103's validation split; see TRIED.md.
INPUT_WEIGHT = 2.0  # second order underestimates what errors of the input cost
# Share of the frequency in a token's weight; the rest is its mean predicted
# probability.
FREQUENCY_SHARE = 0.5
SMOOTHING = 0.005  # share of the mean weight; factors have that of `pcagpt.methods`
# Power of the weights. Second order underestimates the large errors of rare tokens: a
# logit that is too high adds to the probability exponentially.
POWER = 0.65


def loss_weighting(table_VD: np.ndarray, statistics: Statistics) -> Weighting:
    """The weighting of 'context' with the four constants above.

    Args:
      table_VD: the model's table, floating point.
      statistics: of the same model.
    """
    weighting = METHODS["context"].weigh(table_VD, statistics)
    weights_V = (1 - FREQUENCY_SHARE) * statistics.probability
    weights_V = weights_V + FREQUENCY_SHARE * statistics.frequency
    weights_V = weights_V + SMOOTHING * weights_V.mean()
    power_V = weights_V**POWER
    weights_V = power_V * (weights_V.sum() / power_V.sum())
    metric_DD = statistics.hidden_moment + INPUT_WEIGHT * statistics.gradient_moment
    return weighting._replace(token_weights=weights_V, metric=metric_DD)
