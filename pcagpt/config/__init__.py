"""Every knob with its default and meaning, and the checks that need only the config."""

from pcagpt.config.checks import (
    Hardware,
    arms_of,
    model_settings,
    ranks_of,
    validate,
    words_of,
    wrong_type,
)
from pcagpt.config.rules import Knob
from pcagpt.config.schema import COMPRESS_BOUNDS, KNOBS, base, flat, override

__all__ = [
    "COMPRESS_BOUNDS",
    "KNOBS",
    "Hardware",
    "Knob",
    "arms_of",
    "base",
    "flat",
    "model_settings",
    "override",
    "ranks_of",
    "validate",
    "words_of",
    "wrong_type",
]
