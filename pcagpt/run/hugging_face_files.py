"""Writes a model as a Hugging Face folder, which `hugging_face` reads back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pcagpt.config.schema import ModelSettings
from pcagpt.files import sync, write_text
from pcagpt.model import FULL_TABLE
from pcagpt.model.block import LAYER_NORM_EPSILON
from pcagpt.run.gpt2_names import PREFIX, leaves
from pcagpt.run.hugging_face import ARCHITECTURES, CONFIG, WEIGHTS


def write_weights(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors.

    Args:
      folder: exists.
      weights: {parameter path: array} of a model with a full table. Biases that it
        lacks become zeros, because transformers' GPT-2 has all of them.
    """
    (vocab_size, width), positions = weights[FULL_TABLE].shape, weights["wpe"]
    layers = sum(path.endswith("/ln_1/scale") for path in weights)
    tensors = {}
    for name, leaf in leaves(vocab_size, len(positions), layers, width).items():
        array = weights.get(leaf.path)
        array = np.zeros(leaf.shape, np.float32) if array is None else array
        tensors[PREFIX + name] = np.ascontiguousarray(array)
    path = folder / WEIGHTS
    path.touch()
    mode = path.stat().st_mode  # save_file would let only the owner read it.
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
    sync(path)


def write_config(
    folder: Path, model: ModelSettings, vocab_size: int, end_of_text: int | None
) -> None:
    """Writes config.json and generation_config.json.

    `model` is that of the run; `end_of_text` is the id that ends a document.
    """
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
    config = {
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
        **ends,
    }
    _write(folder / CONFIG, config)
    _write(folder / "generation_config.json", {"_from_model_config": True, **ends})


def _write(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON without our seal: other programs read all fields of it."""
    write_text(path, json.dumps(value, indent=2) + "\n")
