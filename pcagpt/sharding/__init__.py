"""Sharding: `placement` puts arrays on a mesh; computations on it use `inside`."""
