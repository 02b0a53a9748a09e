"""The file of a packed table, `table.npz`, which NumPy alone can read.

    basis         [K, D] int8
    columns       [D] float32
    mean          [D] float32
    levels        float32, of each of `WIDTHS`, one after another
    blocks        [B, widths] uint16, number of blocks of each width in each band
    codes_i       [n, bytes] uint8, of the n tokens of band i
    scales_i      float32, of the directions of band i
    order         [V] int32, token ids, band after band; left out with one band
    description   JSON, the fields of `Description`, padded by spaces

Row v is mean + columns * (scales * levels[codes_v]) @ basis, with the first rows of the
basis; `pcagpt.model.packed` says how codes lie in their bytes.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.array_files import read_npz, write_npz
from pcagpt.coding.file import HEADER_BYTES, REMEDY, Description
from pcagpt.coding.packed import PackedTable
from pcagpt.errors import UserError
from pcagpt.json_files import parse_json, strict
from pcagpt.model import BLOCK_RANK, LEVELS, WIDTHS, PackedBand, SharedArrays


def packed_bytes(table: PackedTable) -> int:
    """Size of the file of a table."""
    file = io.BytesIO()
    np.savez(file, **_arrays(table, Description("")))
    return file.getbuffer().nbytes


def write_packed(path: Path, table: PackedTable, description: Description) -> None:
    """Replaces a file by that of a packed table."""
    write_npz(path, **_arrays(table, description))


def read_packed(path: Path) -> tuple[PackedTable, Description]:
    """The table in a file, and what it says about it; UserError if it is damaged."""
    arrays = read_npz(path)
    try:
        blocks_BW = arrays["blocks"]
        names = [field.name for field in dataclasses.fields(SharedArrays)]
        shared = SharedArrays(**{name: arrays[name] for name in names})
        bands, start = [], 0
        for number, blocks in enumerate(blocks_BW.tolist()):
            # Its codes would have no bytes, so their number would be unlimited.
            if not any(blocks):
                raise ValueError("a band without codes")
            codes, scales = arrays[f"codes_{number}"], arrays[f"scales_{number}"]
            band = PackedBand(codes, scales, shared, tuple(blocks), start, len(codes))
            bands.append(band)
            start += len(codes)
        order_V = arrays.get("order", np.arange(start, dtype=np.int32))
        table = PackedTable(order_V, tuple(bands))
        _check(table)
        description = Description.of(parse_json(arrays["description"].tobytes()))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!s:.80}): {REMEDY}") from None
    return table, description


def _arrays(table: PackedTable, description: Description) -> dict[str, Any]:
    text = json.dumps(strict(dataclasses.asdict(description)), allow_nan=False)
    arrays = {
        **dataclasses.asdict(table.bands[0].shared),
        "blocks": np.array([band.blocks for band in table.bands], np.uint16),
        "description": np.frombuffer(text.encode().ljust(HEADER_BYTES), np.uint8),
    }
    for number, band in enumerate(table.bands):
        arrays |= {f"codes_{number}": band.codes, f"scales_{number}": band.scales}
    return arrays | ({"order": table.order} if len(table.bands) > 1 else {})


def _check(table: PackedTable) -> None:
    """Raises ValueError if the arrays do not fit together."""
    shared, directions = table.bands[0].shared, []
    for band in table.bands:
        row = sum(n * width for n, width in zip(band.blocks, WIDTHS, strict=True))
        directions.append(BLOCK_RANK * sum(band.blocks))
        if band.codes.shape != (band.size, row) or band.codes.dtype != np.uint8:
            raise ValueError("codes that do not fit their blocks")
        if band.scales.shape != (directions[-1],):
            raise ValueError("scales that do not fit their blocks")
    (width,) = shared.mean.shape
    shapes = (shared.basis.shape, shared.columns.shape, shared.levels.shape)
    if shapes != ((max(directions), width), (width,), (LEVELS,)):
        raise ValueError("a basis that does not fit")
    if not np.array_equal(np.sort(table.order), np.arange(sum(table.sizes))):
        raise ValueError("an order that is no permutation of the ids")
    if not np.isfinite(table.dense()).all():
        raise ValueError("numbers that are not finite")
