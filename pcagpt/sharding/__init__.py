"""Sharding: `processes` run a command, `placement` puts arrays on their mesh.

Computations on the mesh use `inside`.
"""
