"""Turns the `model` knobs into a `GPTConfig` for the device of this process."""

import dataclasses
import math
from typing import NamedTuple

import jax

from pcagpt import kernels
from pcagpt.array_files import memory_bytes
from pcagpt.config.schema import ModelSettings
from pcagpt.errors import UserError
from pcagpt.model import BLOCK_RANK, DEVICE_KNOBS, WIDTHS, GPTConfig, weight_bytes

MOST_LAYERS = 10_000  # More are not compiled in reasonable time.


class Hardware(NamedTuple):
    """Device of a model.

    platform: 'cpu', 'gpu'; kernels: those of `kernels.CHOICES` that it runs; memory:
    bytes of all such devices; is_hopper: whether it runs our kernels for attention.
    """

    platform: str
    kernels: tuple[str, ...] = ("xla",)
    memory: float = math.inf
    is_hopper: bool = False


def hardware() -> Hardware:
    """The first device of this process."""
    device = jax.local_devices()[0]  # Another process does not tell its memory.
    if device.platform == "cpu":
        memory = memory_bytes() * jax.process_count()
    else:
        known = (device.memory_stats() or {}).get("bytes_limit", math.inf)
        memory = known * jax.device_count()
    runs = kernels.that_run_on(device)
    is_hopper = "mosaic" in runs and kernels.mosaic.has_wgmma(device)
    return Hardware(device.platform, runs, memory, is_hopper)


def build_config(
    model: ModelSettings, vocab_size: int, device: Hardware | None = None
) -> GPTConfig:
    """The `model` section as a GPTConfig, with a value in place of every 'auto'.

    Args:
      model: the section.
      vocab_size: of the corpus; `model.vocab_size` may be larger.
      device: None: that of this process.

    Raises:
      UserError: the corpus has more tokens than the model, the bands do not add up to
        the vocabulary, the blocks do not fit the bands, or the device lacks the memory
        for the weights or a feature that was asked for.
    """
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}, but the corpus has token ids "
            f"up to {vocab_size - 1}: leave model.vocab_size unset, or name the "
            "model's own corpus as --config.data.source"
        )
    vocab_size = model.vocab_size or vocab_size
    if model.band_sizes and sum(model.band_sizes) != vocab_size:
        raise UserError(
            f"model.band_sizes add up to {sum(model.band_sizes)}: they must add up to "
            f"the size of the vocabulary, {vocab_size}"
        )
    _check_blocks(model)
    device = device or hardware()
    choices = device_choices(model, device)
    sizes = {"vocab_size": vocab_size, "n_embd_wte": model.n_embd_wte or 0}
    config = GPTConfig(**dataclasses.asdict(model) | sizes | choices)
    _check_memory(config, device.memory)
    return config


def _check_blocks(model: ModelSettings) -> None:
    """Raises UserError if the blocks of a packed table do not fit its bands."""
    blocks, kinds, most = model.band_blocks, len(WIDTHS), -(-model.n_embd // BLOCK_RANK)
    of_bands = [blocks[i : i + kinds] for i in range(0, len(blocks), kinds)]
    fits = len(blocks) == kinds * len(model.band_sizes) and not any(model.band_ranks)
    if blocks and not (fits and all(sum(band) <= most for band in of_bands)):
        raise UserError(
            f"model.band_blocks must have {kinds} numbers for each band, with a sum of "
            f"at most {most}, and model.band_ranks must be 0"
        )


def _check_memory(config: GPTConfig, memory: float) -> None:
    """Raises UserError for a model that cannot be, before anything is allocated."""
    needed, limit = weight_bytes(config), f"{MOST_LAYERS:,} blocks"
    if needed > memory or config.n_layer > MOST_LAYERS:
        if memory < math.inf:  # Some devices do not tell it.
            limit += f" and the {memory:,} bytes of the devices"
        raise UserError(
            f"a model of {config.n_layer:,} blocks of width {config.n_embd:,}, "
            f"{config.block_size:,} tokens and a vocabulary of "
            f"{config.padded_vocab_size:,} has {needed:,} bytes of weights: "
            f"{limit} are the limit; lower model.n_layer, model.n_embd or "
            "model.block_size"
        )


def device_choices(
    model: ModelSettings, device: Hardware | None = None
) -> dict[str, str]:
    """The values of `DEVICE_KNOBS` on a device, as in `build_config`."""
    device = device or hardware()
    dtype, attention, kernel = model.compute_dtype, model.attention, model.kernels
    on_gpu = device.platform == "gpu"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    runs = device.kernels if dtype == "bfloat16" else ("xla",)
    if kernel == "auto":
        kernel = runs[0]
    # A CPU interprets the kernels. This is slow, and only tests need it.
    elif kernel not in runs and device.platform != "cpu":
        raise UserError(
            f"model.kernels is {kernel!r}: {kernels.NEEDS[kernel]}, and "
            "model.compute_dtype=bfloat16; leave model.kernels=auto"
        )
    attends = ("xla",)
    if on_gpu and dtype == "bfloat16":
        attends = ("mosaic",) * device.is_hopper + ("cudnn", "xla")
    if attention == "auto":
        attention = next(a for a in attends if a != "mosaic" or kernel == "mosaic")
    elif attention not in attends:
        needed = {"mosaic": "its kernels need a Hopper GPU", "cudnn": "it needs a GPU"}
        raise UserError(
            f"model.attention is {attention!r}: {needed[attention]}, and "
            "model.compute_dtype=bfloat16; leave model.attention=auto"
        )
    return dict(zip(DEVICE_KNOBS, (dtype, attention, kernel), strict=True))
