"""The names that GPT-2's tensors have in the files of other programs.

Hugging Face and nanoGPT use the same names. nanoGPT stores matrices as [out, in].
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pcagpt.errors import UserError
from pcagpt.model import FULL_TABLE

# {their name in a block: (ours, shape in multiples of the model's width)}
_IN_BLOCK = {
    "ln_1.weight": ("ln_1/scale", (1,)),
    "ln_1.bias": ("ln_1/bias", (1,)),
    "attn.c_attn.weight": ("attn/qkv/kernel", (1, 3)),
    "attn.c_attn.bias": ("attn/qkv/bias", (3,)),
    "attn.c_proj.weight": ("attn/proj/kernel", (1, 1)),
    "attn.c_proj.bias": ("attn/proj/bias", (1,)),
    "ln_2.weight": ("ln_2/scale", (1,)),
    "ln_2.bias": ("ln_2/bias", (1,)),
    "mlp.c_fc.weight": ("mlp/fc/kernel", (1, 4)),
    "mlp.c_fc.bias": ("mlp/fc/bias", (4,)),
    "mlp.c_proj.weight": ("mlp/proj/kernel", (4, 1)),
    "mlp.c_proj.bias": ("mlp/proj/bias", (1,)),
}
TABLE, HEAD = "wte.weight", "lm_head.weight"
PREFIX = "transformer."
# torch.compile and DistributedDataParallel add the first; a base model lacks the other.
_PREFIXES = re.compile(r"(?:_orig_mod\.)?(?:transformer\.)?")
_WRAPPED = re.compile(r"(?:_orig_mod\.)?module\.")
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants of older versions


class Leaf(NamedTuple):
    """A parameter: its path in our tree, and its shape there."""

    path: str
    shape: tuple[int, ...]


def leaves(
    vocab_size: int, block_size: int, n_layer: int, n_embd: int, bias: bool = True
) -> dict[str, Leaf]:
    """{their name without a prefix: the parameter} of a GPT-2 with a full table."""
    found = {
        TABLE: Leaf(FULL_TABLE, (vocab_size, n_embd)),
        "wpe.weight": Leaf("wpe", (block_size, n_embd)),
        "ln_f.weight": Leaf("ln_f/scale", (n_embd,)),
        "ln_f.bias": Leaf("ln_f/bias", (n_embd,)),
    }
    for layer in range(n_layer):
        for name, (path, multiples) in _IN_BLOCK.items():
            shape = tuple(n_embd * multiple for multiple in multiples)
            found[f"h.{layer}.{name}"] = Leaf(f"block_{layer}/{path}", shape)
    return {name: leaf for name, leaf in found.items() if bias or "bias" not in name}


def plain_names(stored: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name without prefixes, name in the file); leaves out attention masks.

    `module.` is a prefix if all names have it.
    Several names in the file may be the same name without prefixes.
    """
    names = list(stored)
    is_parallel = all(map(_WRAPPED.match, names))
    for name in names:
        inner = _WRAPPED.sub("", name, count=1) if is_parallel else name
        plain = _PREFIXES.sub("", inner, count=1)
        if not _MASKS.fullmatch(plain):
            yield plain, name


def are_equal(one: Any, other: Any) -> bool:
    """Whether two arrays of NumPy or PyTorch have the same values; NaN is itself."""
    same = one.shape == other.shape
    return same and bool(((one == other) | ((one != one) & (other != other))).all())


def two_values(place: Path, name: str, stored: str) -> UserError:
    """The error for a tensor that is stored twice; `stored` is the second one."""
    return UserError(
        f"{place}: {stored} is the second {name} of the model, with other values: "
        "remove the wrong one"
    )
