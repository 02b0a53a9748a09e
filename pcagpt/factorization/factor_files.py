"""The files of a factorization.

wte_pca_k{k}.npy          token table [V, k] float32
scale_mats_pca_k{k}.npz   scale_up, scale_down: [k, d] float32; mean [d] if centred
bands_pca_k{k}/           the table in several bands, in place of both files above
spectrum.npy              singular values [d] float64, descending
metadata.json             method, source, its tokens, energy kept by each rank, and the
                          digests of the files beside it, which every reader checks;
                          written twice: first with its ranks as 'unfinished', and last
                          without them
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pcagpt.array_files import check_values, read_npy, read_npz, write_npy, write_npz
from pcagpt.errors import Unreadable, UserError, warn_once
from pcagpt.factorization.table import BandFactors, FactorizedTable
from pcagpt.file_hashes import check_digests, digests_of, sha256_of_file
from pcagpt.files import open_file
from pcagpt.json_files import check_fields, read_json, write_json
from pcagpt.unfilled import Place, refuse_unfilled

SMALLEST = 1e-30  # a table needs a value at least this large
FOLDER = "pca_factorized"  # in a workdir, with a suffix for some seeds
METADATA_FILE = "metadata.json"
SPECTRUM_FILE = "spectrum.npy"
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
    """Whether the files of a rank are complete and undamaged."""
    return _is_readable(lambda: read(folder, rank, in_bands))


def has_spectrum(folder: Path) -> bool:
    """Whether the singular values are there and undamaged."""
    return _is_readable(lambda: read_spectrum(folder))


def _is_readable(read_it: Callable[[], Any]) -> bool:
    try:
        read_it()
    except Unreadable:
        raise
    except UserError:
        return False
    return True


def read(folder: Path, rank: int, in_bands: bool) -> FactorizedTable:
    """The table of a rank; UserError if its files are damaged or missing."""
    if in_bands:
        return read_bands(bands_path(folder, rank))
    wte = read_table(table_path(folder, rank))
    scale, _, mean = read_scale_matrices(scale_path(folder, rank))
    return FactorizedTable.of_one_band(BandFactors(wte, scale), mean)


def not_ours(
    folder: Path, metadata: dict[str, Any] | None, ranks: Iterable[int]
) -> list[Path]:
    """Files that `write` would replace for these ranks and did not write itself.

    `metadata` is from `read_metadata` of the folder.
    """
    if metadata is None:
        ours, there = set(), [folder / SPECTRUM_FILE]
    else:
        ours = {*map(int, metadata["ranks"]), *(metadata.get("unfinished") or ())}
        there = []
    for rank in {*ranks} - ours:
        there += [path(folder, rank) for path in (table_path, scale_path, bands_path)]
    return sorted(path for path in there if path.exists())


def changed(folder: Path, ranks: Iterable[int]) -> list[Path]:
    """Files that `write` would replace and that were changed since it wrote them.

    A folder of bands always counts, because it may hold a person's files.
    """
    listed = _listed(folder)
    files = [path(folder, rank) for rank in ranks for path in (table_path, scale_path)]
    found = [
        path
        for path in (folder / SPECTRUM_FILE, *files)
        if path.exists()
        and listed.get(path.name) not in (None, {"sha256": sha256_of_file(path)})
    ]
    folders = [bands_path(folder, rank) for rank in ranks]
    return found + [path for path in folders if path.exists()]


def write(
    folder: Path,
    tables: dict[int, FactorizedTable],
    singular_values: np.ndarray,
    metadata: dict,
    in_bands: bool = False,
) -> None:
    """Writes all files of a factorization: the table of each rank, spectrum, metadata.

    `in_bands` writes `bands_pca_k{k}/`; otherwise every table has a single band. Ranks
    that are only in `metadata` have their files already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = metadata.get("ranks", {})
    there = {rank: ranks[rank] for rank in ranks if int(rank) not in tables}
    files = _listed(folder)
    written = [folder / SPECTRUM_FILE]
    if not in_bands:
        written += [
            p(folder, rank) for rank in tables for p in (table_path, scale_path)
        ]
    for path in written:
        files.pop(path.name, None)
    # A killed command may have left files of other ranks.
    left = {*((read_metadata(folder) or {}).get("unfinished") or ())} - {*tables}
    begun = {"ranks": there, "unfinished": sorted({*tables, *left}), "files": files}
    # From here on, the files of these ranks count as ours.
    write_json(folder / METADATA_FILE, metadata | begun)
    for rank, table in tables.items():
        if in_bands:
            write_bands(bands_path(folder, rank), table)
            continue
        (band,) = table.bands
        write_npy(table_path(folder, rank), _float32(band.wte))
        _write_scale(scale_path(folder, rank), band.scale, table.mean)
    write_npy(folder / SPECTRUM_FILE, np.asarray(singular_values, np.float64))
    files |= digests_of(folder, [path.name for path in written])
    ended = {"unfinished": sorted(left)} if left else {}
    stated = {"ranks": ranks, "files": files}
    write_json(folder / METADATA_FILE, metadata | stated | ended)


def write_bands(
    folder: Path, table: FactorizedTable, origin: Mapping[str, Any] | None = None
) -> None:
    """Writes the files of a table into a folder that has no table.

    token_order.npy           [V] int32, the token at each position
    wte_band{i}.npy           [n, k] float32, or [n, d] of a band at full width
    scale_mats_band{i}.npz    scale_up, scale_down: [k, d]; not at full width
    mean.npy                  [d] float32, added to the input, if the table is centred
    metadata.json             digests of these files, and `origin`; written last
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, band in enumerate(table.bands):
        write_npy(folder / f"wte_band{number}.npy", _float32(band.wte))
        if band.scale is not None:
            _write_scale(folder / f"scale_mats_band{number}.npz", band.scale)
    if table.mean is not None:
        write_npy(folder / MEAN_FILE, _float32(table.mean))
    write_npy(folder / ORDER_FILE, table.order)
    files = digests_of(folder, [path.name for path in folder.glob("*.np[yz]")])
    write_json(folder / METADATA_FILE, {**(origin or {}), "files": files})


def read_bands(folder: str | Path) -> FactorizedTable:
    """Reads the files of `write_bands`; UserError if they are damaged or mismatched."""
    folder = Path(folder)
    order_V = read_npy(_checked_file(folder / ORDER_FILE))
    is_list = order_V.ndim == 1 and order_V.dtype.kind in "iu"
    if not (is_list and np.array_equal(np.sort(order_V), np.arange(len(order_V)))):
        raise UserError(f"{folder / ORDER_FILE} does not hold each token once")
    bands, rows = [], 0
    while rows < len(order_V):
        wte = read_table(folder / f"wte_band{len(bands)}.npy")
        path, scale = folder / f"scale_mats_band{len(bands)}.npz", None
        if path.exists():
            scale, down, mean = read_scale_matrices(path)
            if mean is not None or not np.array_equal(scale, down):
                raise UserError(
                    f"{path} holds two different scale matrices or a mean: a band has "
                    f"one matrix, and the mean of a table in bands is in {MEAN_FILE}"
                )
            if len(scale) != wte.shape[1]:
                raise UserError(
                    f"{path} has rank {len(scale)}, but the table beside it has rank "
                    f"{wte.shape[1]}: write them again"
                )
        bands.append(BandFactors(wte, scale))
        rows += len(wte)
    widths = {(b.wte if b.scale is None else b.scale).shape[1] for b in bands}
    if rows != len(order_V) or len(widths) != 1:
        raise UserError(
            f"{folder} holds bands of {rows} rows and widths {sorted(widths)} for "
            f"{len(order_V)} tokens: write them again"
        )
    mean_D = None
    if (folder / MEAN_FILE).exists():
        path = _checked_file(folder / MEAN_FILE)
        mean_D = _checked(read_npy(path), 1, str(path))
        if {len(mean_D)} != widths:
            raise UserError(f"{path} has width {len(mean_D)}, the table {widths}")
    if len(bands) == 1:  # A model of one band stores its tokens in the order of ids.
        band = bands[0]._replace(wte=bands[0].wte[np.argsort(order_V)])
        return FactorizedTable.of_one_band(band, mean_D)
    return FactorizedTable(order_V, tuple(bands), mean_D)


def read_metadata(folder: Path) -> dict | None:
    """The metadata of `write`, without digests; None if it wrote nothing there.

    Raises UserError if they are damaged.
    """
    path, remedy = folder / METADATA_FILE, f"delete {folder} and run again"
    metadata = read_json(path, remedy)
    if metadata is None:
        return None
    metadata.pop("files", None)
    if not {"ranks", "unfinished"} & metadata.keys():
        raise UserError(f"{path} is damaged (it has no 'ranks'): {remedy}")
    fields = {"ranks": (dict, None), "unfinished": (list, None), "tokens": (dict, None)}
    check_fields(metadata, fields, path, remedy)
    metadata["ranks"] = metadata.get("ranks") or {}
    for rank, described in metadata["ranks"].items():
        where = f"{path}: the rank '{rank:.20}'"
        fields = {"energy_kept": (int, float, None), "band_ranks": (list, None)}
        check_fields(described, fields, where, remedy)
        if not (rank.isascii() and rank.isdigit()):
            raise UserError(f"{where} is not a whole number: {remedy}")
    return metadata


def read_spectrum(folder: Path) -> np.ndarray:
    """Singular values [d] float64; UserError if they are missing or damaged."""
    path = _checked_file(folder / SPECTRUM_FILE)
    values = read_npy(path)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{path} does not hold a list of singular values")
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise UserError(f"{path} holds values that cannot be singular values")
    return values.astype(np.float64)


def sha256(path: Path) -> str:
    """Hash of a factor file; UserError if it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a {path.suffix}")
    return sha256_of_file(_checked_file(path))


def sha256_of_bands(folder: Path) -> str:
    """Hash of the arrays of a table in bands; UserError if one is damaged."""
    _checked_file(folder / ORDER_FILE)
    # A person may keep other files there. Older versions list none.
    names = [*_listed(folder)] or [path.name for path in folder.glob("*.np[yz]")]
    digest = hashlib.sha256()
    for name in sorted(names):
        with open_file(folder / name) as file:
            digest.update(file.read())
    return digest.hexdigest()


def _listed(folder: Path) -> dict[str, Any]:
    """The digests in a folder's metadata, for `check_digests`; {} without."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: correct the path")
    remedy = (
        f"delete {folder} and run the command that made it again, or delete only this "
        "file if the files beside it are your own"
    )
    files = (read_json(folder / METADATA_FILE, remedy) or {}).get("files")
    return files if isinstance(files, dict) else {}


def _checked_file(path: Path) -> Path:
    """The path; UserError if its content differs from its digest beside it.

    A token order stands for all files of its bands. Files of older versions and of
    other programs are not listed.
    """
    known = _listed(path.parent)
    if path.name != ORDER_FILE:
        known = {name: known[name] for name in known if name == path.name}
    try:
        check_digests(path.parent, known)
    except Unreadable:
        raise
    except UserError as error:
        raise UserError(
            f"{error}: the command that made {path.parent} writes it again; delete "
            f"{path.parent / METADATA_FILE} only if you replaced files there yourself"
        ) from None
    return path


def read_table(path: str | Path) -> np.ndarray:
    """A token table [V, k] as float32, from a .npy file of any origin.

    Raises UserError unless the file holds a finite floating-point matrix without a part
    that was never written.
    """
    path = _checked_file(Path(path))
    stored = read_npy(path)
    table_VK = checked_table(stored, str(path))
    if table_VK.any():
        size, in_rows = path.stat().st_size, stored.flags.c_contiguous
        shape = stored.shape if in_rows else stored.shape[::-1]
        name = "its table" if in_rows else "its table's transpose"
        refuse_unfilled(path, {name: Place(shape, size - stored.nbytes, size)})
    return table_VK


def checked_table(table_VK: np.ndarray, what: str) -> np.ndarray:
    """A token table as float32; UserError unless it is a finite float matrix."""
    return _checked(table_VK, 2, what)


def check_rows_differ(table_VD: np.ndarray, what: object) -> None:
    """Raises UserError for a table to factorize that tells no tokens apart.

    Also for one whose values are so small that float32 arithmetic loses them.
    """
    if table_VD.any() and (len(table_VD) == 1 or (table_VD != table_VD[0]).any()):
        if (largest := max(table_VD.max(), -table_VD.min())) < SMALLEST:
            raise UserError(
                f"{what} holds no value above {largest:.3g}, but arithmetic in float32 "
                f"needs some above {SMALLEST:g}: multiply it by a number, or give the "
                "table of a trained model"
            )
        return
    content = "the same row for every token" if table_VD.any() else "only zeros"
    raise UserError(
        f"{what} holds {content}: there is nothing to factorize; give the table of a "
        "trained model"
    )


def ask_if_transposed(table_VD: np.ndarray, what: object) -> None:
    """Warns of a table without its model that has fewer rows than columns.

    It is no error: a model of characters may have fewer tokens than dimensions.
    """
    rows, columns = table_VD.shape
    if rows < columns:
        warn_once(
            f"{what} has {rows:,} rows and {columns:,} columns, and each row is taken "
            "for a token: is it transposed? If so, give its transpose, table.T"
        )


def check_not_zero(factors: Iterable[np.ndarray | None], what: object) -> None:
    """Raises UserError if one of the factors to start from holds only zeros."""
    if any(factor is not None and not factor.any() for factor in factors):
        raise UserError(
            f"{what} holds only zeros, from which nothing can be learned: write it "
            "again from the table of a trained model"
        )


def read_scale_matrices(path: str | Path) -> ScaleMatrices:
    """The scale matrices of a .npz file of any origin, as float32.

    Raises UserError as `read_table` does, and for a missing matrix or unequal shapes.
    """
    arrays, found = read_npz(_checked_file(Path(path))), {"mean": None}
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
    # A .npy file does not name bfloat16.
    if array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16)
    is_brief = array.dtype == ml_dtypes.bfloat16  # NumPy does not count it as floating.
    if not (is_brief or np.issubdtype(array.dtype, np.floating)):
        raise UserError(f"{what} has dtype {array.dtype}: floating point is needed")
    with np.errstate(over="ignore"):  # The next check reports values beyond float32.
        array = _float32(array)
    check_values(array, what)
    return array


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
