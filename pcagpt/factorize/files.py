"""The files of a factorization: written, read back, and checked.

wte_pca_k{k}.npy          token table [V, k] float32
scale_mats_pca_k{k}.npz   scale_up, scale_down: [k, d] float32; mean [d] if centred
spectrum.npy              singular values [d] float64, descending
metadata.json             method, source, energy kept by each rank
bands_pca_k{k}/           in place of the first two: a table in bands, of a rank's size
"""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcagpt.errors import UserError
from pcagpt.factorize import BandedTable, LowRank

ORDER_FILE = "token_order.npy"


class ScaleMatrices(NamedTuple):
    """scale_up, scale_down: [K, D] float32; mean: [D] float32 or None."""

    scale_up: np.ndarray
    scale_down: np.ndarray
    mean: np.ndarray | None


def table_path(folder: Path, rank: int) -> Path:
    """Where the token table of a rank is kept."""
    return folder / f"wte_pca_k{rank}.npy"


def scale_path(folder: Path, rank: int) -> Path:
    """Where the scale matrices of a rank are kept."""
    return folder / f"scale_mats_pca_k{rank}.npz"


def bands_path(folder: Path, rank: int) -> Path:
    """The folder of the table in bands of a rank's size."""
    return folder / f"bands_pca_k{rank}"


def is_there(folder: Path, rank: int, in_bands: bool) -> bool:
    """Whether the files of a rank are."""
    if in_bands:
        return (bands_path(folder, rank) / ORDER_FILE).exists()
    return table_path(folder, rank).exists() and scale_path(folder, rank).exists()


def write(
    folder: Path,
    tables: dict[int, LowRank | BandedTable],
    singular_values: np.ndarray,
    metadata: dict,
) -> None:
    """Writes tables, scale matrices, spectrum and, last of all, the metadata.

    Args:
      folder: made if lacking.
      tables: of each rank.
      singular_values: [d], descending.
      metadata: JSON values; complete files are those that have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank, table in tables.items():
        if isinstance(table, BandedTable):
            write_bands(bands_path(folder, rank), table)
            continue
        wte_VK, scale_KD, mean_D = table
        _write_atomically(table_path(folder, rank), np.save, _float32(wte_VK))
        arrays = {"scale_up": _float32(scale_KD), "scale_down": _float32(scale_KD)}
        if mean_D is not None:
            arrays["mean"] = _float32(mean_D)
        _write_atomically(scale_path(folder, rank), np.savez, **arrays)
    _write_atomically(
        folder / "spectrum.npy", np.save, np.asarray(singular_values, np.float64)
    )
    text = json.dumps(metadata, indent=2) + "\n"
    _write_atomically(
        folder / "metadata.json", lambda file: file.write(text.encode("utf-8"))
    )


def write_bands(folder: Path, table: BandedTable) -> None:
    """The files of a table in bands, in place of any others; the order is the last.

    token_order.npy           [V] int32, the token at each position, band after band
    wte_band{i}.npy           [n, k] float32, or [n, d] of a band at full width
    scale_mats_band{i}.npz    scale_up, scale_down: [k, d]; none at full width
    mean.npy                  [d] float32, to be added to the input, if centred
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, part in enumerate(table.tables):
        rows = part
        if isinstance(part, LowRank):
            rows, scale = part.wte, _float32(part.scale)
            _write_atomically(
                folder / f"scale_mats_band{number}.npz",
                np.savez,
                scale_up=scale,
                scale_down=scale,
            )
        _write_atomically(folder / f"wte_band{number}.npy", np.save, _float32(rows))
    if table.mean is not None:
        _write_atomically(folder / "mean.npy", np.save, _float32(table.mean))
    _write_atomically(folder / ORDER_FILE, np.save, table.order)


def read_bands(folder: str | Path) -> BandedTable:
    """What `write_bands` wrote.

    Raises:
      UserError: a file is missing or damaged, or they do not fit together.
    """
    folder = Path(folder)
    order_V = _load(folder / ORDER_FILE, ".npy")
    tables, rows = [], 0
    while rows < len(order_V):
        number = len(tables)
        wte = read_table(folder / f"wte_band{number}.npy")
        path = folder / f"scale_mats_band{number}.npz"
        rows += len(wte)
        if not path.exists():
            tables.append(wte)
            continue
        scale = read_scale_matrices(path).scale_up
        if len(scale) != wte.shape[1]:
            raise UserError(
                f"{path} is of rank {len(scale)}, the table beside it of rank "
                f"{wte.shape[1]}: write them again"
            )
        tables.append(LowRank(wte, scale, None))
    widths = {(t.scale if isinstance(t, LowRank) else t).shape[1] for t in tables}
    if rows != len(order_V) or len(widths) > 1:
        raise UserError(
            f"{folder} holds bands of {rows} rows and of the widths {sorted(widths)} "
            f"for {len(order_V)} tokens: write them again"
        )
    if not np.array_equal(np.sort(order_V), np.arange(len(order_V))):
        raise UserError(f"{folder / ORDER_FILE} does not hold each token once")
    path, mean_D = folder / "mean.npy", None
    if path.exists():
        mean_D = _checked(_load(path, ".npy"), 1, str(path))
    if len(tables) == 1:  # A model of one band has the tokens in order of their ids.
        (table,), ids_V = tables, np.argsort(order_V)
        is_full = not isinstance(table, LowRank)
        by_id = table[ids_V] if is_full else table._replace(wte=table.wte[ids_V])
        tables, order_V = [by_id], np.arange(len(order_V), dtype=np.int32)
    return BandedTable(order_V, tuple(tables), mean_D)


def read_metadata(folder: Path) -> dict | None:
    """What `write` was given, or None where no complete factorization is."""
    try:
        return json.loads((folder / "metadata.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{folder / 'metadata.json'} is damaged: delete {folder} and run again"
        ) from None


def read_table(path: str | Path) -> np.ndarray:
    """A token table [V, k] as float32 from a .npy file of any origin.

    Raises:
      UserError: missing or damaged file, not two-dimensional, not of floating-point
        numbers, or with values that are not finite.
    """
    return _checked(_load(path, ".npy"), 2, str(path))


def read_scale_matrices(path: str | Path) -> ScaleMatrices:
    """The scale matrices of a .npz file of any origin, as float32.

    Raises:
      UserError: as for `read_table`, or a missing key, or matrices of two shapes.
    """
    with _load(path, ".npz") as archive:
        arrays = {}
        for name in ("scale_up", "scale_down"):
            if name not in archive:
                raise UserError(
                    f"{path} has no array '{name}', only {sorted(archive)}: it must "
                    "hold scale_up and scale_down, each [k, d]"
                )
        for name in archive:
            if name in ("scale_up", "scale_down", "mean"):
                try:
                    array = archive[name]
                except (ValueError, OSError, zipfile.BadZipFile) as error:
                    raise _damaged(path, error) from None
                rank = 1 if name == "mean" else 2
                arrays[name] = _checked(array, rank, f"{path}: '{name}'")
    up, down, mean = (arrays.get(n) for n in ("scale_up", "scale_down", "mean"))
    if up.shape != down.shape or (mean is not None and mean.shape != up.shape[1:]):
        raise UserError(
            f"{path}: scale_up is {up.shape}, scale_down {down.shape}"
            + ("" if mean is None else f", mean {mean.shape}")
            + ": both matrices must be [k, d], the mean [d]"
        )
    return ScaleMatrices(up, down, mean)


def _load(path: str | Path, ending: str):
    try:
        # From memory: of a damaged archive np.load would leave the file open.
        loaded = np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a {ending}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    if isinstance(loaded, np.ndarray) != (ending == ".npy"):
        raise UserError(f"{path} is not a {ending} file")
    return loaded


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a readable array file ({error}): write it again")


def _checked(array: np.ndarray, dimensions: int, what: str) -> np.ndarray:
    if array.ndim != dimensions or array.size == 0:
        raise UserError(
            f"{what} has shape {array.shape}: {dimensions} dimensions are needed"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{what} has dtype {array.dtype}: floating point is needed")
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite.
        array = _float32(array)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise UserError(
            f"{what} holds {array[where]} at {where}: all must be finite in float32"
        )
    return array


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _write_atomically(path: Path, save, *arguments, **keywords) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        save(file, *arguments, **keywords)
    os.replace(temporary, path)
