"""Factorization methods: how much each error of a token table counts.

Also the names and the looks of codes and rivals.

Shape letters: V vocabulary, D model width. A method makes a `Weighting` from a table W
[V, D] and statistics of its model; `solve` minimises the error under this weighting.

To second order, an error E [V, D] of the table adds this loss (nats per token):

    head    1/2 sum_v p_v E_v C E_v'     p_v: mean predicted probability of the token,
                                         C: second moment of the output of ln_f
    input   1/2 sum_v f_v E_v G E_v'     f_v: frequency of the token,
                                         G: second moment of the embedding's gradient
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# This share of the mean probability is added to every token's weight. Without it,
# tokens that are rare in the calibration text would have almost no weight.
SMOOTHING = 0.1
# Weight of the identity in the metric of 'joint'; the hidden states have weight 1.
INPUT_SHARE = 0.3


class Statistics(NamedTuple):
    """Statistics of a model on calibration text, float64; h is the output of ln_f.

    `gradient_moment` is the Fisher information of an input embedding: g is the gradient
    of the loss with respect to it, for targets drawn from the model. e is the mean
    table row under the probabilities that the model predicts from h.
    """

    frequency: np.ndarray  # [V], share of the training split's tokens
    probability: np.ndarray  # [V], mean predicted probability
    hidden_mean: np.ndarray  # [D], E[h]
    hidden_moment: np.ndarray  # [D, D], E[h h']
    gradient_moment: np.ndarray  # [D, D], E[g g']
    context_moment: np.ndarray  # [D, D], E[h e']


class Weighting(NamedTuple):
    """Weights that define the approximation error.

    The context of a token is the mean of the hidden states that predict it, minus the
    mean of all hidden states. If contexts are given, each row is refitted so that the
    token keeps its logit in its context.
    """

    token_weights: np.ndarray | None = None  # [V]; None: all equal
    metric: np.ndarray | None = None  # [D, D] symmetric; None: the identity
    mean: np.ndarray | None = None  # [D], subtracted from every row first
    contexts: np.ndarray | None = None  # [V, D]


@dataclasses.dataclass(frozen=True)
class Method:
    """A factorization method."""

    weigh: Callable[[np.ndarray, Statistics | None], Weighting]  # from a table [V, D]
    words: str  # what it does, for reports
    needs_statistics: bool
    weighs_tokens: bool  # whether it weights tokens; a sweep puts no other into bands
    colour: str  # in figures


def _svd(table_VD, statistics):
    return Weighting()


def _pca(table_VD, statistics):
    return Weighting(mean=table_VD.mean(axis=0, dtype=np.float64))


def _freq(table_VD, statistics):
    return _centred(table_VD, statistics.frequency)


def _sqrt_freq(table_VD, statistics):
    return _centred(table_VD, np.sqrt(statistics.frequency))


def _hidden(table_VD, statistics):
    weights_V = np.ones(len(table_VD))
    return _centred(table_VD, weights_V, statistics.hidden_moment)


def _kl(table_VD, statistics):
    return _centred(table_VD, _smoothed(statistics), statistics.hidden_moment)


def _joint(table_VD, statistics):
    moment_DD, width = statistics.hidden_moment, table_VD.shape[1]
    metric_DD = moment_DD / np.trace(moment_DD) + INPUT_SHARE * np.eye(width) / width
    return _centred(table_VD, _smoothed(statistics), metric_DD)


def _fisher(table_VD, statistics):
    metric_DD = statistics.hidden_moment + statistics.gradient_moment
    return _centred(table_VD, _smoothed(statistics), metric_DD)


def _context(table_VD, statistics):
    weighting = _fisher(table_VD, statistics)
    return weighting._replace(contexts=token_contexts(table_VD, statistics))


# The best method comes last: a sweep tries it in more ways. Colour-blind readers can
# tell the colours apart (Okabe and Ito 2008). Grey methods serve for comparison.
METHODS = {
    "svd": Method(
        _svd,
        "Smallest error in Frobenius norm (Eckart and Young 1936)",
        False,
        False,
        "#d55e00",
    ),
    "pca": Method(
        _pca,
        "Principal components: SVD after subtracting the mean row",
        False,
        False,
        "#c8c8c8",
    ),
    "freq": Method(_freq, "Weights tokens by frequency", True, True, "#b0b0b0"),
    "sqrt_freq": Method(
        _sqrt_freq,
        "Weights tokens by the square root of their frequency",
        True,
        True,
        "#989898",
    ),
    "hidden": Method(
        _hidden,
        "Weights directions by the hidden states that the head reads",
        True,
        False,
        "#808080",
    ),
    "kl": Method(_kl, "Second-order KL divergence of the head", True, True, "#e69f00"),
    "joint": Method(
        _joint,
        "Like 'kl', plus the identity as a metric for the input side",
        True,
        True,
        "#56b4e9",
    ),
    "fisher": Method(
        _fisher,
        "Second-order loss of head and input: the sum of both Fisher informations",
        True,
        True,
        "#0072b2",
    ),
    "context": Method(
        _context,
        "Like 'fisher'; each row also keeps its logit in its context",
        True,
        True,
        "#009e73",
    ),
}
# The methods that a bare table is enough for.
FREE = tuple(name for name, method in METHODS.items() if not method.needs_statistics)
FEWEST_FACTOR_BITS = 4  # The product of factors in fewer bits is far from their table.


@dataclasses.dataclass(frozen=True)
class Code:
    """A way to store a table as codes."""

    words: str  # for --help
    colour: str  # in figures


# Ways to store a table as codes, named beside the methods in `compress.methods`. A
# search for a loss tries the first one: its files are smallest.
CODED, PACKED = "coded", "packed"
CODES = {
    CODED: Code("an entropy-coded file", "#222222"),
    PACKED: Code("codes that the model reads in place", "#cc79a7"),
}
OWN_TABLE = "baseline"  # the "method" of D's own table, rounded: D's name in `ARMS`


@dataclasses.dataclass(frozen=True)
class Rival:
    """A plain way to store a model's own table in few bits, as a sweep shows it."""

    name: str  # with {bits}
    title: str  # of all its tables, in figures
    words: str  # what it does
    colour: str
    marker: str  # a shape of Vega


# What compressed tables have to beat. `pcagpt.compression.rivals` makes them.
RIVALS = {
    OWN_TABLE: Rival(
        "D's table, int{bits}",
        "D's table, rounded",
        "each number rounded to few bits; the numbers of a group share a scale",
        "#7a7a7a",
        "triangle-down",
    ),
    "gptq": Rival(
        "D's table, GPTQ, int{bits}",
        "D's table, GPTQ",
        "rounded column by column; later columns make up for the errors of earlier "
        "ones (Frantar et al. 2022)",
        "#4d4d4d",
        "triangle-up",
    ),
    "pq": Rival(
        "D's table, PQ",
        "D's table, PQ",
        "product quantization: short pieces of rows share a codebook "
        "(Jégou et al. 2011)",
        "#a3a3a3",
        "cross",
    ),
}


def token_contexts(table_VD: np.ndarray, statistics: Statistics) -> np.ndarray:
    """The contexts of `Weighting`, estimated as a linear map of the table rows: [V, D].

    By least squares, E[h | v] - E[h] = T (w_v - w) with T = cov(h, e) cov(w)^-1, where
    tokens are weighted by their probability.
    """
    share_V = statistics.probability / statistics.probability.sum()
    mean_D = share_V @ table_VD
    rows_VD = table_VD - mean_D
    spread_DD = (rows_VD * share_V[:, None]).T @ rows_VD
    # The ridge keeps a singular table solvable, also one without any spread.
    ridge = 1e-6 * np.trace(spread_DD) / len(mean_D) or 1.0
    cross_DD = statistics.context_moment - np.outer(statistics.hidden_mean, mean_D)
    map_DD = np.linalg.solve(spread_DD + ridge * np.eye(len(mean_D)), cross_DD.T)
    return rows_VD @ map_DD


def _smoothed(statistics: Statistics) -> np.ndarray:
    probability_V = statistics.probability
    return probability_V + SMOOTHING * probability_V.mean()


def _centred(table_VD, weights_V, metric_DD=None) -> Weighting:
    """A weighting that subtracts the weighted mean row."""
    total = weights_V.sum()
    mean_D = weights_V @ table_VD / total if total > 0 else np.zeros(table_VD.shape[1])
    return Weighting(weights_V, metric_DD, mean_D)
