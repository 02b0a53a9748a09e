"""How much a compression tries and measures if the person does not say it."""

from typing import NamedTuple

from pcagpt.config import Settings


class Effort(NamedTuple):
    """Values of the knobs that are open by default.

    max_tokens: number of validation tokens to evaluate on; 0: all of them.
    """

    methods: str
    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


GPU = Effort(
    "svd,pca,freq,sqrt_freq,hidden,kl,joint,fisher,context", (1, 7, 12), 1_048_576, 0
)
# A first answer for a small model within three minutes on two cores.
CPU = Effort("svd,context", (1, 7), 32_768, 32_768)


def decide_effort(settings: Settings, platform: str) -> Settings:
    """Fills in the knobs that are open (0 or empty), for 'cpu' or another platform.

    With `compress.recover_ranks` all tokens count: results of training, which are
    measured on the whole split, appear beside the rows of the sweep.
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
