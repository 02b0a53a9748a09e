"""Reads a compressed table back from the folder that `write_model` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcagpt.compression.codes import KINDS, Codes
from pcagpt.errors import UserError
from pcagpt.factorization import FactorizedTable
from pcagpt.factorization.factor_files import read_bands


def read_table(folder: Path, made: Mapping[str, Any]) -> FactorizedTable | Codes:
    """The table in a folder whose record has `made` as 'compressed'.

    Raises UserError if it is missing or damaged, or another one than the record names.
    """
    kind = KINDS.get(made.get("method"))
    path = folder / (kind.file if kind else "factors")
    table = kind.read(path)[0] if kind else read_bands(path)
    if table.sha256 != made.get("table_sha256"):
        raise UserError(
            f"{path} is another table than the one that the config.json of {folder} "
            "names: compress the model again"
        )
    return table
