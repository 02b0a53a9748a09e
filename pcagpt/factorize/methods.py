"""Which errors of a token table count, and how much: the factorization methods.

Shape letters: V vocabulary, D model width. A method turns the table W [V, D] and
statistics of the model that it belongs to into a `Weighting`: weights of tokens and a
metric of directions, which `low_rank.solve` minimises under.

The loss that an error E [V, D] of the table adds is, to second order (nats per token),

    head    1/2 sum_v p_v E_v C E_v'     p_v: mean predicted probability of the token,
                                         C: second moment of the output of ln_f
    input   1/2 sum_v f_v E_v G E_v'     f_v: frequency of the token,
                                         G: second moment of the embedding's gradient
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Tokens that calibration hardly saw keep this share of the mean weight.
SMOOTHING = 0.1
# Of the identity in the metric of 'joint', against the second moment of ln_f's output.
INPUT_SHARE = 0.3


class Statistics(NamedTuple):
    """What a model does on calibration text; float64.

    frequency: [V], share of the training split's tokens.
    probability: [V], mean predicted probability.
    hidden_mean, hidden_moment: [D], [D, D] of h, the output of ln_f: E[h], E[h h'].
    gradient_moment: [D, D], E[g g'] of the loss gradient g of a token's embedding, the
      next tokens drawn from the model (Fisher information of the input side).
    context_moment: [D, D], E[h e'], e the mean table row under the prediction from h.
    """

    frequency: np.ndarray
    probability: np.ndarray
    hidden_mean: np.ndarray
    hidden_moment: np.ndarray
    gradient_moment: np.ndarray
    context_moment: np.ndarray


class Weighting(NamedTuple):
    """Under what a table is approximated; None stands for what is not weighted.

    token_weights: [V] or None (all the same).
    metric: [D, D] symmetric, or None (the identity).
    mean: [D], subtracted from every row first, or None.
    contexts: [V, D] or None: the hidden state in which each token is predicted, less
      the overall mean; rows are then refitted to keep their logits there.
    """

    token_weights: np.ndarray | None = None
    metric: np.ndarray | None = None
    mean: np.ndarray | None = None
    contexts: np.ndarray | None = None


def _svd(table_VD, statistics):
    """Best in Frobenius norm (Eckart and Young 1936); what the original calls PCA."""
    return Weighting()


def _pca(table_VD, statistics):
    """Principal components: the same after subtracting the mean row."""
    return Weighting(mean=table_VD.mean(axis=0, dtype=np.float64))


def _freq(table_VD, statistics):
    """Tokens by frequency."""
    return _centred(table_VD, statistics.frequency)


def _sqrt_freq(table_VD, statistics):
    """Tokens by the root of their frequency."""
    return _centred(table_VD, np.sqrt(statistics.frequency))


def _hidden(table_VD, statistics):
    """Directions by what the head reads, tokens alike."""
    weights_V = np.ones(len(table_VD))
    return _centred(table_VD, weights_V, statistics.hidden_moment)


def _kl(table_VD, statistics):
    """The head's second-order KL divergence."""
    return _centred(table_VD, _smoothed(statistics), statistics.hidden_moment)


def _joint(table_VD, statistics):
    """As 'kl', with the identity in place of the input side's curvature."""
    moment_DD, width = statistics.hidden_moment, table_VD.shape[1]
    metric_DD = moment_DD / np.trace(moment_DD) + INPUT_SHARE * np.eye(width) / width
    return _centred(table_VD, _smoothed(statistics), metric_DD)


def _fisher(table_VD, statistics):
    """Head and input to second order: both Fisher informations, in nats."""
    metric_DD = statistics.hidden_moment + statistics.gradient_moment
    return _centred(table_VD, _smoothed(statistics), metric_DD)


def _context(table_VD, statistics):
    """As 'fisher', and each row keeps its logit where the model predicts its token."""
    weighting = _fisher(table_VD, statistics)
    return weighting._replace(contexts=token_contexts(table_VD, statistics))


METHODS: dict[str, Callable[[np.ndarray, Statistics | None], Weighting]] = {
    "svd": _svd,
    "pca": _pca,
    "freq": _freq,
    "sqrt_freq": _sqrt_freq,
    "hidden": _hidden,
    "kl": _kl,
    "joint": _joint,
    "fisher": _fisher,
    "context": _context,
}


def needs_statistics(method: str) -> bool:
    """Whether a method reads what the model does on calibration text."""
    return method not in ("svd", "pca")


def token_contexts(table_VD: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Mean hidden state in which each token is predicted, less the overall one: [V, D].

    By the least-squares linear map from rows, E[h | v] - E[h] = T (w_v - w) with
    T = cov(h, e) cov(w)^-1, tokens weighted by their probability.
    """
    share_V = statistics.probability / statistics.probability.sum()
    mean_D = share_V @ table_VD
    rows_VD = table_VD - mean_D
    spread_DD = (rows_VD * share_V[:, None]).T @ rows_VD
    ridge = 1e-6 * np.trace(spread_DD) / len(mean_D)
    cross_DD = statistics.context_moment - np.outer(statistics.hidden_mean, mean_D)
    map_DD = np.linalg.solve(spread_DD + ridge * np.eye(len(mean_D)), cross_DD.T)
    return rows_VD @ map_DD


def _smoothed(statistics: Statistics) -> np.ndarray:
    probability_V = statistics.probability
    return probability_V + SMOOTHING * probability_V.mean()


def _centred(table_VD, weights_V, metric_DD=None) -> Weighting:
    """With the weighted mean row subtracted."""
    total = weights_V.sum()
    mean_D = weights_V @ table_VD / total if total > 0 else np.zeros(table_VD.shape[1])
    return Weighting(weights_V, metric_DD, mean_D)
