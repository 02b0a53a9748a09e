"""Differences between a folder and the settings, with the knobs that remove them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pcagpt.config import override
from pcagpt.errors import shown

# {part of a stored protocol or identity: the knob that sets it}
_KNOBS = {
    "bands": "factorize.bands",
    "calibration_batch_size": "train.batch_size",
    "calibration_tokens": "compress.calibration_tokens",
    "compute_dtype": "model.compute_dtype",
    "evaluated_tokens": "evaluate.max_tokens",
    "method": "factorize.method",
    "singular_value_split": "factorize.singular_value_split",
}
# What the absence of a part means. The absence of others is shown as None.
_ABSENT = {"evaluated_tokens": "the whole split"}


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], parts: Iterable[str]
) -> list[str]:
    """'NAME (there VALUE, here VALUE)' for each part that differs.

    A part that a knob sets ends with the argument that removes the difference.
    """
    found = []
    for name in parts:
        old, new = there.get(name), here.get(name)
        if old != new:
            is_knob = name in _KNOBS and old is not None
            hint = f"; use {override(_KNOBS[name], old)} to match" if is_knob else ""
            old, new = (
                shown(_ABSENT.get(name) if v is None else v) for v in (old, new)
            )
            found.append(f"{name} (there {old}, here {new}{hint})")
    return found
