"""Kernels for Pallas's Triton backend, which a future JAX may lack."""
