"""Recognises files that are neither token ids nor text, and ids of another layout."""

import re

import numpy as np

HEAD_BYTES = 1 << 16  # the part of a file that is looked at
_FROM_JSON = (
    "write only the texts that are in it, with <|endoftext|> between them, or, if JSON "
    "is the text, write <|endoftext|> before it"
)
_FOREIGN = {
    rb"\x93NUMPY": "a .npy file: write its ids with tofile() instead of np.save()",
    rb"PK\x03\x04": "a zip archive, perhaps an .npz or a PyTorch file",
    rb"\x1f\x8b\x08": "compressed: unpack it with gunzip",
    rb"BZh[1-9]1AY": "compressed: unpack it with bunzip2",
    rb"\xfd7zXZ": "compressed: unpack it with xz -d",
    rb"\x28\xb5\x2f\xfd": "compressed: unpack it with zstd -d",
    rb"\x80[\x04\x05]\x95.{6}\0\0": "a pickle",
    rb"\x80[\x02\x03][\]}(cX](?=.*\.\Z)": "a pickle",
    rb"\x89HDF\r\n": "an HDF5 file",
    rb".{6}\0\0\{\"": "a safetensors file",
    rb"PAR1": "a Parquet file",
    rb"ARROW1": "an Arrow file",
    rb"%PDF-": "a PDF",
    rb"SQLite format 3\0": "a database",
    rb"\xff\xfe(?:[\t-~]\0){8}|\xfe\xff(?:\0[\t-~]){8}": (
        "text in UTF-16: convert it with iconv -f UTF-16 -t UTF-8, into a .txt file"
    ),
    rb"version https://git-lfs\.github\.com/spec/": (
        "a Git LFS pointer: get the file that it stands for with git lfs pull"
    ),
    rb"(?:[./]*/\.git)?/annex/objects/": (
        "a git-annex pointer: get the file that it stands for with git annex get"
    ),
    rb"(?i:(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html)[\s>])": (
        "a web page, perhaps an error message: download the file again, or, if it is "
        "the text, write <|endoftext|> before it"
    ),
    # Lines of objects; a list of objects.
    rb"\s*\{ *\"[^\"\n]+\" *:[^\n]*\}\s*(?:\n\{|\Z)": f"JSON lines: {_FROM_JSON}",
    rb"\s*\[\s*\{\s*\"\w+\"\s*:": f"JSON: {_FROM_JSON}",
    rb"LITPKDS": "lit-gpt's: read its chunks with PackedDataset, and write plain ids",
    # 20240520 for GPT-2's tokens, 20240801 for those of Llama.
    rb"\x88\xd8\x34\x01|\xa1\xd9\x34\x01": "llm.c's: drop its header of 1,024 bytes",
}


def foreign_kind(head: bytes) -> str | None:
    """The kind of a file by its first HEAD_BYTES, as in 'a .npy file: ...', or None.

    Token ids could begin like this, but each pattern is too long for a coincidence.
    """
    return next(
        (kind for pattern, kind in _FOREIGN.items() if re.match(pattern, head, re.S)),
        None,
    )


def is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters. Ids almost never are."""
    text = head.decode("utf-8", "ignore")
    lost = len(head) - len(text.encode())
    return lost < 4 and not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)


# Layouts in which other bytes almost never are whole numbers in a vocabulary.
_NUMBERS = {
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "big-endian int64": ">i8",
    "big-endian uint32": ">u4",
}
# Which of eight consecutive bytes are 0 in ids of a layout; '.' may be 0 or not.
_ZEROS = {
    r"x.000000": "int64",
    r"(x.00){2}": "uint32",
    r"000000.x": "big-endian int64",
    r"(00.x){2}": "big-endian uint32",
    r"(0x){4}": "big-endian uint16",
}
_MOSTLY = 0.9  # Not every id is small, and some are 0.
_ENOUGH_PAIRS = 2048
_SAME = 0.15  # total variation distance; that of the two halves of a text is below 0.1
_NEARLY_UNIFORM = 7  # bits of collision entropy, of at most 8
# The low bytes of GPT-2's tokens have at least 1.5 bits more than their high bytes. The
# high bytes of ids in random order have at most 0.4 more.
_MARGIN = 1.5  # bits


def layout_of(octets: np.ndarray, vocab_size: int) -> str | None:
    """The layout in which a file seems to hold numbers below `vocab_size`.

    None if nothing is found, as for uint16.

    Args:
      octets: a sample of the file, uint8 [rows, 8]; rows start at multiples of 8 bytes.
      vocab_size: size of the vocabulary.
    """
    for name, stored in _NUMBERS.items():
        numbers = octets.view(stored)
        with np.errstate(all="ignore"):  # Other bytes are also NaN and infinity.
            # Float16 rounds ids, but never beyond the rounded size.
            most = numbers.dtype.type(vocab_size)
            is_id = (numbers >= 0) & (numbers <= most) & (np.floor(numbers) == numbers)
            # Every second uint16 being 0 looks like big-endian multiples of 256.
            if is_id.all() and (numbers % 256).any():
                return name
    is_zero = (octets == 0).mean(axis=0) >= _MOSTLY
    zeros = "".join("0" if flag else "x" for flag in is_zero)
    layout = next((n for p, n in _ZEROS.items() if re.fullmatch(p, zeros)), None)
    if layout:
        return layout
    words = octets.view("<u2")
    # Ids above 65,535, so that not all upper halves are 0.
    if words[:, 1::2].max() < 16 and (words[:, ::2] >= 256).mean() > 0.5:
        return "uint32"
    return _layout_by_spread(octets[:, ::2].ravel(), octets[:, 1::2].ravel())


def _layout_by_spread(low: np.ndarray, high: np.ndarray) -> str | None:
    """'uint8' or 'big-endian uint16', from the bytes that should be low and high."""
    if len(low) < _ENOUGH_PAIRS:
        return None
    shares = [np.bincount(half, minlength=256) / len(half) for half in (low, high)]
    low_bits, high_bits = (-np.log2(np.square(share).sum()) for share in shares)
    distance = np.abs(shares[0] - shares[1]).sum() / 2
    is_text_like = shares[0][0] < _MOSTLY and low_bits < _NEARLY_UNIFORM
    if distance < _SAME and is_text_like:
        return "uint8"
    # A vocabulary mostly lists frequent tokens first.
    is_swapped = high_bits > low_bits + _MARGIN and low.mean() < high.mean() / 2
    return "big-endian uint16" if is_swapped else None
