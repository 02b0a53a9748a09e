"""Pallas kernels for NVIDIA GPUs; their users also have a plain JAX form of each.

A CPU interprets the kernels. That is slow, and only tests do it.
"""

from pcagpt.kernels.launch import are_available
