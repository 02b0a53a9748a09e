"""Devices: `placement` puts arrays on a mesh, `inside` serves computations on it."""
