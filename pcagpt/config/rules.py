"""What a knob is, and the rules that values keep."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words that follow 'it must be', and as a test."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str | int) -> Rule:
    """These words or numbers only."""
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


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting.

    rule: for its value, or for every entry of a tuple, whatever the other knobs are.
    kind: type of the value, where the default is None.
    """

    default: Any
    meaning: str
    rule: Rule = ANYTHING
    kind: type = type(None)

    @property
    def type(self) -> type:
        """int, float, bool, str, or tuple (of whole numbers)."""
        return self.kind if self.default is None else type(self.default)
