"""The order of a coded table's integers in the words of the entropy coder.

classes     rows of 1,024 tokens in the order of their ids (the last is shorter)
exponents   of the basis: a row of D columns, a row of K + 1 rows as differences
basis       K + 1 rows of D; the last is the mean
symbols     for each class that occurs, ascending: K rows, one symbol per token of
            the class in the order of ids
"""

import numpy as np

from pcagpt.coding.basis import Basis
from pcagpt.coding.coder import Reader, Writer
from pcagpt.coding.table import CodedTable

# Tokens; ids are often sorted by frequency, so classes are near-constant.
CLASS_ROW = 1024


def to_words(coded: CodedTable) -> np.ndarray:
    """The words of a table: uint32."""
    writer = Writer()
    writer.rows(
        np.split(coded.classes, range(CLASS_ROW, len(coded.classes), CLASS_ROW))
    )
    integers_KD, rows_K, columns_D = coded.basis
    writer.row(columns_D)
    writer.row(np.diff(rows_K, prepend=0))
    writer.rows(integers_KD)
    for name in np.unique(coded.classes):
        writer.rows(coded.symbols[:, coded.classes == name])
    return writer.words()


def from_words(
    words: np.ndarray, shape: tuple[int, int], directions: int, step: float
) -> CodedTable:
    """The table [V, D] of some words; ValueError if they are not of such a table."""
    reader, (vocab_size, width) = Reader(words), shape
    starts = range(0, vocab_size, CLASS_ROW)
    lengths = [min(CLASS_ROW, vocab_size - start) for start in starts]
    classes_V = _joined(reader.rows(lengths), lengths).astype(np.int8)
    columns_D = reader.row(width)
    rows_K = np.cumsum(reader.row(directions + 1))
    lengths = [width] * (directions + 1)
    integers_KD = _joined(reader.rows(lengths), lengths).reshape(-1, width)
    symbols_KV = np.zeros((directions, vocab_size), np.int16)
    for name in np.unique(classes_V):
        tokens = np.flatnonzero(classes_V == name)
        for k, row in enumerate(reader.rows([len(tokens)] * directions)):
            if row is not None:
                symbols_KV[k, tokens] = row
    reader.end()
    basis = Basis(integers_KD, rows_K.astype(np.int16), columns_D.astype(np.int16))
    return CodedTable(symbols_KV, classes_V, step, basis)


def _joined(rows: list[np.ndarray | None], lengths: list[int]) -> np.ndarray:
    """Rows one after another; None is a row of zeros."""
    return np.concatenate(
        [
            np.zeros(length, np.int32) if row is None else row
            for row, length in zip(rows, lengths, strict=True)
        ]
    )
