"""Ways to damage a file. Each changes it in place and says what it did."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torture.scene import arrays_of

PAGE = 4096


def flip(path: Path, chance: random.Random) -> str:
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"bit {place % 8} of byte {place // 8}"


def truncate(path: Path, chance: random.Random) -> str:
    """Cuts the end off; one time in four, everything."""
    size = path.stat().st_size
    length = 0 if chance.random() < 0.25 else chance.randrange(size)
    path.write_bytes(path.read_bytes()[:length])
    return f"{length} of {size} bytes"


def delete(path: Path, _: random.Random) -> str:
    """Removes the file."""
    path.unlink()
    return "gone"


def zero(path: Path, chance: random.Random) -> str:
    """Zeros one page, as after a power cut."""
    data = bytearray(path.read_bytes())
    begin = PAGE * chance.randrange(-(-len(data) // PAGE))
    end = min(begin + PAGE, len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return f"zeros in {begin}:{end}"


def append(path: Path, chance: random.Random) -> str:
    """Appends garbage."""
    garbage = chance.randbytes(chance.choice((1, 2, 64, PAGE)))
    with path.open("ab") as file:
        file.write(garbage)
    return f"{len(garbage)} bytes more"


def reshape(path: Path, chance: random.Random) -> str:
    """Gives JSON another shape: the whole, or one value in it."""
    odd = chance.choice(([], {}, None, "x", 3, -1.5, [[1]], {"a": 1}, True))
    value, rest = _json(path)
    where = "the whole"
    if chance.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        value = odd
    else:
        holder, where = value, ""
        while True:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = chance.choice(list(keys))
            where += f".{key}"
            inner = holder[key]
            is_leaf = not isinstance(inner, (dict, list)) or not inner
            if is_leaf or chance.random() < 0.4:
                break
            holder = inner
        if chance.random() < 0.3:
            del holder[key]
            odd = "gone"
        else:
            holder[key] = odd
    _write_json(path, value, rest)
    return f"{where.strip('.')} is {odd!r}"


def not_finite(path: Path, chance: random.Random) -> str:
    """Writes NaN or infinity into an array or a JSON file."""
    bad = chance.choice((np.nan, np.inf))
    if path.suffix in (".npy", ".npz"):
        arrays = arrays_of(path)
        real = [name for name, array in arrays.items() if array.dtype.kind == "f"]
        if not real:
            return flip(path, chance)
        name = chance.choice(real)
        arrays[name].flat[chance.randrange(arrays[name].size)] = bad
        if path.suffix == ".npy":
            np.save(path, arrays[""])
        else:
            np.savez(path, **arrays)
        return f"{bad} in {name or 'the array'}"
    value, rest = _json(path)
    numbers = [key for key, entry in value.items() if isinstance(entry, float)]
    value[chance.choice(numbers or list(value) or ["loss"])] = bad
    _write_json(path, value, rest)
    return f"{bad} in it"


def _json(path: Path) -> tuple[Any, list[str]]:
    """The value of a JSON file, or of the first line of JSONL; and the other lines."""
    text = path.read_text("utf-8")
    first, *rest = text.splitlines() if path.suffix == ".jsonl" else [text]
    return json.loads(first), rest


def _write_json(path: Path, value: Any, rest: list[str]) -> None:
    path.write_text("\n".join([json.dumps(value), *rest, ""]), "utf-8")


def save_nan(checkpoint: str, number: int) -> str:
    """Saves the weights of a checkpoint again, with one NaN in the token table.

    A packed table has floating point only in what its bands share.

    Call it in a child: it starts JAX. The checkpoint loses its list of digests, as if
    an older version had saved it.
    """
    import orbax.checkpoint as ocp

    from pcagpt.run.checkpoint import load_weights

    found = load_weights(checkpoint)
    is_packed = "embed" not in found["params"]
    holder = found["constants" if is_packed else "params"]["embed"]
    part, name = ("directions", "mean") if is_packed else ("band_0", "wte")
    holder[part][name] = array = np.array(holder[part][name])
    array.flat[number % array.size] = np.nan
    weights = Path(checkpoint).absolute() / "weights"
    shutil.rmtree(weights)
    weights.with_name("digests.json").unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(weights, found)
    return "NaN in its table"


WAYS: dict[str, Callable[[Path, random.Random], str]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": delete,
    "zero page": zero,
    "append": append,
    "shape": reshape,
    "NaN": not_finite,
}


def ways_for(path: Path) -> list[str]:
    """The ways that make sense for a file."""
    ways: list[Any] = ["truncate", "delete"]
    if path.stat().st_size:
        ways += ["flip", "zero page", "append"]
    if path.suffix in (".json", ".jsonl"):
        ways += ["shape", "shape", "NaN"]
    if path.suffix in (".npy", ".npz"):
        ways += ["NaN"]
    return ways if path.stat().st_size else ["delete", "append"]
