"""The files of a compressed table without its model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pcagpt.coding import Description
from pcagpt.compression.candidates import Candidate
from pcagpt.compression.codes import KINDS
from pcagpt.errors import Unreadable, UserError
from pcagpt.factorization import FactorizedTable
from pcagpt.factorization.factor_files import read_bands, write_bands
from pcagpt.json_files import write_json
from pcagpt.run.folder import check_is_folder, is_vacant, replacing

FACTORS = "factors"  # the folder of a table's factors, in that of the table
ADVICE = "advice.json"  # beside the table that was found for a bound
Found = TypeVar("Found")


def write_table(
    folder: Path, candidate: Candidate, origin: dict[str, Any] | None = None
) -> None:
    """Writes the file of codes, or factors/, into a folder that has no table.

    `origin` is of the table that was compressed, for the metadata of factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if candidate.codes is None:
        write_bands(folder / FACTORS, candidate.table, origin)
        return
    kind, method = KINDS[candidate.recipe.method], candidate.recipe.method
    kind.write(folder / kind.file, candidate.codes, Description(method))


def replace_table(
    folder: Path,
    candidate: Candidate,
    origin: dict[str, Any],
    advice: dict[str, Any] | None = None,
) -> None:
    """As `write_table`, with advice.json if there is any advice.

    Moves what is there aside.
    """
    with replacing(folder) as written:
        write_table(written, candidate, origin)
        if advice:
            write_json(written / ADVICE, advice)


def holds_table(folder: Path, method: str, table_sha256: str | None) -> bool:
    """Whether a folder has the table of this hash, undamaged, and no other table."""
    kind = KINDS.get(method)
    name = kind.file if kind else FACTORS
    if [path.name for path in _tables_in(folder)] != [name]:
        return False
    if kind is None:
        return factors_in(folder / name, table_sha256) is not None
    found = undamaged(lambda: kind.read(folder / name))
    return found is not None and found[0].sha256 == table_sha256


def check_table_place(folder: Path) -> None:
    """Raises UserError if `replace_table` would replace what it did not write."""
    check_is_folder(folder)
    if not is_vacant(folder) and not _tables_in(folder):
        raise UserError(
            f"{folder} holds something other than a compressed table: use another "
            "--config.workdir, or --config.overwrite=True to move it aside"
        )


def _tables_in(folder: Path) -> list[Path]:
    """The files of tables in a folder; none in the folder of a run."""
    names = FACTORS, *(kind.file for kind in KINDS.values())
    if (folder / "config.json").exists():
        return []
    return [folder / name for name in names if (folder / name).exists()]


def factors_in(folder: Path, table_sha256: str | None) -> FactorizedTable | None:
    """The factors in a folder if they have this hash, undamaged."""
    table = undamaged(lambda: read_bands(folder))
    return table if table and table.sha256 == table_sha256 else None


def undamaged(read: Callable[[], Found]) -> Found | None:
    """What `read` returns; None if it finds damage.

    Raises Unreadable if the system does not let a file be read: it may be undamaged.
    """
    try:
        return read()
    except Unreadable:
        raise
    except UserError:
        return None
