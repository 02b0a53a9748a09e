"""Slices of rows, so that only a few rows need memory for their intermediate values."""

from collections.abc import Iterator

CHUNK = 4096  # rows at a time


def chunks(rows: int) -> Iterator[slice]:
    """Slices that cover some rows."""
    return (slice(start, start + CHUNK) for start in range(0, rows, CHUNK))
