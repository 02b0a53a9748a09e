"""How a call from Python becomes settings, and its errors name arguments."""

import contextlib
import math
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from pcagpt import process
from pcagpt.config import KNOBS, Settings, validate
from pcagpt.config.checks import wrong_type
from pcagpt.config.command_line import check_place
from pcagpt.data.tokenizer import END_OF_TEXT, RANKS
from pcagpt.errors import UserError, as_os_error

BOUNDS = ("max_bytes", "max_added_loss")
# What the knobs of the command line are called here.
ARGUMENTS = {
    "data.source": "data",
    "data.tokenizer": "tokenizer",
    "model.compute_dtype": "compute_dtype",
    "sample.prompt": "the text",
    "sample.tokens": "max_tokens",
    **{f"sample.{name}": name for name in ("temperature", "top_k", "top_p")},
    **{f"compress.{name}": name for name in (*BOUNDS, "methods", "bands")},
    "evaluate.max_tokens": "max_tokens",
    "factorize.method": "method",
    "factorize.singular_value_split": "singular_value_split",
}


@contextlib.contextmanager
def call(shows_progress: bool | None = None, *, model: str = "path") -> Iterator[None]:
    """What all work runs in: pcagpt is a guest, and errors name arguments.

    JAX computes as in a command, whatever the program has chosen. None: shows progress
    as the call around it does. model: the argument that names the model.
    """
    if shows_progress is None:
        shows_progress = process.is_guest() and process.shows_progress()
    try:
        with process.as_guest(shows_progress), _own_jax(), as_os_error():
            yield
    except UserError as error:
        raise type(error)(_in_python(str(error), model)) from None


@contextlib.contextmanager
def _own_jax() -> Iterator[None]:
    """JAX's default for each setting that changes numbers or stops a computation."""
    with (
        jax.enable_x64(False),
        jax.default_matmul_precision(None),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
        jax.no_tracing(False),
        jax.no_execution(False),
        jax.debug_key_reuse(False),
    ):
        yield


def _in_python(message: str, model: str) -> str:
    """A message of the command line in terms of this module."""
    for path, name in (ARGUMENTS | {"model_path": model}).items():
        message = re.sub(rf"(?:--config\.)?\b{re.escape(path)}\b", name, message)
    message = message.replace("--config.workdir", "folder")
    message = re.sub(r"--config\.(?=\w)", "", message)
    message = message.replace("whole numbers separated by commas", "whole numbers")
    message = message.replace("while this command used it", "meanwhile")
    again = "load the model again and repeat the call"
    message = message.replace("run the same command again", again)
    return re.sub(r"(?<=as in )(\w+)=(\S+)$", _example, message)


def _example(found: re.Match[str]) -> str:
    """A value of the command line, as an argument is written: bands=[1, 7]."""
    name, value = found.groups()
    if re.fullmatch(r"\d+(,\d+)+", value):
        return f"{name}=[{value.replace(',', ', ')}]"
    is_text = not re.fullmatch(r"[-+.e\d]+|True|False", value)
    return f"{name}={value!r}" if is_text else found[0]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text of a program.

    UserError for half of a surrogate pair: tiktoken would read U+FFFD in its place.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text has half of a surrogate pair: decode it anew")
    return tokenizer.encode(text, allowed_special={END_OF_TEXT})


def check_is_no_file(text: str, what: str) -> None:
    """UserError if a text is the path of a file: nobody measures the path itself."""
    try:
        is_file = Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # It is too long, or begins with "~".
        return
    if is_file:
        raise UserError(
            f"{what} is {text!r}, the path of a file: give the text in it, for example "
            "Path(...).read_text()"
        )


def settings_of(task: str, given: Mapping[str, Any]) -> Settings:
    """Settings of a task with the defaults and these knobs; UserError as on a command.

    Also raises UserError for a value of another type.
    """
    values: dict[str, Any] = {"task": task}
    for path, value in given.items():
        kind, value = KNOBS[path].type, plain(value)
        if kind is tuple and not isinstance(value, str) and np.iterable(value):
            value = tuple(map(plain, value))
        elif kind is float and type(value) is int:
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
        if type(value) is not kind:
            raise wrong_type(path, value)
        values[path] = value
    settings = Settings().replace(values)
    validate(settings)
    return settings


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same in any working directory; ~ is the home.

    Raises UserError for what is no path, is not UTF-8, or leads to a place that is not.
    """
    with contextlib.suppress(TypeError, RuntimeError):  # RuntimeError: ~NOBODY
        expanded = Path(path).expanduser()
        if "\0" not in str(expanded):
            check_place(str(expanded))
            return str(expanded.absolute())
    raise UserError(f"{path!r} is no path: give the path of a folder")


def named(tokenizer: str) -> str:
    """A tokenizer's name, or the `absolute` path of the file that is there."""
    is_name = not isinstance(tokenizer, str) or tokenizer in ("auto", *RANKS)
    if is_name or not os.path.exists(os.path.expanduser(tokenizer)):
        return tokenizer  # What is no name either is refused where it is used.
    return absolute(tokenizer)


def plain(value: Any) -> Any:
    """A number of NumPy as one of Python; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def list_of(name: str, values: Any) -> list[str]:
    """The texts of an argument: one text, several, or none ('' and None).

    Raises UserError if it holds anything else.
    """
    if values is None or isinstance(values, str):
        return [values] if values else []
    found = list(values) if isinstance(values, Iterable) else [None]
    if all(isinstance(value, str) for value in found):
        return found
    raise UserError(f"{name} is {values!r}: it must hold texts")


def array_of(values: ArrayLike, what: str, remedy: str) -> np.ndarray:
    """Values as an array of NumPy; UserError if NumPy makes none of them."""
    if np.ma.is_masked(values):
        raise UserError(f"{what} has masked values: fill them, with `.filled(...)`")
    try:
        return np.asarray(values)
    # PyTorch raises the first two for tensors with a gradient, of bfloat16 or on a GPU.
    except (RuntimeError, TypeError, ValueError):
        kind = type(values).__name__
        raise UserError(
            f"{what} is a {kind} that NumPy cannot read: {remedy}"
        ) from None


def ids_of(tokens: ArrayLike, known: int) -> np.ndarray:
    """Token ids as int32 [T]; UserError unless all are below `known`."""
    remedy = "give one list of whole numbers, or a str"
    is_view = isinstance(tokens, memoryview) and tokens.format in ("B", "b", "c")
    if is_view or isinstance(tokens, bytes | bytearray | mmap.mmap):
        raise UserError(
            f"a text is given as {type(tokens).__name__}, which holds bytes: decode "
            "it, for example with bytes(text).decode()"
        )
    array = array_of(tokens, "the text", remedy)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"token ids have shape {array.shape} and dtype {array.dtype}: {remedy}"
        )
    if isinstance(tokens, list | tuple) and any(type(one) is bool for one in tokens):
        raise UserError(f"True and False are no token ids: {remedy}")  # NumPy: 1 and 0.
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= known:
        raise UserError(
            f"token id {low if low < 0 else high} is unknown: the ids of this model "
            f"are 0 to {known - 1}"
        )
    return array.astype(np.int32)
