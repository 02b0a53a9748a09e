"""How much a compression tries and measures where the person leaves it open."""

from typing import NamedTuple


class Effort(NamedTuple):
    """bands: numbers of bands to try; max_tokens: validation tokens, 0: all."""

    bands: tuple[int, ...]
    calibration_tokens: int
    max_tokens: int


GPU = Effort((1, 7, 12), 2**20, 0)
# A first answer for a small model within three minutes on two cores.
CPU = Effort((1, 7), 2**15, 2**15)
