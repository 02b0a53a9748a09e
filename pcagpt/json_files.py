"""Reads and writes JSON files, which store a hash of their content.

JSON is strict in both directions: NaN and the infinities are not JSON.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np

from pcagpt.errors import UserError, unreadable
from pcagpt.files import keep_copy, odd_kind, write_text

_SEAL = "sha256"  # in a JSON object: the hash of all other fields
_LARGEST_JSON = 2**28  # bytes


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file; `strict` converts the value, and a hash seals it.

    A value that was read with `parse_json` still has its old seal; the new seal
    replaces it. A file that a person wrote or changed keeps a second name.
    """
    if path.is_file() and not is_sealed(path):
        keep_copy(path)
    value = {name: entry for name, entry in strict(value).items() if name != _SEAL}
    text = json.dumps(
        value | {_SEAL: _sha256_of_json(value)},
        indent=2,
        allow_nan=False,
        ensure_ascii=False,
    )
    write_text(path, text + "\n")


def write_plain_json(
    path: Path, value: Mapping[str, Any], indent: int | None = None
) -> None:
    """Replaces a JSON file, without a seal: other programs read all fields of it."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def strict(value: Any) -> Any:
    """The value as plain JSON.

    Dataclasses become objects, tuples become lists, NaN and infinities become None.
    """
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(
    path: Path, remedy: str, has_infinities: bool = False
) -> dict[str, Any] | None:
    """The JSON object in a file, without its seal, or None if there is no file.

    `has_infinities` accepts the infinities as None, for files of old versions.

    Raises:
      UserError: the file cannot be read, holds no JSON object, or was changed after
        `write_json` had sealed it; `remedy` ends the message.
    """

    def damaged(reason: object) -> UserError:
        return UserError(f"{path} is damaged ({reason}): {remedy}")

    try:
        if kind := odd_kind(path):
            raise damaged(f"it is {kind}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_JSON:
                raise damaged(f"{size} bytes are too many")
            value = parse_json(file.read(), has_infinities)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(error, path) or damaged(error.strerror) from None
    except ValueError as error:
        raise damaged(error) from None
    if not isinstance(value, dict):
        raise damaged("it holds no JSON object")
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _sha256_of_json(value):
        raise damaged(
            f"its content was changed since it was written; if that was on purpose, "
            f"remove its '{_SEAL}'"
        )
    return value


def is_sealed(path: Path) -> bool:
    """Whether `write_json` wrote the file, and it was not changed since."""
    try:
        is_large = path.stat().st_size > _LARGEST_JSON
        content = None if is_large else parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    is_object = isinstance(content, dict)
    return is_object and content.pop(_SEAL, None) == _sha256_of_json(content)


def parse_json(text: bytes, has_infinities: bool = False) -> Any:
    """The value of strict JSON in UTF-8; ValueError for anything else.

    It also refuses a field that an object has twice with different values. Readers
    differ on the one that counts.
    """

    def refuse(word: str) -> None:
        if word == "NaN" or not has_infinities:
            raise ValueError(f"{word} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    def whole(digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python converts only some thousand digits.
            raise ValueError("a number is too long") from None

    def one_value_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            for name, value in pairs:
                if value != found[name]:
                    raise ValueError(f"'{name:.40}' is there twice")
        return found

    try:
        decoded = text.decode("utf-8-sig")  # Some editors begin a file with a mark.
        value = json.loads(
            decoded,
            object_pairs_hook=one_value_each,
            parse_constant=refuse,
            parse_float=finite,
            parse_int=whole,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # No lone surrogates.
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def check_fields(
    content: Any, fields: Mapping[str, Any], where: object, remedy: str
) -> None:
    """Raises UserError unless an object has fields of these types.

    Args:
      content: of a JSON file, or a part of it.
      fields: {name: type}, as for `has_type`; a field that may be None may be absent.
      where: names the file, and the part of it.
      remedy: ends the message.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} is damaged (it is not a JSON object): {remedy}")
    for name, kind in fields.items():
        value = content.get(name)
        if not has_type(value, kind):
            shown = f"is {repr(value):.40}" if name in content else "is missing"
            raise UserError(f"{where} is damaged ('{name}' {shown}): {remedy}")


def has_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a declared type; numbers must be finite.

    kind: a type, a union or a tuple of types, or one of these, which also declare what
    is in the value: list[X], tuple[X, Y] (a list of this length), dict[str, X], or a
    TypedDict. A field of a TypedDict that may be None may be absent.
    """
    if isinstance(kind, tuple | UnionType):
        kinds = kind if isinstance(kind, tuple) else get_args(kind)
        return any(has_type(value, one) for one in kinds)
    if is_typeddict(kind):
        return type(value) is dict and all(
            has_type(value.get(name), of) for name, of in get_type_hints(kind).items()
        )
    whole, parts = get_origin(kind), get_args(kind)
    if whole is list:
        return type(value) is list and all(has_type(one, parts[0]) for one in value)
    if whole is dict:
        return type(value) is dict and all(
            has_type(one, parts[1]) for one in value.values()
        )
    if whole is tuple:
        is_as_long = type(value) is list and len(value) == len(parts)
        return is_as_long and all(map(has_type, value, parts))
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return value is None if kind is None else type(value) is kind


def _sha256_of_json(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
