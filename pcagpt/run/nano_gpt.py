"""nanoGPT's ckpt.pt as a run: its record and its weights. Needs PyTorch to read it."""

import contextlib
import mmap
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pcagpt.data.meta import MOST_TOKENS
from pcagpt.errors import OF_NO_FILE, UserError, reason_of, unreadable
from pcagpt.file_hashes import read_once
from pcagpt.json_files import check_fields
from pcagpt.run.build import MOST_LAYERS
from pcagpt.run.gpt2_names import (
    HEAD,
    TABLE,
    Leaf,
    are_equal,
    leaves,
    plain_names,
    two_values,
)
from pcagpt.unfilled import refuse_holes

CHECKPOINT = "ckpt.pt"
_ARGUMENTS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
_REMEDY = "give a checkpoint that nanoGPT's train.py wrote"


def is_model(folder: Path) -> bool:
    """Whether a folder holds a ckpt.pt."""
    return (folder / CHECKPOINT).is_file()


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run that has the model of a folder.

    Raises UserError unless the file is a checkpoint of nanoGPT, with all its weights.
    """
    arguments, _ = _read(folder)
    # Its GELU is exact since June 2023. Dropout acts only in training, and whoever
    # trains has a knob for it.
    model = {name: arguments[name] for name in _ARGUMENTS}
    model |= {"bias": arguments["bias"], "gelu": "exact"}
    return {"vocab_size": arguments["vocab_size"], "model": model}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """{path in our tree: float32 array} of a folder; raises as `record_of` does."""
    arguments, tensors = _read(folder)
    found = {}
    for name, leaf in _leaves(arguments).items():
        array = tensors.pop(name).float().numpy()  # Frees its memory.
        array = array.T if _is_transposed(leaf) else array
        found[leaf.path] = np.array(array, np.float32, order="C")
    return found


def _leaves(arguments: dict[str, Any]) -> dict[str, Leaf]:
    sizes = (arguments[n] for n in ("vocab_size", "block_size", "n_layer", "n_embd"))
    return leaves(*sizes, bias=arguments["bias"])


def _check_masks(path: Path, model: dict[str, Any]) -> None:
    """UserError if a stored mask of attention is not that of nanoGPT.

    nanoGPT computes with it where it has no flash attention. Programs made from it may
    store another one, such as that of a window.
    """
    import torch

    for name in model.keys() - {stored for _, stored in plain_names(model)}:
        mask = model[name]
        is_there = isinstance(mask, torch.Tensor) and mask.layout == torch.strided
        if is_there and not mask.is_meta and mask.dim() > 1:
            causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
            if not bool(((mask != 0) == causal).all()):
                raise UserError(
                    f"{path}: the mask {name} is not causal attention's, and pcagpt "
                    f"would ignore it: {_REMEDY}"
                )


def _is_transposed(leaf: Leaf) -> bool:
    return leaf.path.endswith("/kernel")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_args, {plain name: tensor}) of a folder's checkpoint."""
    path = folder / CHECKPOINT
    stored = _load(path)
    import torch

    fields = {"model": (dict,), "model_args": (dict,)}
    stored = stored if isinstance(stored, dict) else {}
    stored = {name: _as_dict(stored.get(name)) for name in fields}
    check_fields(stored, fields, path, _REMEDY)
    arguments = {"bias": True} | stored["model_args"]  # The oldest have no switch.
    known = {*_ARGUMENTS, "bias", "dropout"}
    # Programs made from nanoGPT have switches of their own.
    for name, value in arguments.items():
        if name not in known and value is not None and value is not False:
            raise UserError(
                f"{path}: model_args has {name!s:.60} = {value!s:.60}, which nanoGPT "
                "does not have and pcagpt would ignore: if it does not change what the "
                "model computes, save the checkpoint without it"
            )
    kinds = dict.fromkeys(_ARGUMENTS, (int,)) | {"bias": (bool,)}
    check_fields(arguments, kinds, f"{path}: model_args", _REMEDY)
    for name in _ARGUMENTS:
        most = MOST_LAYERS if name == "n_layer" else MOST_TOKENS
        if not 0 < arguments[name] <= most:
            raise UserError(
                f"{path}: model_args has {name} = {arguments[name]}, it must be from "
                f"1 to {most}: {_REMEDY}"
            )
    if arguments["n_embd"] % arguments["n_head"]:
        raise UserError(
            f"{path}: model_args has n_head = {arguments['n_head']}, which does not "
            f"divide n_embd = {arguments['n_embd']}: {_REMEDY}"
        )
    model, wanted = stored["model"], _leaves(arguments)
    if odd := [name for name in model if not isinstance(name, str)]:
        raise UserError(f"{path}: {odd[0]!r:.60} is no name of a tensor: {_REMEDY}")
    _check_masks(path, model)
    tensors: dict[str, Any] = {}
    for name, at in plain_names(model):
        both = tensors.setdefault(name, model[at]), model[at]
        if both[0] is not both[1] and not (
            all(map(_is_plain, both)) and are_equal(*both)
        ):
            raise two_values(path, name, at)
    lacking = [name for name in wanted if name not in tensors]
    unknown = sorted(tensors.keys() - wanted.keys() - {HEAD})
    if lacking or unknown:
        problem = "has no" if lacking else "has an unknown"
        raise UserError(f"{path} {problem} tensor {(lacking or unknown)[0]}: {_REMEDY}")
    for name in wanted.keys() | {HEAD} & tensors.keys():
        if not _is_plain(tensors[name]):
            raise UserError(f"{path}: {name} is no tensor of real numbers: {_REMEDY}")
    for name, leaf in wanted.items():
        shape = tuple(tensors[name].shape)
        expected = leaf.shape[::-1] if _is_transposed(leaf) else leaf.shape
        if shape != expected:
            raise UserError(
                f"{path}: {name} is {shape}, but its model_args ask for {expected}: "
                f"{_REMEDY}"
            )
        array = tensors[name] = tensors[name].detach().resolve_neg()
        array = array if array.stride(-1) == 1 else array.T  # The rows of the file.
        refuse_holes(path, name, array.contiguous().view(torch.uint8).numpy())
    if HEAD in tensors and not are_equal(tensors[HEAD], tensors[TABLE]):
        raise UserError(
            f"{path}: {HEAD} is another table than {TABLE}: pcagpt reads models whose "
            "head is the token table"
        )
    return arguments, tensors


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of floating point numbers that are there."""
    import torch

    is_tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_tensor and value.is_floating_point() and not value.is_meta


def _as_dict(value: Any) -> Any:
    """A dict in place of an OrderedDict."""
    return dict(value) if isinstance(value, dict) else value


def _load(path: Path) -> Any:
    """What torch reads without running code; UserError if it cannot.

    Tensors outside `model` may be zeros.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} can only be read with PyTorch: pip install 'pcagpt[hf]'"
        ) from None
    try:
        _check_sums(path)
        # No memory map: nanoGPT writes the file in place, and the system ends a process
        # that reads a mapped file after its end is cut off.
        with (
            torch.serialization.safe_globals(_of_numbers()),
            path.open("rb") as file,
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            if (stored := _without_the_rest(file)) is not None:
                return stored
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OF_NO_FILE:
        raise
    # torch raises errors of many types for other content.
    except Exception as error:
        if found := unreadable(error):
            raise found from None
        refused = isinstance(error, pickle.UnpicklingError) and str(error)
        if refused and (name := re.search(r"(?:GLOBAL |<class ')([\w.]+)", refused)):
            raise UserError(
                f"{path} is not read, because it holds more than tensors and plain "
                f"values ({name[1]}): save it again with text or numbers in place of "
                f"that, or {_REMEDY}"
            ) from None
        reason = "a pickle of another kind" if refused else reason_of(error)
        raise UserError(
            f"{path} cannot be read ({reason}): restore it, or {_REMEDY}"
        ) from None


def _without_the_rest(file: BinaryIO) -> Any:
    """The content of a file, with zeros for all tensors but those of `model`.

    The state of the optimizer takes twice the memory of the model. None if nothing can
    be left out.
    """
    # torch reads all storages in the same order each time, so it finds the values. The
    # places that it tells are those where its own writer would put them.
    with contextlib.suppress(Exception):  # An error comes again from a plain load.
        _, wanted = _with_storages(file, set())
        stored, found = _with_storages(file, wanted)
        if found == wanted:  # Otherwise the file changed in between.
            return stored
    return None


def _with_storages(file: BinaryIO, wanted: set[int]) -> tuple[Any, set[int]]:
    """(content with values in the `wanted` storages only, those that `model` needs).

    Storages are told by their number in the order of reading.
    """
    import torch

    storages: list[Any] = []
    last = max(wanted, default=-1)
    with contextlib.ExitStack() as stack:

        def read(storage: Any, _: str) -> Any:
            size = storage.nbytes()
            if not size:  # torch may ask for it again each time.
                return storage
            if len(storages) not in wanted:
                # The system gives no memory for these zeros, but malloc may.
                zeros = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                storage = torch.frombuffer(zeros, dtype=torch.uint8).untyped_storage()
            storages.append(storage)
            if len(storages) == last + 1:
                stack.enter_context(torch.serialization.skip_data())
            return storage

        if not wanted:
            stack.enter_context(torch.serialization.skip_data())
        file.seek(0)
        stored = torch.load(file, map_location=read, weights_only=True)
    places = {one.untyped_storage().data_ptr() for one in stored["model"].values()}
    return stored, {n for n, one in enumerate(storages) if one.data_ptr() in places}


def _of_numbers() -> list[Any]:
    """What the pickles of NumPy's numbers name, such as a best_val_loss."""
    number = np.float64().__reduce__()[0]
    # NumPy 1 had another name for it.
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    kinds = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}
    return [*((number, name) for name in names), np.dtype, *kinds]


@read_once
def _check_sums(path: Path) -> None:
    """BadZipFile if a record has another sum than the file says.

    torch does not look at the sums.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if not record.CRC:  # torch was told to write no sums.
                continue
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass
