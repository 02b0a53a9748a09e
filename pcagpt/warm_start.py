"""What a run starts from besides random weights: factor files, another run's blocks.

A run that goes on from all weights of another is given them by `trained_run`.

Precedence: a checkpoint of the run itself, then what is imported here, then random.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pcagpt import checkpoint, factor_files, run_folder
from pcagpt import params as trees
from pcagpt.errors import UserError
from pcagpt.model import GPTConfig

TABLE_PATTERN = r"embed/band_\d+/wte"
SCALE_PATTERN = r"embed/band_\d+/scale_(up|down)"

# Each import of the `init` section, and the knob that keeps it fixed.
IMPORTS = {
    "import_wte_npy": "import_wte_freeze",
    "import_scale_matrices_npz": "import_scale_matrices_freeze",
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
            if not init[imported]:
                raise UserError(
                    f"init.{freeze} is on but nothing is imported: set init.{imported}"
                )
            patterns.append(pattern)
    return tuple(patterns)


def fingerprints(init: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of all that is imported, so that what changed counts as another config."""
    files = {
        name: init[name]
        for name in ("import_wte_npy", "import_scale_matrices_npz")
        if init[name]
    }
    found = {
        name: checkpoint.fingerprint(init[name])
        for name in ("blocks_from", "weights_from")
        if init[name]
    }
    for name, path in files.items():
        try:
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"init.{name}: {path}: {error.strerror}") from None
    return found


def replacements(init: Mapping[str, Any], config: GPTConfig, template: dict) -> dict:
    """{parameter path: host array} of everything that is imported.

    Args:
      init: the `init` section of the config.
      config: of the model that starts.
      template: its parameters.

    Raises:
      UserError: a file or run that does not fit the model, in one line.
    """
    new = {}
    if init["blocks_from"]:
        new |= _blocks(init["blocks_from"], config, trees.flatten(template))
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
    return new


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
    if scales.mean is not None:
        # Centring is free: the head cancels a common vector, the input gets it here.
        wpe = new.get("wpe")
        found["wpe"] = (template["wpe"] if wpe is None else wpe) + scales.mean
    return found
