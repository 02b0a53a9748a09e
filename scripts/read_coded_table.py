"""Reads a coded token table, `table.pcat`, with NumPy and constriction alone.

    python scripts/read_coded_table.py table.pcat table.npy

    12 bytes   "PCATABLE", version (1), length of the header: uint16, little-endian
    header     JSON: shape [V, D], directions K, step, and where the table comes from
    words      uint32, of constriction's range coder
    32 bytes   SHA-256 of all before

The words code rows of integers. Four indices (reach, scale, location, tail) give the
frequencies of a row's values. A single row begins with its own. A group begins with
four rows, reaches and scales as differences; a row of zeros has reach 0 and no others.

    group   classes of the tokens in the order of ids, 1,024 in a row
    row     exponents of the D columns of the basis
    row     exponents of its K + 1 rows, as differences
    group   the basis, K + 1 rows of D integers; the last one is the mean
    group   for each class, ascending: K rows with a symbol for each token of the class

Entry [k, j] of the basis is an integer times 2^(row k + column j). A token of class c
has the row (symbols @ basis) step 2^(c/2) + mean.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from constriction import stream


def read(path):
    """The table in a file: float32 [V, D]. A damaged file ends the program."""
    content = Path(path).read_bytes()
    is_whole = hashlib.sha256(content[:-32]).digest() == content[-32:]
    if not (is_whole and content[:10] == b"PCATABLE\x01\x00"):
        sys.exit(f"{path} is damaged, or no coded table of version 1")
    end = 12 + int.from_bytes(content[10:12], "little")
    header = json.loads(content[12:end])
    (vocab_size, width), directions = header["shape"], header["directions"]
    words = np.frombuffer(content[end:-32], "<u4")
    decoder = stream.queue.RangeDecoder(words.astype(np.uint32))
    lengths = np.diff([*range(0, vocab_size, 1024), vocab_size])
    classes, columns = np.concatenate(group(decoder, lengths)), row(decoder, width)
    exponents = np.cumsum(row(decoder, directions + 1))
    basis = np.stack(group(decoder, [width] * (directions + 1))).astype(np.float64)
    mean = np.ldexp(basis[-1], exponents[-1] + columns)
    lowest = exponents[:-1].min(initial=exponents[-1])
    basis = np.ldexp(basis[:-1], (exponents[:-1] - lowest)[:, None])  # still integers
    table = np.empty((vocab_size, width), np.float32)
    for name in np.unique(classes):
        tokens = np.flatnonzero(classes == name)
        symbols = np.array(group(decoder, [len(tokens)] * directions), np.float64)
        step = header["step"] * np.ldexp((1.0, 1.4142135623730951)[name % 2], name // 2)
        sums = symbols.reshape(directions, len(tokens)).T @ basis  # exact below 2^53
        table[tokens] = sums * np.ldexp(1.0, lowest + columns) * step + mean
    return table


def row(decoder, length):
    """The next row: int32, zeros if its reach is 0."""
    indices = [decoder.decode(stream.model.Uniform(n)) for n in (16, 128, 2047, 7)]
    return values(decoder, length, *np.subtract(indices, (0, 0, 1023, 0)))


def group(decoder, lengths):
    """The next group of rows."""
    reaches = np.cumsum(row(decoder, len(lengths)))
    indices = np.zeros((3, len(reaches)), int)
    for index in indices:
        index[reaches > 0] = row(decoder, np.count_nonzero(reaches))
    indices[0, reaches > 0] = np.cumsum(indices[0, reaches > 0])
    return [values(decoder, *v) for v in zip(lengths, reaches, *indices, strict=True)]


def values(decoder, length, reach, scale, location, tail):
    """Integers below 2^reach in magnitude: int32."""
    if not (reach and length):
        return np.zeros(length, np.int32)
    largest = 2 ** int(reach) - 1
    scale = (26, 28, 31, 34, 37, 40, 44, 48)[scale % 8] << int(scale) // 8  # in 1/256
    distances = np.arange(-largest, largest + 1) * 256 - (location * scale >> 3)
    cut = max(0, scale.bit_length() - 16)
    distances, scale = np.minimum(np.abs(distances) >> cut, 2**26), scale >> cut
    spread = scale * scale << int(tail) + 1
    weights = (spread << 20) // (spread + distances * distances)
    for _ in range(tail):
        weights = weights * weights >> 20
    free = 2**24 - len(weights)  # The coder adds 1 to each frequency.
    shares = weights * free // max(int(weights.sum()), 1)
    shares[np.argmax(weights)] += free - shares.sum()
    model = stream.model.Categorical(shares.astype(np.float64), perfect=False)
    return decoder.decode(model, int(length)) - np.int32(largest)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("give a file: python scripts/read_coded_table.py table.pcat table.npy")
    np.save(sys.argv[2], read(sys.argv[1]))
