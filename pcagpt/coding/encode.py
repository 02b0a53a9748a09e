"""Codes a table at one step: chooses directions and classes; makes basis and symbols.

Shape letters: V vocabulary, D model width, K directions, C classes, N sampled tokens, n
those of one class.

A direction is coded only if it removes at least `BIT` squared steps of error for each
bit that it takes. The basis is rounded at the same price.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from pcagpt.array_files import check_values
from pcagpt.coding.basis import quantize_basis
from pcagpt.coding.payload import to_words
from pcagpt.coding.quantize import (
    LARGEST_SYMBOL,
    SMALLEST_WEIGHT,
    class_steps,
    step_classes,
    symbols_of,
)
from pcagpt.coding.table import CodedTable
from pcagpt.coding.transform import (
    Coefficients,
    coefficient_chunks,
    coefficients,
    karhunen_loeve,
    mean_row,
)
from pcagpt.errors import UserError
from pcagpt.factorization import Weighting

# Squared steps of error that one bit must remove: 2 ln 2 / 12 at small steps, a little
# more at large ones.
BIT = 0.13
# Step of the basis in a direction of unit energy. The factor 1.4 was measured.
# Coefficients are computed from the rounded basis and compensate a part of its error.
# With 1.4 instead of 1, the loss at equal bytes is 1 to 4 % lower.
BASIS_STEP = np.sqrt(BIT * 12 / (2 * np.log(2))) * 1.4
INDEX_BITS = 8  # of the indices of one distribution
SAMPLE = 8192  # tokens from which choices and estimates are made
SMALLEST_SAMPLE = 64  # tokens of a class
COUNTERS = 2**20  # of symbols, in memory at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What does not depend on the step."""

    table_VD: np.ndarray
    weighting: Weighting
    weights_V: np.ndarray  # relative to their mean, none near zero
    mean_weight: float
    classes_V: np.ndarray  # [V] int8, of `step_classes`
    synthesis_DD: np.ndarray
    tokens_N: np.ndarray  # a sample that holds all classes
    shares_N: np.ndarray  # number of tokens that each of the sample stands for
    sampled: Coefficients  # [D, N]
    # {bands: `packed.choices`}; kept here, so that they go with the table.
    choices: dict[int, Any] = dataclasses.field(default_factory=dict)

    @property
    def steps_N(self) -> np.ndarray:
        """Relative steps of the sample."""
        return class_steps(self.classes_V[self.tokens_N], 1.0)

    @functools.cached_property
    def _largest_value(self) -> float:
        """The largest sampled value in relative steps; 1 if all are zero."""
        return float((np.abs(self.sampled.values) / self.steps_N).max()) or 1.0

    @property
    def largest_step(self) -> float:
        """A step at which all symbols are zero."""
        return 64 * self._largest_value

    @property
    def smallest_step(self) -> float:
        """The step at which the largest sampled value has the largest symbol."""
        return self._largest_value / LARGEST_SYMBOL


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step leads to, estimated from the sample."""

    bits: float  # of the words
    loss: float  # of `second_order_loss`, without the error of the basis
    kept_DC: np.ndarray  # whether the symbols of a class in a direction are coded
    # For each direction, the sum of squared symbols, each times its token's weight and
    # squared relative step.
    energy_D: np.ndarray


def prepare(table_VD: np.ndarray, weighting: Weighting) -> Prepared:
    """Finds directions and classes; UserError for what cannot be coded.

    Args:
      table_VD: floating point, finite.
      weighting: of any method.
    """
    check_values(table_VD, "the table to code")
    weights_V = weighting.token_weights
    if weights_V is None:
        weights_V = np.ones(len(table_VD))
    mean_weight = float(weights_V.mean())
    if not (0 < mean_weight < np.inf and weights_V.min() >= 0):
        raise UserError(
            f"the weights of the tokens lie in {weights_V.min()} to {weights_V.max()}: "
            "they must be finite, not negative and not all zero; measure the "
            "statistics of the model again"
        )
    weights_V = np.maximum(weights_V / mean_weight, SMALLEST_WEIGHT)
    classes_V = step_classes(weights_V)
    synthesis_DD = karhunen_loeve(table_VD, weighting)
    tokens_N, shares_N = _sample(classes_V)
    contexts_VD = weighting.contexts
    part = weighting._replace(
        contexts=None if contexts_VD is None else contexts_VD[tokens_N]
    )
    mean_D = mean_row(weighting, table_VD.shape[1])
    sampled = coefficients(table_VD[tokens_N], part, synthesis_DD, mean_D)
    return Prepared(
        table_VD, weighting, weights_V, mean_weight, classes_V, synthesis_DD,
        tokens_N, shares_N, sampled,
    )  # fmt: skip


def estimate(prepared: Prepared, step: float) -> Estimate:
    """Estimates what a step leads to, and chooses what is coded."""
    classes_N = prepared.classes_V[prepared.tokens_N]
    names_C, place_N = np.unique(classes_N, return_inverse=True)
    steps_N = class_steps(classes_N, step)
    weights_N = prepared.weights_V[prepared.tokens_N] * prepared.shares_N
    cost_N = weights_N * prepared.steps_N**2  # of a squared error of one step
    values_DN = prepared.sampled.values
    count, width = len(names_C), len(values_DN)

    def bits_and_energy(symbols_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bits_DC, energy_DC = np.empty((2, width, count))
        for c in range(count):
            (tokens_n,) = np.nonzero(place_N == c)
            symbols_Dn = symbols_DN[:, tokens_n]
            energy_DC[:, c] = np.square(symbols_Dn, dtype=np.float32) @ cost_N[tokens_n]
            share = prepared.shares_N[tokens_n[0]]
            bits_DC[:, c] = share * _entropy_bits(symbols_Dn) + INDEX_BITS
        return bits_DC, energy_DC

    # Without contexts, symbols do not depend on what else is coded.
    symbols_DN = symbols_of(Coefficients(values_DN, None, None), steps_N)
    bits_DC, energy_DC = bits_and_energy(symbols_DN)
    # y^2 - (y - n)^2 = 2 y n - n^2: the error that a symbol n for y removes.
    products_DN = 2 * values_DN * (cost_N / steps_N).astype(np.float32) * symbols_DN
    gain_DC = np.stack(
        [products_DN[:, place_N == c].sum(axis=1) for c in range(count)], axis=1
    )
    surplus_DC = gain_DC - energy_DC - BIT * bits_DC
    kept_DC = surplus_DC > 0
    basis_D = _basis_bits(width, (energy_DC * kept_DC).sum(axis=1))
    kept_DC &= ((surplus_DC * kept_DC).sum(axis=1) > BIT * basis_D)[:, None]

    symbols_DN = symbols_of(prepared.sampled, steps_N, kept_DC[:, place_N])
    bits_DC, energy_DC = bits_and_energy(symbols_DN)
    energy_D, bits = energy_DC.sum(axis=1), bits_DC[kept_DC].sum()
    bits += _basis_bits(width, energy_D)[kept_DC.any(axis=1)].sum()
    error_DN = symbols_DN * steps_N.astype(np.float32) - values_DN
    loss_N = np.einsum("dn,dn->n", error_DN, error_DN)
    if prepared.sampled.contexts is not None:
        logit_N = np.einsum("dn,dn->n", error_DN, prepared.sampled.contexts)
        loss_N = loss_N + (logit_N + prepared.sampled.left_out) ** 2
    loss = prepared.mean_weight * float(weights_N @ loss_N) / 2
    return Estimate(float(bits), loss, kept_DC, energy_D)


def encode(prepared: Prepared, step: float) -> tuple[CodedTable, np.ndarray]:
    """The coded table at a step, and its words."""
    table_VD, weighting = prepared.table_VD, prepared.weighting
    found = estimate(prepared, step)
    (chosen_K,) = np.nonzero(found.kept_DC.any(axis=1))
    mean_D = mean_row(weighting, table_VD.shape[1])
    # Every token uses the mean with coefficient 1, which is 1 / step in steps.
    energy_K = np.append(found.energy_D[chosen_K], len(table_VD) / step**2)
    basis = quantize_basis(
        np.vstack([prepared.synthesis_DD[chosen_K], mean_D]),
        weighting.metric,
        BASIS_STEP / np.sqrt(np.maximum(energy_K, 1)),
    )
    *synthesis_KD, mean_D = basis.dense()
    synthesis_KD = np.reshape(synthesis_KD, (-1, len(mean_D)))
    place_V = np.unique(prepared.classes_V, return_inverse=True)[1]
    steps_V, kept_KC = class_steps(prepared.classes_V, step), found.kept_DC[chosen_K]
    symbols_KV = np.empty((len(chosen_K), len(table_VD)), np.int16)
    # Rows do not depend on each other. Coefficients take twice the table's memory.
    for rows, part in coefficient_chunks(table_VD, weighting, synthesis_KD, mean_D):
        kept_Kn = kept_KC[:, place_V[rows]]
        symbols_KV[:, rows] = symbols_of(part, steps_V[rows], kept_Kn)
    coded = CodedTable(symbols_KV, prepared.classes_V, step, basis)
    return coded, to_words(coded)


def _sample(classes_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced tokens of each class, and how many tokens each stands for."""
    found, shares = [], []
    for name in np.unique(classes_V):
        (tokens,) = np.nonzero(classes_V == name)
        wanted = max(SMALLEST_SAMPLE, len(tokens) * SAMPLE // len(classes_V))
        wanted = min(wanted, len(tokens))
        found.append(tokens[np.arange(wanted) * len(tokens) // wanted])
        shares.append(np.full(wanted, len(tokens) / wanted))
    return np.concatenate(found), np.concatenate(shares)


def _basis_bits(width: int, energy_D: np.ndarray) -> np.ndarray:
    """Estimates the bits of a row of the basis: Gaussian entries of variance 1 / D."""
    levels_D = 2 * np.pi * np.e / width * energy_D / BASIS_STEP**2
    return width / 2 * np.log2(1 + levels_D)


def _entropy_bits(symbols_Dn: np.ndarray) -> np.ndarray:
    """Bits of each row at its empirical entropy, with Miller and Madow's correction."""
    used = np.flatnonzero(symbols_Dn.any(axis=1))
    bits_D, count = np.zeros(len(symbols_Dn)), symbols_Dn.shape[1]
    lowest = int(symbols_Dn.min(initial=0))
    width = int(symbols_Dn.max(initial=0)) - lowest + 1
    together = max(1, COUNTERS // width)
    for rows in np.split(used, range(together, len(used), together)):
        places_Rn = symbols_Dn[rows] + (np.arange(len(rows)) * width - lowest)[:, None]
        counts = np.bincount(places_Rn.ravel(), minlength=len(rows) * width)
        counts = counts.reshape(len(rows), width)
        bits = -(counts * np.log2(np.maximum(counts, 1) / count)).sum(axis=1)
        bits_D[rows] = bits + ((counts > 0).sum(axis=1) - 1) / (2 * np.log(2))
    return bits_D
