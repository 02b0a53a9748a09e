"""Number of stored values of a model, and of its operations per training token."""

from pcagpt.model.config import BLOCK, LEVELS, GPTConfig


def embedding_parameters(config: GPTConfig) -> int:
    """Values in token tables and scale matrices, without padding rows.

    With several bands, the position of each token counts as one value.
    """
    scales = 1 if config.n_embd_wte_scale_tying else 2
    positions = config.vocab_size if len(config.bands) > 1 else 0
    if config.band_blocks:
        return positions + _packed_values(config)
    return positions + sum(
        band.size * (band.rank or config.n_embd) + scales * band.rank * config.n_embd
        for band in config.bands
    )


def _packed_values(config: GPTConfig) -> int:
    """Codes and scales of a packed table, and the arrays that its bands share."""
    directions = [BLOCK * sum(band.blocks) for band in config.bands]
    codes = sum(
        (band.size + 1) * own
        for band, own in zip(config.bands, directions, strict=True)
    )
    return codes + (max(directions) + 2) * config.n_embd + LEVELS


def total_parameters(config: GPTConfig) -> int:
    """Values in the whole model, without padding rows."""
    width, biases = config.n_embd, int(config.bias)
    norm = width * (1 + biases)
    attention = 4 * width * width + biases * 4 * width
    mlp = 8 * width * width + biases * 5 * width
    blocks = config.n_layer * (2 * norm + attention + mlp)
    return embedding_parameters(config) + config.block_size * width + blocks + norm


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
