"""Stored values and bytes of a model, and its operations per training token."""

from pcagpt.model.config import BLOCK_RANK, LEVELS, WIDTHS, GPTConfig


def embedding_parameters(config: GPTConfig) -> int:
    """Values in the token tables and scale matrices, without padding rows.

    Counts the table as if it were not packed. With several bands, the position of each
    token counts as one value.
    """
    scales = 1 if config.n_embd_wte_scale_tying else 2
    return _positions(config) + sum(
        band.size * (band.rank or config.n_embd) + scales * band.rank * config.n_embd
        for band in config.bands
    )


def _positions(config: GPTConfig) -> int:
    """Number of stored positions of tokens."""
    return config.vocab_size if len(config.bands) > 1 else 0


def total_parameters(config: GPTConfig) -> int:
    """Values in the whole model, without padding rows.

    Counts the table as if it were not packed.
    """
    return embedding_parameters(config) + _other_parameters(config)


def _other_parameters(config: GPTConfig) -> int:
    """Values outside the token tables."""
    width, biases = config.n_embd, int(config.bias)
    norm = width * (1 + biases)
    attention = 4 * width * width + biases * 4 * width
    mlp = 8 * width * width + biases * 5 * width
    blocks = config.n_layer * (2 * norm + attention + mlp)
    return config.block_size * width + blocks + norm


def weight_bytes(config: GPTConfig) -> int:
    """Bytes of all weights of a model, with padding rows."""
    return _table_bytes(config) + 4 * _other_parameters(config)


def _table_bytes(config: GPTConfig) -> int:
    """Bytes of the token tables of a model, with padding rows and scale matrices."""
    if not config.band_blocks:
        padding = sum(
            band.padding * (band.rank or config.n_embd) for band in config.bands
        )
        return 4 * (embedding_parameters(config) + padding)
    directions = [BLOCK_RANK * sum(band.blocks) for band in config.bands]
    codes = sum(
        band.size * sum(n * width for n, width in zip(band.blocks, WIDTHS, strict=True))
        for band in config.bands
    )
    floats = sum(directions) + 2 * config.n_embd + LEVELS + _positions(config)
    return codes + max(directions) * config.n_embd + 4 * floats


def training_flops_per_token(config: GPTConfig) -> float:
    """Floating-point operations of one token's forward and backward pass.

    Counts as PaLM does (Chowdhery et al. 2022, appendix B): 6 for each weight of a
    matrix product, and 12 * L * T * D for attention, without halving it for the causal
    mask.
    """
    width = config.n_embd
    weights = config.n_layer * 12 * width * width
    for band in config.bands:
        weights += (band.size + band.padding) * (band.rank or width)
        weights += 2 * band.rank * width
    attention = 12 * config.n_layer * config.block_size * width
    return 6.0 * weights + attention
