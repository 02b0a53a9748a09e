"""Low-rank factorization of a token table: arrays in, arrays out."""

from pcagpt.factorization.bands import (
    BudgetTooSmall,
    Factorizer,
    budget_of_rank,
    least_budget,
)
from pcagpt.factorization.controls import CONTROLS, control
from pcagpt.factorization.predict import (
    SMALLEST_ADDED,
    LossRegression,
    Predictor,
    SecondOrder,
    second_order_loss,
)
from pcagpt.factorization.product import product_quantize
from pcagpt.factorization.quantize import gptq, quantize
from pcagpt.factorization.solve import (
    effective_rank,
    energy_kept,
    solve,
)
from pcagpt.factorization.table import (
    FLOAT_BYTES,
    BandFactors,
    FactorizedTable,
)
from pcagpt.methods import Statistics, Weighting
