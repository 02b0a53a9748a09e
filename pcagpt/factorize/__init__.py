"""Low-rank factorization of a token table: arrays in, arrays out."""

from pcagpt.factorize.bands import (
    BudgetTooSmall,
    Factorizer,
    budget_of_rank,
    least_budget,
)
from pcagpt.factorize.controls import CONTROLS, control
from pcagpt.factorize.predict import (
    SMALLEST_ADDED,
    LossRegression,
    Predictor,
    SecondOrder,
    second_order_loss,
)
from pcagpt.factorize.product import product_quantize
from pcagpt.factorize.quantize import gptq, quantize
from pcagpt.factorize.solve import (
    effective_rank,
    energy_kept,
    solve,
)
from pcagpt.factorize.table import (
    FLOAT_BYTES,
    BandFactors,
    FactorizedTable,
)
from pcagpt.methods import Statistics, Weighting
