"""The files of a factorization.

wte_pca_k{k}.npy          token table [V, k] float32
scale_mats_pca_k{k}.npz   scale_up, scale_down: [k, d] float32; mean [d] if centred
bands_pca_k{k}/           replaces both if the table has several bands; same size
spectrum.npy              singular values [d] float64, descending
metadata.json             method, source, energy kept by each rank; written last
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcagpt.errors import UserError
from pcagpt.factorize.table import BandFactors, FactorizedTable
from pcagpt.files import read_json, read_npy, read_npz, write_json, write_npy, write_npz

FOLDER = "pca_factorized"  # in a workdir; further seeds add a suffix
ORDER_FILE = "token_order.npy"
MEAN_FILE = "mean.npy"


class ScaleMatrices(NamedTuple):
    """scale_up, scale_down: [K, D] float32; mean: [D] float32 or None."""

    scale_up: np.ndarray
    scale_down: np.ndarray
    mean: np.ndarray | None


def table_path(folder: Path, rank: int) -> Path:
    """File of the token table of a rank."""
    return folder / f"wte_pca_k{rank}.npy"


def scale_path(folder: Path, rank: int) -> Path:
    """File of the scale matrices of a rank."""
    return folder / f"scale_mats_pca_k{rank}.npz"


def bands_path(folder: Path, rank: int) -> Path:
    """Folder of the table in bands that is as large as a table of this rank."""
    return folder / f"bands_pca_k{rank}"


def exists(folder: Path, rank: int, in_bands: bool) -> bool:
    """Whether the files of a rank are complete."""
    if in_bands:
        return (bands_path(folder, rank) / ORDER_FILE).exists()
    return table_path(folder, rank).exists() and scale_path(folder, rank).exists()


def write(
    folder: Path,
    tables: dict[int, FactorizedTable],
    singular_values: np.ndarray,
    metadata: dict,
    in_bands: bool = False,
) -> None:
    """Writes all files of a factorization: the table of each rank, spectrum, metadata.

    `in_bands` writes `bands_pca_k{k}/`; otherwise every table has a single band.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank, table in tables.items():
        if in_bands:
            write_bands(bands_path(folder, rank), table)
            continue
        (band,) = table.bands
        write_npy(table_path(folder, rank), _float32(band.wte))
        _write_scale(scale_path(folder, rank), band.scale, table.mean)
    write_npy(folder / "spectrum.npy", np.asarray(singular_values, np.float64))
    write_json(folder / "metadata.json", metadata)


def write_bands(folder: Path, table: FactorizedTable) -> None:
    """Replaces `folder` by the files of a table.

    token_order.npy           [V] int32, the token at each position; written last
    wte_band{i}.npy           [n, k] float32, or [n, d] of a band at full width
    scale_mats_band{i}.npz    scale_up, scale_down: [k, d]; not at full width
    mean.npy                  [d] float32, added to the input, if the table is centred
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, band in enumerate(table.bands):
        write_npy(folder / f"wte_band{number}.npy", _float32(band.wte))
        if band.scale is not None:
            _write_scale(folder / f"scale_mats_band{number}.npz", band.scale)
    if table.mean is not None:
        write_npy(folder / MEAN_FILE, _float32(table.mean))
    write_npy(folder / ORDER_FILE, table.order)


def read_bands(folder: str | Path) -> FactorizedTable:
    """Reads the files of `write_bands`; UserError if they are damaged or mismatched."""
    folder = Path(folder)
    order_V = read_npy(folder / ORDER_FILE)
    bands, rows = [], 0
    while rows < len(order_V):
        wte = read_table(folder / f"wte_band{len(bands)}.npy")
        path, scale = folder / f"scale_mats_band{len(bands)}.npz", None
        if path.exists():
            scale = read_scale_matrices(path).scale_up
            if len(scale) != wte.shape[1]:
                raise UserError(
                    f"{path} has rank {len(scale)}, but the table beside it has rank "
                    f"{wte.shape[1]}: write them again"
                )
        bands.append(BandFactors(wte, scale))
        rows += len(wte)
    widths = {(b.wte if b.scale is None else b.scale).shape[1] for b in bands}
    if rows != len(order_V) or len(widths) > 1:
        raise UserError(
            f"{folder} holds bands of {rows} rows and widths {sorted(widths)} for "
            f"{len(order_V)} tokens: write them again"
        )
    if not np.array_equal(np.sort(order_V), np.arange(len(order_V))):
        raise UserError(f"{folder / ORDER_FILE} does not hold each token once")
    mean_D = None
    if (folder / MEAN_FILE).exists():
        mean_D = _checked(read_npy(folder / MEAN_FILE), 1, str(folder / MEAN_FILE))
    if len(bands) == 1:  # A model of one band stores its tokens in the order of ids.
        band = bands[0]._replace(wte=bands[0].wte[np.argsort(order_V)])
        return FactorizedTable.of_one_band(band, mean_D)
    return FactorizedTable(order_V, tuple(bands), mean_D)


def read_metadata(folder: Path) -> dict | None:
    """The metadata of `write`; None if the factorization is incomplete."""
    return read_json(folder / "metadata.json", f"delete {folder} and run again")


def read_table(path: str | Path) -> np.ndarray:
    """A token table [V, k] as float32, from a .npy file of any origin.

    Raises UserError unless the file holds a finite floating-point matrix.
    """
    return _checked(read_npy(Path(path)), 2, str(path))


def read_scale_matrices(path: str | Path) -> ScaleMatrices:
    """The scale matrices of a .npz file of any origin, as float32.

    Raises UserError as `read_table` does, and for a missing matrix or unequal shapes.
    """
    arrays, found = read_npz(Path(path)), {"mean": None}
    for name, dimensions in (("scale_up", 2), ("scale_down", 2), ("mean", 1)):
        if name in arrays:
            found[name] = _checked(arrays[name], dimensions, f"{path}: '{name}'")
        elif name != "mean":
            raise UserError(
                f"{path} has no array '{name}', only {sorted(arrays)}: it must hold "
                "scale_up and scale_down, each [k, d]"
            )
    up, down, mean = scales = ScaleMatrices(**found)
    if up.shape != down.shape or (mean is not None and mean.shape != up.shape[1:]):
        shown = "" if mean is None else f", mean {mean.shape}"
        raise UserError(
            f"{path}: scale_up is {up.shape}, scale_down {down.shape}{shown}: both "
            "matrices must be [k, d], the mean [d]"
        )
    return scales


def _write_scale(path: Path, scale_KD: np.ndarray, mean_D: np.ndarray | None = None):
    """Writes both scale matrices, which are equal after a factorization."""
    scale = _float32(scale_KD)
    mean = {} if mean_D is None else {"mean": _float32(mean_D)}
    write_npz(path, scale_up=scale, scale_down=scale, **mean)


def _checked(array: np.ndarray, dimensions: int, what: str) -> np.ndarray:
    """The array as float32; UserError unless it holds finite floating-point values."""
    if array.ndim != dimensions or array.size == 0:
        raise UserError(
            f"{what} has shape {array.shape}: {dimensions} dimensions are needed"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{what} has dtype {array.dtype}: floating point is needed")
    with np.errstate(over="ignore"):  # The next check reports values beyond float32.
        array = _float32(array)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise UserError(
            f"{what} holds {array[where]} at {where}: all must be finite in float32"
        )
    return array


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
