"""A GPT-2 that `configs/export.py` wrote with a compressed table, as a run.

hf-factored   config.json, model.safetensors: the table as factors or packed codes
coded         config.json, others.safetensors, table.pcat: the table as coded file
pcagpt.json   of both: what it was made from, and the digests of all files
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import coding
from pcagpt.errors import UserError
from pcagpt.json_files import check_fields, read_json
from pcagpt.model import CONSTANTS, FULL_TABLE
from pcagpt.run import hugging_face
from pcagpt.run.gpt2_names import PREFIX, TABLE, leaves

FILE = "pcagpt.json"
# Where the record of an export lists what `write_model` recorded as "compressed".
BEFORE = "compressed_before"
OTHERS, CODED_TABLE = "others.safetensors", "table.pcat"
TYPE = "pcagpt_"  # before the model_type of the architecture, in config.json
_RESTORE = "export the model again"
ONLY_THERE = "; if you changed it, such as by training, only transformers reads it"
_LAYOUT = {  # of a table in factors or packed codes, in config.json
    "sizes": (list,),
    "ranks": (list,),
    "blocks": (list,),
    "is_tied": (bool,),
    "has_mean": (bool,),
}


def compressions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How each compressed table of a model was made, here or before it was exported."""
    own = record.get("compressed")
    return [*record.get(BEFORE, ()), *([own] if own else ())]


def is_model(folder: Path) -> bool:
    """Whether a folder is one of these exports."""
    if (folder / OTHERS).is_file():
        return True
    return str(hugging_face.kind_of(folder)).startswith(TYPE)


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run with the model of a folder.

    Raises UserError if files are missing or changed, or for another model than GPT-2.
    """
    stored, config = _configs(folder)
    model = hugging_face.model_settings(config)
    if "table" in stored:
        layout = stored["table"]
        _check_layout(layout, folder / hugging_face.CONFIG)
        is_packed, sizes = bool(layout["blocks"]), layout["sizes"]
        model["n_embd_wte_scale_tying"] = layout["is_tied"]
        if is_packed or len(sizes) > 1:
            model |= {"band_sizes": sizes, "band_ranks": layout["ranks"]}
            model["band_blocks"] = sum(layout["blocks"], [])
        else:
            model["n_embd_wte"] = layout["ranks"][0]
    return {"vocab_size": config["vocab_size"], "model": model}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """{path in our tree: array} of a folder; raises as `record_of` does."""
    stored, config = _configs(folder)
    is_coded = "table" not in stored
    path = folder / (OTHERS if is_coded else hugging_face.WEIGHTS)
    with hugging_face.opened(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = (config[name] for name in ("n_positions", "n_layer", "n_embd"))
    paths = {PREFIX + n: leaf.path for n, leaf in leaves(0, *sizes).items()}
    del paths[PREFIX + TABLE]
    if lacking := [name for name in paths if name not in arrays]:
        raise UserError(f"{path} has no tensor {lacking[0]}: {_RESTORE}")
    found = {at: arrays.pop(name) for name, at in paths.items()}
    if is_coded:
        return found | {FULL_TABLE: coding.read(folder / CODED_TABLE)[0].dense()}
    prefix = PREFIX + TABLE.removesuffix("weight")
    return found | {_path(name.removeprefix(prefix)): a for name, a in arrays.items()}


def _check_layout(layout: Any, path: Path) -> None:
    """UserError unless each band has a size and a rank, and blocks if it is packed."""
    check_fields(layout, _LAYOUT, path, _RESTORE)
    sizes, ranks, blocks = (layout[name] for name in ("sizes", "ranks", "blocks"))
    of_bands = {len(sizes), len(ranks), len(blocks or sizes)}
    numbers = [sizes, ranks, *blocks]
    are_numbers = all(
        type(part) is list and all(type(n) is int and n >= 0 for n in part)
        for part in numbers
    )
    if not (sizes and len(of_bands) == 1 and are_numbers and all(sizes)):
        raise UserError(
            f"{path} is damaged ('table' must have a size and a rank of each band, and "
            f"a list of blocks if it is packed): {_RESTORE}"
        )


def _path(part: str) -> str:
    """Where a tensor of `modeling_pcagpt.CompressedEmbedding` is in our tree."""
    *_, owner, name = ("", *part.split("."))
    if name == "position":
        return f"{CONSTANTS}/embed/position_of_token"
    if owner in ("", "shared"):
        return f"{CONSTANTS}/embed/directions/{name}"
    kind = f"{CONSTANTS}/" if name in ("codes", "scales") else ""
    return f"{kind}embed/band_{owner}/{name}"


def _configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, its fields that a GPT-2 has) of an undamaged folder."""
    path = folder / hugging_face.CONFIG
    origin, stored = (read_json(at, _RESTORE) for at in (folder / FILE, path))
    if origin is None or stored is None:
        raise UserError(
            f"{folder} lacks its {FILE} or {path.name}: {_RESTORE}{ONLY_THERE}"
        )
    kind = str(stored.get("model_type")).removeprefix(TYPE)
    if kind != "gpt2":
        raise UserError(
            f"{folder} holds a compressed {kind}: transformers opens it, see its "
            "README.md; pcagpt computes only GPT-2"
        )
    named = {"model_type": kind, "architectures": None}
    return stored, hugging_face.checked_config(stored | named, path)
