"""How much a compression tries and measures by default."""

from typing import NamedTuple

from pcagpt.config import Settings
from pcagpt.config.schema import COMPRESS_BOUNDS
from pcagpt.factorize import METHODS
from pcagpt.run import calibrate


class Effort(NamedTuple):
    """Values of knobs that the person leaves at 0 or empty.

    max_tokens: number of validation tokens to evaluate on; 0: all of them.
    """

    methods: str
    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


GPU = Effort(",".join(METHODS), (1, 7, 12), calibrate.TOKENS, 0)
# A first answer for a small model within three minutes on two cores.
CPU = Effort(f"svd,{list(METHODS)[-1]}", (1, 7), 32_768, 32_768)


def decide_effort(settings: Settings, platform: str) -> Settings:
    """Fills in the knobs that are 0 or empty, for 'cpu' or another platform.

    A sweep on a CPU measures only a part of the split if all of these knobs are open.
    It measures the whole split if the person has chosen what to try, if a table must
    keep a bound, or if the report compares the sweep with trained models.
    """
    automatic = CPU if platform == "cpu" else GPU
    compress, evaluate = settings.compress, settings.evaluate
    is_open = not (compress.methods or compress.bands or compress.calibration_tokens)
    has_bound = any(getattr(compress, name) for name in COMPRESS_BOUNDS)
    is_first_look = is_open and not has_bound and not compress.recover_ranks
    max_tokens = automatic.max_tokens if is_first_look else 0
    return settings.replace(
        {
            "compress.methods": compress.methods or automatic.methods,
            "compress.bands": compress.bands or automatic.bands,
            "compress.calibration_tokens": compress.calibration_tokens
            or automatic.calibration_tokens,
            "evaluate.max_tokens": evaluate.max_tokens or max_tokens,
        }
    )
