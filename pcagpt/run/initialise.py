"""What a run starts from besides random weights: factor files, another run's blocks.

A run that goes on from all weights of another is given them by `trained_run`.

Precedence: a checkpoint of the run itself, then what is imported here, then random.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import factorize, trees
from pcagpt.errors import UserError
from pcagpt.factorize import FactorizedTable
from pcagpt.factorize import files as factor_files
from pcagpt.model import GPTConfig
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder

TABLE_PATTERN = r"embed/band_\d+/wte"
SCALE_PATTERN = r"embed/band_\d+/scale_(up|down)"

# Each import of the `init` section, and the knob that keeps it fixed.
IMPORTS = {
    "import_wte_npy": "import_wte_freeze",
    "import_scale_matrices_npz": "import_scale_matrices_freeze",
    "import_bands": None,
    "blocks_from": None,
    "weights_from": None,
}


def frozen_patterns(init: Mapping[str, Any]) -> tuple[str, ...]:
    """Path patterns of what `init.import_*_freeze` keeps fixed.

    Raises:
      UserError: a freeze without its import.
    """
    patterns = []
    for freeze, imported, pattern in (
        ("import_wte_freeze", "import_wte_npy", TABLE_PATTERN),
        ("import_scale_matrices_freeze", "import_scale_matrices_npz", SCALE_PATTERN),
    ):
        if init[freeze]:
            in_bands = init["import_bands"] and init["keep"] != "shape"
            if not (init[imported] or in_bands):
                raise UserError(
                    f"init.{freeze} is on but nothing is imported: set init.{imported}"
                )
            patterns.append(pattern)
    return tuple(patterns)


def fingerprints(init: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of all that is imported, so that what changed counts as another config."""
    files = {
        name: [Path(init[name])]
        for name in ("import_wte_npy", "import_scale_matrices_npz")
        if init[name]
    }
    if init["import_bands"]:
        folder = Path(init["import_bands"])
        files["import_bands"] = sorted(folder.glob("*.np[yz]")) or [folder]
    found = {
        name: checkpoint.fingerprint(init[name])
        for name in ("blocks_from", "weights_from")
        if init[name]
    }
    for name, paths in files.items():
        digest = hashlib.sha256()
        for path in paths:
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise UserError(f"init.{name}: {path}: {error.strerror}") from None
        found[name] = digest.hexdigest()
    return found


def replacements(
    init: Mapping[str, Any], config: GPTConfig, template: dict, seed: int
) -> dict:
    """{parameter path: host array} of everything that is imported.

    Args:
      init: the `init` section of the config.
      config: of the model that starts.
      template: its parameters.
      seed: of what is random where `init.keep` does not keep all of the factors.

    Raises:
      UserError: a file or run that does not fit the model, in one line.
    """
    new = {}
    if init["blocks_from"]:
        new |= _blocks(init["blocks_from"], config, trees.flatten(template))
    if init["import_bands"] and init["keep"] != "shape":
        new |= _bands(init["import_bands"], config, new, template)
    if (init["import_wte_npy"] or init["import_scale_matrices_npz"]) and len(
        config.bands
    ) > 1:
        raise UserError(
            "init.import_* files hold one table for all tokens, this model has "
            f"{len(config.bands)} bands: leave model.band_sizes empty"
        )
    if init["import_wte_npy"]:
        new["embed/band_0/wte"] = _table(init["import_wte_npy"], config)
    if init["import_scale_matrices_npz"]:
        new |= _scales(init["import_scale_matrices_npz"], config, new, template)
    if init["keep"] == "shape" and not init["import_bands"]:
        raise UserError("init.keep is 'shape', of bands: set init.import_bands")
    if init["keep"] in factorize.CONTROLS:
        new |= _controls(init["keep"], config, new, seed)
    return new


def band_settings(init: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """`band_sizes` and `band_ranks` of the model that imports bands; else nothing."""
    if not init["import_bands"]:
        return {}
    table = factor_files.read_bands(init["import_bands"])
    return {"band_sizes": table.sizes, "band_ranks": table.ranks}


def positions(order_V: np.ndarray) -> dict:
    """The model's constants for tokens in the order of a table in bands."""
    position_V = np.empty(len(order_V), np.int32)
    position_V[order_V] = np.arange(len(order_V), dtype=np.int32)
    return {"embed": {"position_of_token": position_V}}


def band_parameters(
    table: FactorizedTable, padding: int, scale_tying: bool = True
) -> dict:
    """{parameter path: array} of a table in bands, for a model of the same bands.

    Args:
      table: whose mean is left out.
      padding: rows of zeros that the last band gets.
      scale_tying: whether the model's two scale matrices are one.
    """
    found, last = {}, len(table.bands) - 1
    for number, part in enumerate(table.bands):
        padded = np.pad(part.wte, ((0, padding if number == last else 0), (0, 0)))
        found[f"embed/band_{number}/wte"] = padded.astype(np.float32)
        if part.scale is not None:
            scale = part.scale.astype(np.float32)
            found[f"embed/band_{number}/scale_up"] = scale
            if not scale_tying:
                found[f"embed/band_{number}/scale_down"] = scale
    return found


def _bands(folder: str, config: GPTConfig, new: dict, template: dict) -> dict:
    table = factor_files.read_bands(folder)
    wanted = [(band.size, band.rank or 0) for band in config.bands]
    width = table.width
    if (
        list(zip(table.sizes, table.ranks, strict=True)) != wanted
        or width != config.n_embd
    ):
        raise UserError(
            f"init.import_bands: {folder} holds {table.sizes} tokens at the ranks "
            f"{table.ranks} of width {width}, this model's bands are {wanted} of width "
            f"{config.n_embd}"
        )
    padding, tying = config.bands[-1].padding, config.n_embd_wte_scale_tying
    found = band_parameters(table, padding, tying)
    return found | _mean(table.mean, new, template)


def _mean(mean_D: np.ndarray | None, new: dict, template: dict) -> dict:
    """Centring is free: the head cancels a common vector, the input gets it here."""
    if mean_D is None:
        return {}
    wpe = new.get("wpe")
    return {"wpe": (template["wpe"] if wpe is None else wpe) + mean_D}


def _controls(keep: str, config: GPTConfig, new: dict, seed: int) -> dict:
    """The imported factors, random but for what is kept."""
    random, found = np.random.default_rng(seed), {}
    for number, band in enumerate(config.bands):
        names = [f"embed/band_{number}/{n}" for n in ("wte", "scale_up", "scale_down")]
        wte, scale = names[0], names[1] if band.rank else None
        if wte not in new or (scale and scale not in new):
            raise UserError(
                f"init.keep is '{keep}': import both factors, or a table in bands"
            )
        made_VK, made_KD = factorize.control(
            new[wte][: band.size], new[scale] if scale else None, keep, random
        )
        found[wte] = np.pad(made_VK, ((0, band.padding), (0, 0)))
        if scale:
            found |= {name: made_KD for name in names[1:] if name in new}
    return found


def _blocks(run: str, config: GPTConfig, wanted: Mapping[str, Any]) -> dict:
    params, _, _ = checkpoint.load_weights(run)
    trained = run_folder.read_config(checkpoint.find(run)[0]) or {"model": {}}
    heads = trained["model"].get("n_head", config.n_head)
    if heads != config.n_head:
        raise UserError(
            f"init.blocks_from: {run} has {heads} attention heads, this model "
            f"{config.n_head}: set model.n_head={heads}"
        )
    found = trees.flatten(params)
    blocks = {p: a for p, a in found.items() if not p.startswith("embed/")}
    missing = [p for p in wanted if p not in blocks and not p.startswith("embed/")]
    if missing:
        raise UserError(
            f"init.blocks_from: {run} lacks '{missing[0]}', which this model has: the "
            "two models differ in model.n_layer or model.bias"
        )
    trees.replace(trees.unflatten(wanted), blocks, source=f"init.blocks_from={run}")
    return blocks


def _table(path: str, config: GPTConfig) -> np.ndarray:
    table_VK = factor_files.read_table(path)
    band = config.bands[0]
    wanted = (band.size, band.rank or config.n_embd)
    if table_VK.shape != wanted:
        raise UserError(
            f"init.import_wte_npy: {path} is {table_VK.shape}, this model's table is "
            f"{wanted}: [vocabulary, model.n_embd_wte or, without it, model.n_embd]"
        )
    return np.pad(table_VK, ((0, band.padding), (0, 0)))


def _scales(path: str, config: GPTConfig, new: dict, template: dict) -> dict:
    scales = factor_files.read_scale_matrices(path)
    wanted = (config.bands[0].rank, config.n_embd)
    if config.bands[0].rank is None:
        raise UserError(
            "init.import_scale_matrices_npz is set but the model has no scale matrices:"
            f" set model.n_embd_wte={scales.scale_up.shape[0]}"
        )
    if scales.scale_up.shape != wanted:
        raise UserError(
            f"init.import_scale_matrices_npz: {path} is {scales.scale_up.shape}, this "
            f"model's scale matrices are {wanted}: [model.n_embd_wte, model.n_embd]"
        )
    found = {"embed/band_0/scale_up": scales.scale_up}
    if not config.n_embd_wte_scale_tying:
        found["embed/band_0/scale_down"] = scales.scale_down
    elif not np.array_equal(scales.scale_up, scales.scale_down):
        raise UserError(
            f"{path} has two different scale matrices and this model ties them: set "
            "model.n_embd_wte_scale_tying=False"
        )
    return found | _mean(scales.mean, new, template)
