"""Pallas kernels for NVIDIA GPUs, each with a plain form where it is used.

On a CPU they are interpreted: slow, and good for testing.
"""

from pcagpt.kernels.launch import are_available

__all__ = ["are_available"]
