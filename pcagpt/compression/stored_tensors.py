"""Reads the safetensors of a model of another architecture.

It finds the token table among them.

Shape letters: V vocabulary, D model width.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pcagpt.compression.sides import OUTPUT
from pcagpt.errors import UserError
from pcagpt.run import hugging_face, other_decoder

# Modules of the table and of the output head, as architectures name them.
_TABLES = (
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings",
    "embeddings",
)  # fmt: skip
_HEADS = ("lm_head", "embed_out", "output", "output_projection")


def find(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """({name: file} of all tensors, the names of those of the table's shape)."""
    record = other_decoder.record_of(folder)
    shape = [record["vocab_size"], record["model"]["n_embd"]]
    files, tables = {}, []
    for path in hugging_face.files(folder):
        with hugging_face.opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # It is no dict.
                files[name] = path
                if file.get_slice(name).get_shape() == shape:
                    tables.append(name)
    return files, tables


def read(files: dict[str, Path], names: Iterable[str]) -> dict[str, np.ndarray]:
    """{name: array} of tensors in their own types; `files` says where they are."""
    found = {}
    for path in sorted({files[name] for name in names}):
        with hugging_face.opened(path) as file:
            own = [name for name in names if files[name] == path]
            found |= {name: file.get_tensor(name) for name in own}
    return found


def dtype_of(folder: Path) -> str:
    """The type that transformers takes if config.json states none.

    It is that of the first floating-point tensor; 'float32' if there is no such tensor.
    """
    for path in hugging_face.files(folder):
        with hugging_face.opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # It is no dict.
                if found := hugging_face.DTYPES.get(file.get_slice(name).get_dtype()):
                    return found
    return "float32"


def table_among(tables: list[str], side: str | None, folder: Path) -> str:
    """The name of the token table among tensors of its shape.

    side: which table of an untied model. UserError if several tensors, or none, could
    be the table.
    """

    def of(modules: tuple[str, ...]) -> list[str]:
        return [name for name in tables if f".{name}".split(".")[-2] in modules]

    heads = of(_HEADS)
    own = of(_TABLES) or [name for name in tables if name not in heads] or heads
    if side == OUTPUT:
        own = heads or [name for name in tables if name not in own]
    if len(own) != 1:
        raise UserError(
            f"{folder}: {len(own)} of its tensors could be the {side or 'token'} table "
            f"({', '.join(own[:3]) or 'none has its shape'}), so that export could not "
            "replace it: such a model cannot be compressed"
        )
    return own[0]


def check_table(folder: Path, side: str, table_VD: np.ndarray) -> None:
    """UserError if export would replace another tensor than this table of the model."""
    files, tables = find(folder)
    name = table_among(tables, side, folder)
    found_VD = read(files, [name])[name]
    if not np.array_equal(np.asarray(found_VD, np.float32), table_VD):
        raise UserError(
            f"{folder}: its tensor {name} is not the {side or 'token'} table of its "
            "model, so that export could not replace it: such a model cannot be "
            "compressed"
        )
