"""The sizes and switches of a model, and the bands of its vocabulary."""

import dataclasses
from typing import NamedTuple

INIT_STD = 0.02
# Of a packed table: the widths of its codes in bits, and the directions of a block.
WIDTHS, BLOCK_RANK = (8, 6, 5, 4, 3, 2, 1), 8
LEVELS = sum(2**width for width in WIDTHS)  # of the codes of all widths

# Knobs about the device. They change results only by rounding errors, so a run that is
# done stays done with other values. An unfinished one goes on in its compute dtype.
DEVICE_KNOBS = ("compute_dtype", "attention", "kernels")
# Knobs about the token table.
TABLE_KNOBS = (
    "vocab_size", "vocab_multiple", "n_embd_wte", "n_embd_wte_scale_tying",
    "band_sizes", "band_ranks", "band_blocks",
)  # fmt: skip


class BandSpec(NamedTuple):
    """A range of columns of the logits with one table."""

    start: int  # the first column
    size: int
    padding: int  # rows without a token at the end of the table
    rank: int  # 0: the table is [size + padding, D], without scale matrices
    blocks: tuple[int, ...] = ()  # number for each of `WIDTHS`; (): not packed


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a `GPT`: the `model` knobs. A rank of 0 is full width."""

    vocab_size: int
    vocab_multiple: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_embd_wte: int
    n_embd_wte_scale_tying: bool
    band_sizes: tuple[int, ...]
    band_ranks: tuple[int, ...]
    band_blocks: tuple[int, ...]
    bias: bool
    gelu: str
    dropout: float
    compute_dtype: str
    attention: str
    kernels: str

    @property
    def padded_vocab_size(self) -> int:
        """Stored rows: the vocabulary rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def bands(self) -> tuple[BandSpec, ...]:
        """The bands in the order of their columns; the last has the padding rows."""
        sizes = self.band_sizes or (self.vocab_size,)
        ranks = self.band_ranks if self.band_sizes else (self.n_embd_wte,)
        bands, start = [], 0
        for size, rank in zip(sizes, ranks, strict=True):
            bands.append(BandSpec(start, size, 0, rank))
            start += size
        if self.band_blocks:  # Without padding rows.
            kinds = len(WIDTHS)
            return tuple(
                band._replace(blocks=self.band_blocks[i * kinds : (i + 1) * kinds])
                for i, band in enumerate(bands)
            )
        padding = self.padded_vocab_size - self.vocab_size
        return (*bands[:-1], bands[-1]._replace(padding=padding))


# Knobs about what is between the table's input and its head. Every new field of
# `GPTConfig` is one of them, unless a list above has it. `dropout` acts only in
# training.
BLOCK_KNOBS = tuple(
    field.name
    for field in dataclasses.fields(GPTConfig)
    if field.name not in (*DEVICE_KNOBS, *TABLE_KNOBS, "dropout")
)
