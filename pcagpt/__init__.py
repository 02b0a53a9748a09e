"""How small can the token embedding of a GPT become, and at what cost in loss?

    model = pcagpt.load("checkpoints/gpt_baseline")
    small = pcagpt.compress(model, max_bytes=1_000_000)
    factors = pcagpt.factorize(model.table, rank=64)

`pcagpt.api` describes these functions. It is imported when one of them is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcagpt.api import (
        Compressed,
        Factorization,
        Model,
        compress,
        factorize,
        load,
    )
    from pcagpt.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Compressed",
    "Factorization",
    "Model",
    "UserError",
    "compress",
    "factorize",
    "load",
]


def _imported(name: str) -> Any:
    if name == "api":
        return importlib.import_module("pcagpt.api")
    if name not in __all__:
        raise AttributeError(f"module 'pcagpt' has no attribute '{name}'")
    home = "pcagpt.errors" if name == "UserError" else "pcagpt.api"
    return getattr(importlib.import_module(home), name)


if not TYPE_CHECKING:  # A type checker would then believe that any name is there.
    __getattr__ = _imported


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
