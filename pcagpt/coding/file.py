"""The file of a coded table, `table.pcat`.

    8 bytes     "PCATABLE"
    2 bytes     version of the layout, uint16
    2 bytes     length of the header, uint16
    header      a JSON object in UTF-8, padded by spaces to `HEADER_BYTES`:
                  shape           [V, D]
                  dtype           "float32", of the decoded table
                  directions      K
                  step            of class 0
                and the fields of `Description`
    words       uint32, of `payload`
    32 bytes    SHA-256 of all before

Integers are little-endian. The size of the header does not depend on its values: a loss
that is measured on the decoded table can be added without changing the file's size.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.array_files import memory_bytes
from pcagpt.coding.payload import from_words, to_words
from pcagpt.coding.table import CodedTable
from pcagpt.errors import UserError, unreadable
from pcagpt.files import open_file, write_file
from pcagpt.json_files import check_fields, parse_json, strict

MAGIC, VERSION = b"PCATABLE", 1
HEADER_BYTES = 512
_START, _SEAL = len(MAGIC) + 4, 32  # bytes before the header and after the words
_FIELDS = {
    "shape": (list,),
    "dtype": (str,),
    "directions": (int,),
    "step": (float,),
    "method": (str,),
    "corpus": (str, None),
    "checkpoint": (str, None),
    "predicted_loss": (float, None),
    "measured_loss": (float, None),
}
REMEDY = "write it again, or copy it again from where it was written"


@dataclasses.dataclass(frozen=True)
class Description:
    """Where a coded table comes from, and what it costs."""

    method: str  # name of the method, such as `CODED`
    corpus: str | None = None  # SHA-256, hexadecimal
    checkpoint: str | None = None  # SHA-256, hexadecimal
    predicted_loss: float | None = None  # added loss in nats per token
    measured_loss: float | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Description":
        """From JSON; leaves out fields that a later version has added."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: stored[name] for name in names if name in stored})


def file_bytes(words: np.ndarray) -> int:
    """Size of the file that holds some words."""
    return _START + HEADER_BYTES + words.nbytes + _SEAL


def to_bytes(coded: CodedTable, words: np.ndarray, description: Description) -> bytes:
    """The file of a coded table; `words` are its `to_words`."""
    header = {
        "shape": list(coded.shape),
        "dtype": "float32",
        "directions": len(coded.symbols),
        "step": float(coded.step),
    } | dataclasses.asdict(description)
    text = json.dumps(strict(header), separators=(",", ":"), allow_nan=False)
    encoded = text.encode().ljust(HEADER_BYTES)
    if len(encoded) > HEADER_BYTES:
        raise ValueError(f"a header of {len(encoded)} bytes exceeds {HEADER_BYTES}")
    content = MAGIC + np.array([VERSION, HEADER_BYTES], "<u2").tobytes() + encoded
    content += words.astype("<u4").tobytes()
    return content + hashlib.sha256(content).digest()


def write(path: Path, coded: CodedTable, description: Description) -> None:
    """Replaces a file by that of a coded table."""
    content = to_bytes(coded, to_words(coded), description)
    write_file(path, lambda file: file.write(content))


def read(path: Path) -> tuple[CodedTable, Description]:
    """The table in a file, and what it says about it.

    Raises UserError if the file is missing, damaged, of a later version, or if what its
    header declares does not fit into memory; nothing is allocated for it before.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > memory_bytes():
                raise UserError(f"{path} has {size:,} bytes: it is no coded table")
            content = file.read()
    except OSError as error:
        raise unreadable(error, path) or UserError(
            f"{path}: {error.strerror}"
        ) from None
    try:
        return _parsed(content, path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from None


def _parsed(content: bytes, path: Path) -> tuple[CodedTable, Description]:
    """As `read`, of the content of a file; ValueError if it is damaged."""
    if not content.startswith(MAGIC):
        raise UserError(f"{path} is no coded table: it does not begin as one")
    if len(content) < _START + _SEAL:
        raise ValueError("it ends early")
    version, length = np.frombuffer(content, "<u2", 2, len(MAGIC)).tolist()
    if version > VERSION:
        raise UserError(
            f"{path} has version {version} of the layout, this pcagpt reads up to "
            f"{VERSION}: install a later pcagpt"
        )
    if hashlib.sha256(content[:-_SEAL]).digest() != content[-_SEAL:]:
        raise ValueError("its content does not match its checksum")
    end = _START + length
    if end > len(content) - _SEAL or (len(content) - _SEAL - end) % 4:
        raise ValueError("its parts do not fill it")
    header = parse_json(content[_START:end])
    check_fields(header, _FIELDS, f"the header of {path}", REMEDY)
    shape, directions, step = header["shape"], header["directions"], header["step"]
    if len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape {shape!r:.60}")
    if header["dtype"] != "float32":
        raise ValueError(f"dtype {header['dtype']!r:.20}")
    if not 0 <= directions <= shape[1] or not 0 < step < np.inf:
        raise ValueError(f"{directions} directions of {shape[1]}, step {step}")
    # The dense table, its symbols and the basis.
    needed = 4 * shape[0] * shape[1] + 2 * directions * shape[0]
    needed += 8 * (directions + 1) * shape[1]
    if needed > memory_bytes():
        raise UserError(
            f"{path} declares a table of shape {shape}, for which {needed:,} bytes are "
            f"needed; this machine has a memory of {memory_bytes():,}: read it on a "
            "larger one, or write it again if it is damaged"
        )
    words = np.frombuffer(content[end:-_SEAL], "<u4").astype(np.uint32)
    coded = from_words(words, tuple(shape), directions, step)
    coded.dense()  # ValueError if its integers are too large.
    return coded, Description.of(header)
