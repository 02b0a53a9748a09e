"""Constants of the kernels of both backends."""

import math

LOG2_E = math.log2(math.e)  # Kernels use exp2, the GPU's own instruction.
# The tanh form of GELU (Hendrycks and Gimpel 2016) is x * sigmoid(2 * u(x)) with
# u(x) = sqrt(2 / pi) * (x + 0.044715 * x**3).
TWICE_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
CUBIC = 0.044715
