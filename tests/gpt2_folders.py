"""Folders of random GPT-2 models, as other programs write them."""

import json

import ml_dtypes  # noqa: F401  # NumPy then knows bfloat16.
import numpy as np
from safetensors.numpy import save_file

SIZES = {"vocab_size": 97, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def tensors(seed=0, **sizes):
    """{name: float32 array} of a random GPT2LMHeadModel, its head left out."""
    sizes = SIZES | sizes
    width, random = sizes["n_embd"], np.random.default_rng(seed)
    shapes = {
        "wte.weight": (sizes["vocab_size"], width),
        "wpe.weight": (sizes["n_positions"], width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(sizes["n_layer"]):
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes[f"h.{layer}.{name}.weight"] = inputs, outputs
            shapes[f"h.{layer}.{name}.bias"] = (outputs,)
        for name in ("ln_1", "ln_2"):
            shapes |= {
                f"h.{layer}.{name}.{kind}": (width,) for kind in ("weight", "bias")
            }
    return {
        f"transformer.{name}": random.normal(
            "ln" in name and name.endswith("weight"), 0.2, shape
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(
    folder, arrays=None, dtype="float32", prefix="transformer.", seed=0, **config
):
    """Writes config.json and model.safetensors; `config` has fields to change."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays or tensors(seed, **{k: config[k] for k in SIZES if k in config})
    named = {
        name.replace("transformer.", prefix): np.ascontiguousarray(array.astype(dtype))
        for name, array in arrays.items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, **config)
    return folder


def write_config(folder, **fields):
    """Writes config.json; a field that is None is left out."""
    known = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **SIZES}
    fields = {name: v for name, v in (known | fields).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def write_shards(folder, arrays=None):
    """Writes the same in two files and an index."""
    arrays = arrays or tensors()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, names in enumerate((list(arrays)[::2], list(arrays)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder)
    return folder
