"""How a knob is declared: a dataclass field with its meaning and its rule."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of a value, and the words that follow 'it must be' in an error."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str | int) -> Rule:
    """One of these words or numbers."""
    return Rule(f"one of {', '.join(map(str, choices))}", choices.__contains__)


def at_least(low: int) -> Rule:
    """Finite numbers that are not below `low`."""
    return Rule(f"at least {low}", lambda value: low <= value < math.inf)


LARGEST_WHOLE = 2**63 - 1  # Of int64; Python counts no iterations beyond it.
LARGEST_NUMBER = 3e38  # Below that of float32, in which models compute.
ANYTHING = Rule("anything", lambda value: True)
COUNT = at_least(1)
BANDS = Rule("from 1 to 1000", lambda value: 1 <= value <= 1000)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
PART = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
PATH = Rule("a path, which has no NUL", lambda value: "\0" not in value)
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def knob(default: Any, meaning: str, rule: Rule | None = None) -> Any:
    """A field of a section. For a tuple, the rule applies to each entry.

    Without a rule, whole numbers must be a `COUNT` and other values can be anything.
    A whole number is at most `LARGEST_WHOLE`, any other at most `LARGEST_NUMBER`.
    The command line expands ~ in a `PATH`.
    """
    metadata = {"meaning": meaning, "rule": rule}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a field declares; type is int, float, bool, str or tuple (of int)."""

    default: Any
    meaning: str
    rule: Rule
    type: type


def declared(kind: type, prefix: str = "") -> dict[str, Knob]:
    """{path: knob} from the fields of a dataclass and of its sections."""
    types, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = types[field.name]
        if dataclasses.is_dataclass(hint):
            found |= declared(hint, f"{field.name}.")
            continue
        if not field.metadata:  # It is no knob.
            continue
        # `tuple[int, ...]` is a tuple, `int | None` an int that may be unset.
        is_tuple = typing.get_origin(hint) is tuple
        plain = tuple if is_tuple else (typing.get_args(hint) or (hint,))[0]
        rule = COUNT if plain in (int, tuple) else ANYTHING
        found[prefix + field.name] = Knob(
            field.default,
            field.metadata["meaning"],
            field.metadata["rule"] or rule,
            plain,
        )
    return found
