"""How much a compression tries and measures by default."""

from typing import NamedTuple

from pcagpt.config import Settings
from pcagpt.factorize import METHODS


class Effort(NamedTuple):
    """Values for knobs that are 0 or empty by default.

    max_tokens: number of validation tokens to evaluate on; 0: all of them.
    """

    methods: str
    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


GPU = Effort(",".join(METHODS), (1, 7, 12), 1_048_576, 0)
# A first answer for a small model within three minutes on two cores.
CPU = Effort("svd,context", (1, 7), 32_768, 32_768)


def decide_effort(settings: Settings, platform: str) -> Settings:
    """Fills in the knobs that are 0 or empty, for 'cpu' or another platform.

    With `compress.recover_ranks`, the sweep evaluates all tokens, because its report
    compares it with training results, which are measured on the whole split.
    """
    automatic = CPU if platform == "cpu" else GPU
    compress, evaluate = settings.compress, settings.evaluate
    max_tokens = 0 if compress.recover_ranks else automatic.max_tokens
    return settings.replace(
        {
            "compress.methods": compress.methods or automatic.methods,
            "compress.bands": compress.bands or automatic.bands,
            "compress.calibration_tokens": compress.calibration_tokens
            or automatic.calibration_tokens,
            "evaluate.max_tokens": evaluate.max_tokens or max_tokens,
        }
    )
