"""Rules that the value of a knob must keep."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of a value, and the words that follow 'it must be' in an error."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str | int) -> Rule:
    """Only these words or numbers."""
    return Rule(f"one of {', '.join(map(str, choices))}", choices.__contains__)


def at_least(low: int) -> Rule:
    """Finite numbers from `low` on."""
    return Rule(f"at least {low}", lambda value: low <= value < math.inf)


ANYTHING = Rule("anything", lambda value: True)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
PART = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
