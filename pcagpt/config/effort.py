"""Values that `compress` uses for knobs that are 0 or empty."""

from typing import NamedTuple


class Effort(NamedTuple):
    """Values of `compress.bands`, `.calibration_tokens` and `evaluate.max_tokens`."""

    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


GPU = Effort((1, 7, 12), 2**20, 0)
# A first answer for a small model within three minutes on two cores.
CPU = Effort((1, 7), 2**15, 2**15)
