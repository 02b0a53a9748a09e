"""Pallas kernels for NVIDIA GPUs; their callers also have a plain form of each in JAX.

A CPU interprets the kernels. That is slow, and only tests do it.
"""

from pcagpt.kernels.launch import are_available
