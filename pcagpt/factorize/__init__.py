"""Low-rank factorization of a token table: arrays in, arrays out."""

from pcagpt.factorize.bands import (
    allocate_ranks,
    banded,
    budget_of_rank,
    frequency_bands,
)
from pcagpt.factorize.controls import CONTROLS, control
from pcagpt.factorize.methods import METHODS, Statistics, Weighting, needs_statistics
from pcagpt.factorize.predict import Predictor, SecondOrder
from pcagpt.factorize.solve import (
    Factors,
    by_method,
    effective_rank,
    energy_kept,
    solve,
    table_of_rank,
    truncate,
)
from pcagpt.factorize.table import BandFactors, FactorizedTable

__all__ = [
    "CONTROLS",
    "METHODS",
    "BandFactors",
    "FactorizedTable",
    "Factors",
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
    "solve",
    "table_of_rank",
    "truncate",
]
