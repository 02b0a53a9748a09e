"""What a model is made of: sizes, switches, and the bands of its vocabulary."""

import dataclasses
from typing import NamedTuple

INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a `GPT`; the defaults are GPT-2 small."""

    vocab_size: int = 50257
    vocab_multiple: int = 64
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_embd_wte: int | None = None
    n_embd_wte_scale_tying: bool = True
    band_sizes: tuple[int, ...] = ()
    band_ranks: tuple[int, ...] = ()
    bias: bool = True
    dropout: float = 0.0
    compute_dtype: str = "float32"
    attention: str = "xla"
    kernels: str = "xla"

    @property
    def padded_vocab_size(self) -> int:
        """Rows stored: the vocabulary rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def bands(self) -> tuple["BandSpec", ...]:
        """The bands in order of token position; padding rows belong to the last."""
        padding = self.padded_vocab_size - self.vocab_size
        if not self.band_sizes:
            return (BandSpec(0, self.vocab_size, padding, self.n_embd_wte),)
        starts = [sum(self.band_sizes[:i]) for i in range(len(self.band_sizes))]
        last = len(self.band_sizes) - 1
        return tuple(
            BandSpec(start, size, padding if i == last else 0, rank)
            for i, (start, size, rank) in enumerate(
                zip(starts, self.band_sizes, self.band_ranks, strict=True)
            )
        )


class BandSpec(NamedTuple):
    """Token positions start .. start + size - 1, stored at `rank` (None: at full D)."""

    start: int
    size: int
    padding: int
    rank: int | None
