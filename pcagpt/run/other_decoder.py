"""A folder of transformers with another architecture than a tied GPT-2, as a run.

pcagpt measures such a model in PyTorch (`compression.decoder`), and compresses its
table. It does not train it. The folder has config.json and safetensors.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.config.tasks import TASKS
from pcagpt.errors import UserError
from pcagpt.file_hashes import sha256_of_file
from pcagpt.json_files import read_json
from pcagpt.run import hugging_face

IN_GGUF = " in GGUF"  # ends the architecture of a model in such a file
_REMEDY = (
    "restore it, or download the model again; if it has Infinity, open and save the "
    "model once with transformers, which writes it as JSON"
)
# Ends of architectures with a head that predicts no tokens. transformers would open the
# body of a tied model, and drop that head.
_NO_TOKENS = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")
# Fields of a decoder that does not work alone.
_READS_MORE = ("is_encoder_decoder", "add_cross_attention")
# Names of the table's width in configs. If a config has two, the first counts.
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "n_embed")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that is no tied GPT-2."""
    config = hugging_face.stored_config(folder)
    kind, tied = hugging_face.kind_of(folder), config.get("tie_word_embeddings")
    return kind is not None and (kind != "gpt2" or tied is False)


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run with the model of a folder; reads no weights.

    UserError if the folder lacks weights, or its config.json the sizes of the table, or
    for a model that predicts no tokens.
    """
    config = read_json(folder / hugging_face.CONFIG, _REMEDY)
    if config is None:
        raise UserError(f"{folder} lost its {hugging_face.CONFIG}: {_REMEDY}")
    hugging_face.files(folder)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    named = config.get("architectures")
    architecture = str(
        named[0] if isinstance(named, list) and named else hugging_face.kind_of(folder)
    )
    if architecture.endswith(_NO_TOKENS):
        raise UserError(
            f"{folder} holds a {architecture}, which predicts no tokens: give a "
            "language model, or correct `architectures` in its config.json"
        )
    for name in _READS_MORE:
        if config.get(name) or text.get(name):
            raise UserError(
                f"{folder}: {name} in config.json says that each token also reads what "
                "an encoder makes, of speech for example, and pcagpt would leave it "
                "out: give a language model without an encoder"
            )
    width = next((name for name in _WIDTHS if name in text), "hidden_size")
    sizes = {name: text.get(name) for name in ("vocab_size", width)}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(
                f"{folder}: its config.json has no {name} of a language model: give "
                "a model that AutoModelForCausalLM of transformers opens"
            )
    depth = next((text[name] for name in _DEPTHS if name in text), None)
    return {
        "vocab_size": sizes["vocab_size"],
        "model": model_record(sizes[width], depth),
        "architecture": architecture,
    }


def model_record(width: int, depth: Any) -> dict[str, int]:
    """Width and, if it is known, depth, as knobs of `model`.

    One head fits any width: nothing of ours computes with such a model.
    """
    layers = {"n_layer": depth} if type(depth) is int and depth > 0 else {}
    return {"n_embd": width, "n_head": 1} | layers


def digests(folder: Path) -> dict[str, str]:
    """{file: sha256} of the config and the weights."""
    names = [folder / hugging_face.CONFIG, *hugging_face.files(folder)]
    return {path.name: sha256_of_file(path) for path in names}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Always raises UserError: only transformers knows what to do with them."""
    raise refusal(folder, record_of(folder)["architecture"])


def refusal(folder: Path, architecture: str) -> UserError:
    """The error of a command that cannot compute the model."""
    taking = [f"`{name}`" for name, task in TASKS.items() if task.any_architecture]
    verb = "takes" if len(taking) == 1 else "take"
    line = f"{folder} holds a {architecture}: only {' and '.join(taking)} {verb} it"
    if not architecture.endswith(IN_GGUF):
        line += "; `export` takes the compressed tables that `compress` wrote"
    return UserError(line)


def only_a_table(folder: str | Path, architecture: str) -> UserError:
    """The error of a command for a model, given a compressed table of such a model."""
    line = f"{folder} holds only the compressed table of a {architecture}"
    if architecture.endswith(IN_GGUF):
        return UserError(f"{line}; pcagpt exports no model that came as GGUF")
    return UserError(f"{line}: export it with --config=configs/export.py")
