"""Reads a coded token table, `table.pcat`, with NumPy and constriction alone.

    python scripts/read_coded_table.py table.pcat table.npy

    8 bytes    "PCATABLE"
    2 + 2      version (1) and length of the header: uint16, little-endian as all here
    header     JSON: shape [V, D], directions K, step, and where the table comes from
    words      uint32, of constriction's range coder
    32 bytes   SHA-256 of all before

The words hold rows of integers. Four indices (reach, scale, location, tail) give the
frequencies of a row's values. A row alone begins with its indices. A group of rows
begins with four rows, one for each index; rows of reach 0 are zeros and have no others.

    group   classes of the tokens in the order of ids, 1,024 in a row
    row     exponents of the D columns of the basis
    row     exponents of its K + 1 rows, as differences
    group   the basis, K + 1 rows of D integers; the last one is the mean
    group   for each class, ascending: K rows with a symbol for each token of the class

Entry [k, j] of the basis stands for its integer times 2^(row k + column j). A token of
class c has the row (symbols @ basis) step 2^(c/2) + mean.
"""

import hashlib
import json
import sys

import numpy as np
from constriction import stream

OCTAVE = (26, 28, 31, 34, 37, 40, 44, 48)  # scales in 1/256; each octave doubles them


def read(path):
    """The table in a file: float32 [V, D]. Raises ValueError if it is damaged."""
    with open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{path} is damaged")
    if content[:10] != b"PCATABLE\x01\x00":
        raise ValueError(f"{path} is no coded table of version 1")
    end = 12 + int.from_bytes(content[10:12], "little")
    header = json.loads(content[12:end])
    (vocab_size, width), directions = header["shape"], header["directions"]
    words = np.frombuffer(content[end:-32], "<u4").astype(np.uint32)
    decoder = stream.queue.RangeDecoder(words)
    lengths = np.diff([*range(0, vocab_size, 1024), vocab_size])
    classes = np.concatenate(group(decoder, lengths))
    columns = row(decoder, width)
    exponents = np.cumsum(row(decoder, directions + 1))
    basis = np.stack(group(decoder, [width] * (directions + 1))).astype(np.float64)
    mean = np.ldexp(basis[-1], exponents[-1] + columns)
    lowest = exponents[:-1].min(initial=exponents[-1])
    basis = np.ldexp(basis[:-1], (exponents[:-1] - lowest)[:, None])  # still integers
    table = np.empty((vocab_size, width), np.float32)
    for name in np.unique(classes):
        tokens = np.flatnonzero(classes == name)
        symbols = np.array(group(decoder, [len(tokens)] * directions), np.int16)
        symbols = symbols.reshape(directions, len(tokens)).T
        step = np.ldexp(1.4142135623730951 if name % 2 else 1.0, name // 2)
        for part in np.split(np.arange(len(tokens)), range(4096, len(tokens), 4096)):
            sums = symbols[part].astype(np.float64) @ basis  # below 2^53: exact
            scaled = sums * np.ldexp(1.0, lowest + columns) * (step * header["step"])
            table[tokens[part]] = scaled + mean
    return table


def row(decoder, length):
    """The next row: int32, zeros if its reach is 0."""
    indices = [decoder.decode(stream.model.Uniform(n)) for n in (16, 128, 2047, 7)]
    return values(decoder, length, *indices, -1023)


def group(decoder, lengths):
    """The next group of rows."""
    reaches = np.cumsum(row(decoder, len(lengths)))
    indices = np.zeros((3, len(reaches)), int)
    for index in indices:
        index[reaches > 0] = row(decoder, np.count_nonzero(reaches))
    indices[0, reaches > 0] = np.cumsum(indices[0, reaches > 0])
    return [values(decoder, *v) for v in zip(lengths, reaches, *indices, strict=True)]


def values(decoder, length, reach, scale, location, tail, first_location=0):
    """Integers below 2^reach in magnitude, with the frequencies of these indices."""
    if not (reach and length):
        return np.zeros(length, np.int32)
    largest, scale = 2 ** int(reach) - 1, OCTAVE[scale % 8] << int(scale) // 8
    middle = int(location + first_location) * scale >> 3
    distances = np.abs(np.arange(-largest, largest + 1) * 256 - middle)
    cut = max(0, scale.bit_length() - 16)
    distances, scale = np.minimum(distances >> cut, 2**26), scale >> cut
    spread = scale * scale << int(tail) + 1
    weights = (spread << 20) // (spread + distances * distances)
    for _ in range(tail):
        weights = weights * weights >> 20
    shares = weights * (2**24 - len(weights)) // max(int(weights.sum()), 1)
    shares[np.argmax(weights)] += 2**24 - len(weights) - shares.sum()
    # The coder adds 1 to each frequency, which makes the sum 2^24.
    model = stream.model.Categorical(shares.astype(np.float64), perfect=False)
    return decoder.decode(model, int(length)) - np.int32(largest)


if __name__ == "__main__":
    np.save(sys.argv[2], read(sys.argv[1]))
