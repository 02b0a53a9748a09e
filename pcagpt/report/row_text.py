"""The name of a compressed table, and its size in words."""

import math

from pcagpt.methods import CODES, RIVALS
from pcagpt.report.compare import INTERVAL
from pcagpt.report.text import count, fixed, signed, with_interval
from pcagpt.rows import Row, Stored


def full_name(row: Stored) -> str:
    """The name of a row's table, with its rank: 'context, 12 bands, k=128'."""
    rank = f", k={row.rank}" if row.rank else ""
    return row_name(row.method, row.bands, row.bits) + rank


def table_name(method: str, bands: str, bits: int = 32) -> str:
    """Joins the parts of a name that apply: 'context, 12 bands, int8'."""
    if method in RIVALS:
        return RIVALS[method].name.format(bits=bits)
    rounding = f"int{bits}" if 0 < bits < 32 else ""
    return ", ".join(filter(None, [method, bands, rounding]))


def row_name(method: str, bands: int, bits: int = 32) -> str:
    """The name of a row's table."""
    return table_name(method, f"{bands} bands" if bands > 1 else "", bits)


def of_rank(rank: int) -> str:
    """The name of a rank, 0 for full width."""
    return f"rank {rank}" if rank else "full width"


def size_text(row: Stored, table: tuple[int, int]) -> str:
    """Describes the size of a row for a table [V, D], in two lines."""
    bands = ", ".join(
        f"{size} tokens" + ("" if row.method in CODES else f" at {of_rank(rank)}")
        for size, rank in zip(row.band_sizes, row.band_ranks, strict=True)
    )
    bits = 8 * row.bytes / math.prod(table)
    return (
        f"{row_name(row.method, row.bands, row.bits)}: {count(row.params)} numbers in "
        f"{count(row.bytes)} bytes, {fixed(bits, 2)} bits for each of D's table\n"
        f"bands: {bands}"
    )


def advice_text(row: Row, table: tuple[int, int]) -> str:
    """Describes the choice for a table [V, D] in a few lines for the terminal."""
    known = row.predicted_loss
    predicted = "" if known is None else f"{signed(known, 4)} predicted, "
    return (
        f"{size_text(row, table)}\n"
        f"added loss: {predicted}"
        f"{with_interval(row.added_loss, row.added_loss_interval)} measured, in nats "
        f"per token (±: {INTERVAL})"
    )
