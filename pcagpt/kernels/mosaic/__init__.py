"""Kernels for Pallas's Mosaic GPU backend, for Hopper and newer GPUs."""
