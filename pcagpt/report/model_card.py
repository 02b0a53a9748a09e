"""The model card of an exported model: sizes, losses, and how it was made."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.report.text import code, count, fields, fixed, render, table

_FRONT = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"


def model_card(
    record: Mapping[str, Any],
    losses: Iterable[Mapping[str, Any]],
    **view: Any,
) -> str:
    """The text of README.md in an exported folder.

    Args:
      record: of the run; says how it was made.
      losses: {'corpus', 'split', 'loss', 'tokens'} of each evaluation.
      view: the other fields of the template.
    """
    rows = [
        [code(one["corpus"]), one["split"], fixed(one["loss"], 4), count(one["tokens"])]
        for one in losses
    ]
    header = ("Corpus", "Split", "Loss", "Tokens predicted")
    text = render(
        "model_card.md.j2",
        made=_how_made(record, view["step"]),
        losses=table(header, rows, "llrr") if rows else "",
        source=Path((record.get("data") or {}).get("source") or "").name,
        **view,
    )
    return f"{_FRONT}{text}\n"


def _how_made(record: Mapping[str, Any], step: int) -> list[str]:
    """A line for the training up to `step`, and one for the compression."""
    lines = []
    if arm := ARMS.get(record.get("arm")):
        steps = (record.get("train") or {}).get("steps")
        lines.append(
            f"{arm.letter}, {arm.title}: {arm.meaning}; {step} of {steps} steps"
        )
    if compressed := record.get("compressed"):
        shown = ("method", "bands", "budget", "rank", "bits")
        recipe = fields({name: compressed.get(name) for name in shown})
        lines.append(f"table compressed without training: {recipe}")
    return lines
