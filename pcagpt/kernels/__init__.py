"""Pallas kernels for NVIDIA GPUs; the code that uses one also has a plain form of it.

A CPU interprets the kernels, which is slow and serves tests.
"""

from pcagpt.kernels.launch import are_available

__all__ = ["are_available"]
