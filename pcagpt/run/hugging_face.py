"""A Hugging Face folder of a GPT-2 as a run: its record and its weights.

The folder has config.json and model.safetensors, whole or in shards.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy then knows the bfloat16 of safetensors.
import numpy as np
from safetensors import SafetensorError, safe_open

from pcagpt.data.file_kinds import HEAD_BYTES, foreign_kind
from pcagpt.data.meta import MOST_TOKENS
from pcagpt.errors import UserError, reason_of, unreadable
from pcagpt.files import refuse_odd
from pcagpt.json_files import check_fields, read_json
from pcagpt.run.build import MOST_LAYERS
from pcagpt.run.gpt2_names import (
    HEAD,
    TABLE,
    are_equal,
    leaves,
    plain_names,
    two_values,
)
from pcagpt.unfilled import Place, refuse_unfilled

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# What makes transformers read other weights: a file, and a field of config.json.
_ADAPTER, _OTHER_WEIGHTS = "adapter_config.json", "transformers_weights"
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
# {field: its values with which pcagpt computes the same (int: any whole number),
# transformers' default first}
_SUPPORTED: dict[str, tuple] = {
    "vocab_size": (50257, int),
    "n_positions": (1024, int),
    "n_embd": (768, int),
    "n_layer": (12, int),
    "n_head": (12, int),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "reorder_and_upcast_attn": (False, True),  # It changes only the rounding.
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    # transformers obeys these in models of any architecture.
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "layer_types": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "fusion_config": (None, {}),
}
# transformers reads these names, too.
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SNAPSHOTS = "snapshots"
_RESTORE = "restore it, or download the model again"


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's, of any architecture."""
    if stored_config(folder).keys() & {"architectures", "model_type"}:
        return True
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def snapshot_in(folder: Path) -> Path:
    """The only snapshot in a model's folder of Hugging Face's cache; else `folder`.

    UserError if such a folder has several snapshots, or none.
    """
    real = Path(os.path.realpath(folder))  # `.` and a link have another name.
    inside = folder if real.name == _SNAPSHOTS else folder / _SNAPSHOTS
    whole = real.parent if inside == folder else real
    is_cached = any(one.name.startswith("models--") for one in (folder, whole))
    if not (is_cached and inside.is_dir()):
        return folder
    found = sorted(path for path in inside.iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{inside} is empty: download the model again")
    if len(found) > 1:
        main = whole / "refs/main"  # It names the newest that was asked for.
        name = main.read_text("utf-8", "replace") if main.is_file() else ""
        named = inside / name.strip()
        raise UserError(
            f"{folder} has {len(found)} snapshots: name one, such as "
            f"{named if named in found else found[0]}"
        )
    return found[0]


def stored_config(folder: Path) -> dict[str, Any]:
    """The content of config.json; {} if it is missing or damaged."""
    with contextlib.suppress(UserError):
        return read_json(folder / CONFIG, _RESTORE) or {}
    return {}


def kind_of(folder: Path) -> str | None:
    """The `model_type` in config.json; None if it does not say."""
    kind = stored_config(folder).get("model_type")
    return kind if isinstance(kind, str) else None


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run that has the model of a folder.

    Raises UserError unless it is a GPT-2 that pcagpt computes as transformers does, and
    all its weights are there. Reads no values, except those of a second table.
    """
    config = _config(folder)
    with _tensors(folder, config) as tensors:
        if HEAD in tensors and not are_equal(
            _values(tensors[HEAD]), _values(tensors[TABLE])
        ):
            raise UserError(
                f"{folder}: {HEAD} is another table than {TABLE}, although "
                "tie_word_embeddings is true: pcagpt reads models whose head is the "
                "token table"
            )
    return {"vocab_size": config["vocab_size"], "model": model_settings(config)}


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a `checked_config`."""
    names = ("vocab_size", "n_layer", "n_head", "n_embd")
    # Dropout acts only in training, and whoever trains has a knob for it.
    return {
        **{name: config[name] for name in names},
        "block_size": config["n_positions"],
        "gelu": "exact" if config["activation_function"] == "gelu" else "tanh",
    }


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """{path in our tree: float32 array} of a folder; raises as `record_of` does."""
    config = _config(folder)
    wanted, width = _leaves(config), config["n_embd"]
    with _tensors(folder, config) as tensors:
        found = {leaf.path: _values(tensors[name]) for name, leaf in wanted.items()}
    for layer in range(config["n_layer"]):
        # Our scores have the factor 1 / sqrt(C), so the query takes what differs.
        factor = 1.0
        if not config["scale_attn_weights"]:
            factor *= math.sqrt(width // config["n_head"])
        if config["scale_attn_by_inverse_layer_idx"]:
            factor /= layer + 1
        for name in ("kernel", "bias"):
            found[f"block_{layer}/attn/qkv/{name}"][..., :width] *= factor
    return found


def _leaves(config: Mapping[str, Any]) -> dict:
    sizes = (
        config[name] for name in ("vocab_size", "n_positions", "n_layer", "n_embd")
    )
    return leaves(*sizes)


def _config(folder: Path) -> dict[str, Any]:
    """`checked_config` of a folder."""
    stored = read_json(folder / CONFIG, _RESTORE)
    if stored is None:
        raise UserError(f"{folder} has weights, but no {CONFIG}: {_RESTORE}")
    return checked_config(stored, folder / CONFIG)


def checked_config(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `_SUPPORTED` in config.json; UserError if one is not supported."""
    check_fields(stored, {"architectures": (list, None)}, path, _RESTORE)
    kind, named = stored.get("model_type", "gpt2"), stored.get("architectures")
    unknown = [name for name in named or () if name not in ARCHITECTURES]
    if unknown or kind != "gpt2":
        raise UserError(
            f"{path.parent} holds a {(unknown or [kind])[0]}, which pcagpt does not "
            f"read: give a GPT-2, {ARCHITECTURES[0]}"
        )
    for name, alias in _ALIASES.items():
        one, other = stored.get(name), stored.get(alias)
        if name in stored and alias in stored and one != other:
            raise UserError(
                f"{path}: {name} is {one!r:.60}, but {alias}, another name of it, is "
                f"{other!r:.60}: {_RESTORE}"
            )
    stored = {name: stored[a] for name, a in _ALIASES.items() if a in stored} | stored
    config = {name: stored.get(name, of[0]) for name, of in _SUPPORTED.items()}
    for name, value in config.items():
        default, *others = _SUPPORTED[name]
        if int in others:
            most = MOST_LAYERS if name == "n_layer" else MOST_TOKENS
            is_right = type(value) is int and 0 < value <= most
            wanted = f"a whole number from 1 to {most}"
        else:
            is_right = value in (default, *others) and type(value) is not int
            wanted = " or ".join(str(one) for one in (default, *others))
        if not is_right:
            raise UserError(
                f"{path}: {name} is {value!r:.60}, with which pcagpt would compute "
                f"something else: it must be {wanted}"
            )
    if stored.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(
            f"{path}: n_inner is {stored['n_inner']!r:.60}: it must be 4 * n_embd"
        )
    if config["n_embd"] % config["n_head"]:
        raise UserError(
            f"{path}: n_head is {config['n_head']}, which does not divide n_embd, "
            f"{config['n_embd']}: {_RESTORE}"
        )
    return config


@contextlib.contextmanager
def _tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[dict[str, tuple]]:
    """{name: (open file, name in it, its path)} of all tensors of a model.

    Its head is among them if it is stored. UserError if one is missing, has another
    shape or type, or is not known.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple] = {}
        for path in files(folder):
            with reading(path):
                file = stack.enter_context(_open(path, "numpy"))
                for name, stored in plain_names(file.keys()):
                    tensor = file, stored, path
                    if name in found and not are_equal(
                        _values(found[name]), _values(tensor)
                    ):
                        raise two_values(path, name, stored)
                    found[name] = tensor
        wanted = _leaves(config)
        if lacking := [name for name in wanted if name not in found]:
            raise UserError(
                f"{folder} has no tensor {lacking[0]}, which its {CONFIG} asks for: "
                f"{_RESTORE}"
            )
        if unknown := sorted(found.keys() - wanted.keys() - {HEAD}):
            raise UserError(
                f"{folder} has a tensor {unknown[0]}, which a GPT-2 of its {CONFIG} "
                "does not have: give the folder of a plain GPT-2"
            )
        for name, (file, stored, path) in found.items():
            part = file.get_slice(stored)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            expected = wanted[TABLE if name == HEAD else name].shape
            if shape != expected:
                raise UserError(_shape_error(folder, name, shape, expected))
            if dtype not in DTYPES:
                raise UserError(
                    f"{path}: {name} has the type {dtype}: it must be one of "
                    f"{', '.join(DTYPES)}"
                )
        for path in files(folder):
            check_filled(path)
        yield found


def check_filled(path: Path) -> None:
    """UserError if a part of a file of safetensors was never written."""
    with reading(path), path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
    header.pop("__metadata__", None)
    places = {
        name: Place(tuple(one["shape"]), *(begin + n for n in one["data_offsets"]))
        for name, one in header.items()
    }
    refuse_unfilled(path, places)


def _shape_error(folder: Path, name: str, shape: tuple, expected: tuple) -> str:
    text = f"{folder}: {name} is {shape}, but its {CONFIG} asks for {expected}"
    if name in (TABLE, HEAD) and shape[1:] == expected[1:]:
        return (
            f"{text}: its vocabulary is padded or cut; set vocab_size to {shape[0]} if "
            "all these rows are tokens, otherwise remove the others"
        )
    return f"{text}: {_RESTORE}"


def _values(tensor: tuple) -> np.ndarray:
    """A tensor of `_tensors` as float32."""
    file, stored, path = tensor
    with reading(path), np.errstate(over="ignore"):
        return np.array(file.get_tensor(stored), np.float32)


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of weights.

    It counts pickles, too, but pcagpt does not read them.
    """
    known = (folder / WEIGHTS, folder / INDEX, *_pickles(folder))
    return any(path.is_file() for path in known)


def _pickles(folder: Path) -> list[Path]:
    return sorted(folder.glob("pytorch_model*.bin"))


def files(folder: Path) -> list[Path]:
    """The files of a folder's weights; each tensor is in one of them.

    UserError if one is missing, if two hold one tensor, or if transformers would read
    others, too.
    """
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder} has an {_ADAPTER}: transformers adds this adapter to the "
            "weights where peft is installed. Merge it (merge_and_unload of peft), or "
            "remove it"
        )
    if (named := stored_config(folder).get(_OTHER_WEIGHTS)) is not None:
        raise UserError(
            f"{folder / CONFIG}: {_OTHER_WEIGHTS} is {named!r:.60}, a file that "
            f"transformers reads in place of {WEIGHTS}: rename the file, and remove "
            "the field"
        )
    index = read_json(folder / INDEX, _RESTORE)
    if (folder / WEIGHTS).is_file():
        shards = (index or {}).get("weight_map")
        for name in {*shards.values()} if isinstance(shards, dict) else ():
            if name != WEIGHTS and (folder / str(name)).is_file():
                raise UserError(
                    f"{folder} has {WEIGHTS}, which would be read, and {name} of "
                    f"another download, which its {INDEX} names: remove one of them"
                )
        return [folder / WEIGHTS]
    if index is None:
        if pickled := _pickles(folder):
            raise UserError(
                f"{pickled[0]} is not read, because a pickle can run code: convert it "
                "with transformers, AutoModelForCausalLM.from_pretrained(FOLDER)."
                "save_pretrained(NEW_FOLDER)"
            )
        raise UserError(f"{folder} has a {CONFIG}, but no {WEIGHTS}: download it, too")
    check_fields(index, {"weight_map": (dict,)}, folder / INDEX, _RESTORE)
    names = sorted({str(name) for name in index["weight_map"].values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, which its {INDEX} names: {_RESTORE}"
            )
    holder: dict[str, str] = {}
    for name in names:
        path = folder / name
        with opened(path) as file:
            for tensor in file.keys():  # noqa: SIM118  # It is no dict.
                if (other := holder.setdefault(tensor, name)) != name:
                    raise UserError(
                        f"{folder}: {other} and {name} both hold {tensor}, as parts of "
                        "two downloads do: download the model again"
                    )
    return [folder / name for name in names]


@contextlib.contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A file of safetensors; errors are as for `reading`."""
    with reading(path), _open(path, framework) as file:
        yield file


def _open(path: Path, framework: str) -> Any:
    """A file of safetensors, which is read where it is used, without a memory map.

    The system ends a process that reads a mapped file after its end is cut off.
    """
    return safe_open(path, framework=framework, backend="pread")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """An error that a damaged file can cause becomes a UserError."""
    refuse_odd(path)
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if found := unreadable(error):
            raise found from None
        with open(path, "rb") as file:
            kind = foreign_kind(file.read(HEAD_BYTES))
        reason = kind or reason_of(error)
        raise UserError(f"{path} cannot be read ({reason}): {_RESTORE}") from None
