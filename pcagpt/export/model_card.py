"""The model card of an exported model: sizes, losses, and how it was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcagpt.arms import ARMS
from pcagpt.export.formats import parts
from pcagpt.export.source import ExportedTable, Source
from pcagpt.factorization import FLOAT_BYTES
from pcagpt.report.text import (
    NOTHING,
    code,
    count,
    fields,
    fixed,
    render,
    table,
    with_interval,
)
from pcagpt.run.exported import compressions

_FRONT = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"


def model_card(source: Source, form: str, losses: Sequence[Mapping[str, Any]]) -> str:
    """The text of README.md in a folder of a form.

    `losses` are of `measured`.
    """
    record, name = source.record, source.folder.resolve().name
    rows = [
        [
            code(one["corpus"]),
            one["split"],
            fixed(one["loss"], 4),
            with_interval(one["added"], one["interval"]),
            "first " * ("is_first" in one) + count(one["tokens"])
            if one["tokens"]
            else "all",
            count(one["window"]),
        ]
        for one in losses
    ]
    sides = _sides(source)
    header = (
        "Corpus",
        "Split",
        "Loss",
        f"Added by the {sides[-1] if len(sides) > 1 else 'table'}",
        "Tokens predicted",
        "Window",
    )
    text = render(
        "model_card.md.j2",
        name=name,
        form=form,
        architecture=source.architecture,
        is_compressed=not _is_full(source),
        sizes=_sizes(source),
        half=_half_precision(source),
        made=_how_made(record, source.identity.get("step")),
        step=source.identity.get("step"),
        fingerprint=source.identity["fingerprint"][:12],
        losses=table(header, rows, "llrrrr") if rows else "",
        has_first=any("is_first" in one for one in losses),
        sides=sides,
        source=Path((record.get("data") or {}).get("source") or "").name,
        bare=is_bare(source),
    )
    return f"{_FRONT}{text}\n"


def is_bare(source: Source) -> bool:
    """Whether nothing tells the text of the tokens."""
    return not (source.record.get("characters") or source.tokenizer_sha256)


def _sizes(source: Source) -> str:
    """Numbers and bytes of the table in full, of the table as stored, of the rest."""
    record, stored = source.record, source.table
    full = record["vocab_size"] * record["model"]["n_embd"]
    if source.coded:
        own = ["coded", NOTHING, count(source.coded.stat().st_size)]
    else:
        arrays = parts(stored).arrays.values()
        own = ["packed", NOTHING]
        if isinstance(stored, ExportedTable):
            own = ["as factors", count(sum(array.size for array in arrays))]
        own.append(count(sum(array.nbytes for array in arrays)))
    others = source.tensors.values()
    numbers = sum(array.size for array in others)
    *before, last = _sides(source) or ["token table"]
    full_too = "".join(f", with the {one} in full" for one in before)
    size = count(sum(array.nbytes for array in others))
    rows = [
        [f"{last}, in full", count(full), count(FLOAT_BYTES * full)],
        [f"{last}, {own[0]}", *own[1:]],
        [f"other weights{full_too}", count(numbers), size],
    ]
    if _is_full(source):
        del rows[1]
    return table(("", "numbers", "bytes"), rows, "lrr")


def _sides(source: Source) -> list[str]:
    """The tables of an untied model that are compressed, the last of them here."""
    sides = [one.get("side") for one in compressions(source.record)]
    return [f"{side} table" for side in sides if side]


def _half_precision(source: Source) -> str:
    """The type of the weights as transformers opens them, if it is not float32."""
    config = source.config()
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "" if dtype == "float32" else dtype


def _is_full(source: Source) -> bool:
    """Whether the table was never compressed."""
    return (
        isinstance(source.table, ExportedTable)
        and source.table.is_full
        and not compressions(source.record)
    )


def _how_made(record: Mapping[str, Any], step: int | None) -> list[str]:
    """A line for the training up to `step`, and one for the compression.

    `step` is the model's own. A compressed model was trained up to the step of D.
    """
    lines, made = [], compressions(record)
    step = made[0].get("step", step) if made else step
    if arm := ARMS.get(record.get("arm")):
        steps = (record.get("train") or {}).get("steps")
        text = f"{arm.letter}, {arm.title}: {arm.meaning}"
        if start := (record.get("init") or {}).get("weights_from"):
            text = f"{arm.letter}: all weights of {_named(start)}, trained further"
            if (record.get("distill") or {}).get("teacher"):
                text += " on the predictions of a teacher"
        lines.append(f"{text}; {step} of {steps} steps")
    shown = ("side", "method", "bands", "budget", "rank", "bits")
    for one in made:
        recipe = fields({name: one.get(name) for name in shown})
        lines.append(f"table compressed without training: {recipe}")
    return lines


def _named(start: str) -> str:
    """The name of a run, or of its checkpoint RUN/ckpt/STEP."""
    *_, run, folder, name = ("", "", "", *Path(start).parts)
    if folder == "ckpt" and run.strip("/"):
        return f"{run}, step {name}"
    return name or start
