"""Writes a GPT-2 as a Hugging Face folder, which `hugging_face` reads back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pcagpt.config import KNOBS
from pcagpt.config.schema import ModelSettings
from pcagpt.errors import UserError
from pcagpt.files import write_file
from pcagpt.json_files import write_plain_json
from pcagpt.model import BLOCK_KNOBS
from pcagpt.model.block import LAYER_NORM_EPSILON
from pcagpt.run.gpt2_names import PREFIX, TABLE, leaves
from pcagpt.run.hugging_face import ARCHITECTURES, CONFIG

# Those that `config` writes; biases that a model lacks are zeros.
_KNOWN_KNOBS = ("block_size", "n_layer", "n_head", "n_embd", "bias", "gelu")


def tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name of transformers: float32 array} of a GPT-2, without its token table.

    `weights` are by parameter path; they may have a table, too. Biases that they lack
    become zeros, because transformers' GPT-2 has all of them. ValueError for another
    parameter that GPT-2 does not have, or that is missing.
    """
    (length, width), found = weights["wpe"].shape, {}
    layers = sum(path.endswith("/ln_1/scale") for path in weights)
    names = leaves(0, length, layers, width)
    del names[TABLE]
    known = {leaf.path for leaf in names.values()}
    own = {path for path in weights if not path.startswith("embed/")}
    if odd := own ^ known - {path for path in known - own if path.endswith("/bias")}:
        raise ValueError(f"GPT-2 of transformers has other parameters: {min(odd)}")
    for name, leaf in names.items():
        array = weights.get(leaf.path)
        array = np.zeros(leaf.shape) if array is None else array
        found[PREFIX + name] = np.asarray(array, np.float32)
    return found


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    content = save(plain, metadata={"format": "pt"})
    write_file(path, lambda file: file.write(content))


def config(
    model: ModelSettings, vocab_size: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of transformers for the model of a run.

    `more` are its fields that say how texts begin, end and are drawn. UserError for a
    knob that GPT-2 of transformers does not have.
    """
    for name in set(BLOCK_KNOBS) - set(_KNOWN_KNOBS):
        if getattr(model, name) != KNOBS[f"model.{name}"].default:
            raise UserError(
                f"model.{name} is {getattr(model, name)}: GPT-2 of transformers has no "
                "such switch, so the model cannot be exported to it"
            )
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
    return {
        "model_type": "gpt2",
        "architectures": [ARCHITECTURES[0]],
        "vocab_size": vocab_size,
        "n_positions": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "activation_function": "gelu" if model.gelu == "exact" else "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": True,
        **dropouts,
        **more,
    }


def write_config(folder: Path, fields: Mapping[str, Any], name: str = CONFIG) -> None:
    """Writes config.json, or another file of settings."""
    write_plain_json(folder / name, fields, indent=2)
