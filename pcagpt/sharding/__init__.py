"""Sharding, in three modules.

`processes`: their start, end and agreement; `placement`: the mesh, and where arrays are
stored; `inside`: helpers for code that runs on the mesh.
"""
