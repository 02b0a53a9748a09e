"""Low-rank factorization of a token table: arrays in, arrays out."""

from pcagpt.factorize.bands import (
    BandedTable,
    allocate_ranks,
    banded,
    budget_of_rank,
    frequency_bands,
    single_band,
)
from pcagpt.factorize.controls import CONTROLS, control
from pcagpt.factorize.methods import METHODS, Statistics, Weighting, needs_statistics
from pcagpt.factorize.predict import Predictor, SecondOrder
from pcagpt.factorize.solve import (
    Factors,
    LowRank,
    by_method,
    effective_rank,
    energy_kept,
    solve,
    truncate,
)

__all__ = [
    "CONTROLS",
    "METHODS",
    "BandedTable",
    "Factors",
    "LowRank",
    "Predictor",
    "SecondOrder",
    "Statistics",
    "Weighting",
    "allocate_ranks",
    "banded",
    "budget_of_rank",
    "by_method",
    "control",
    "effective_rank",
    "energy_kept",
    "frequency_bands",
    "needs_statistics",
    "single_band",
    "solve",
    "truncate",
]
