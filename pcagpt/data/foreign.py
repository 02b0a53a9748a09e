"""Recognises files that are neither token ids nor text by how they begin."""

import re

HEAD_BYTES = 1 << 16  # the part of a file that is looked at
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
    # 20240520 for GPT-2's tokens, 20240801 for those of Llama.
    rb"\x88\xd8\x34\x01|\xa1\xd9\x34\x01": "llm.c's: drop its header of 1,024 bytes",
}


def foreign_kind(head: bytes) -> str | None:
    """What a file is by its first HEAD_BYTES, as in 'a .npy file: ...'; None: no idea.

    Token ids could begin in the same way, but each pattern is too long for a chance.
    """
    return next(
        (kind for pattern, kind in _FOREIGN.items() if re.match(pattern, head, re.S)),
        None,
    )


def is_text(head: bytes) -> bool:
    """It is UTF-8 without control characters. Ids almost never are."""
    text = head.decode("utf-8", "ignore")
    lost = len(head) - len(text.encode())
    return lost < 4 and not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)
