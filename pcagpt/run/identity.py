"""Which fields of a run's record decide its numbers, and how two records differ."""

import hashlib
import json
from typing import Any

from pcagpt.config import KNOBS
from pcagpt.errors import shown
from pcagpt.json_files import strict
from pcagpt.model import DEVICE_KNOBS

# The sections that determine a run's numbers. Other knobs may change when it resumes.
IDENTITY = (
    "arm", "seed", "model", "corpus", "train", "distill", "init", "imported_sha256"
)  # fmt: skip
# Corpus and imports are compared by hash, not by path, so they can be moved. Only
# `evaluate` and `compress` measure on a run's test split. Chunks of the loss change it
# by rounding only.
NOT_IDENTITY = (
    "corpus.test",
    "data.cache_dir",
    "init.import_wte_npy",
    "init.import_scale_matrices_npz",
    "init.import_bands",
    "init.blocks_from",
    "init.weights_from",
    "distill.teacher",
    "train.loss_chunks",
    *(f"model.{name}" for name in DEVICE_KNOBS),
)


def identity(
    record: dict[str, Any], sections: tuple[str, ...] = IDENTITY
) -> dict[str, Any]:
    """{'train.steps': 5000, ...}: the fields that decide a run's numbers.

    A knob that is newer than the record has its default.
    """
    found = {
        path: knob.default
        for path, knob in KNOBS.items()
        if path.split(".")[0] in sections
    }
    for section in sections:
        value = record.get(section)
        if isinstance(value, dict):
            found |= {f"{section}.{name}": entry for name, entry in value.items()}
        else:
            found[section] = value
    if not found.get("distill.teacher"):  # It then has no effect.
        found["distill.share"] = KNOBS["distill.share"].default
    return strict({name: v for name, v in found.items() if name not in NOT_IDENTITY})


def config_sha256(record: dict[str, Any]) -> str:
    """Hash of a record's identity."""
    text = json.dumps(identity(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fields(stored: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """'train.steps (was 5000, now 6000)' for each difference from the stored record.

    An import whose hash in `record` is None is not compared, nor are the bands that
    come from it. If only one record knows the corpus, `Corpus.changed_parts` compares
    it, and not this function.
    """
    known, hashes = (one.get("imported_sha256") or {} for one in (stored, record))
    unknown = {name for name, sha256 in hashes.items() if sha256 is None}
    hashes = hashes | {name: known.get(name) for name in unknown}
    record = record | {"imported_sha256": hashes}
    if "import_bands" in unknown:
        bands = {name: record["model"][name] for name in ("band_sizes", "band_ranks")}
        stored = stored | {"model": (stored.get("model") or {}) | bands}
    # The oldest runs know only where their corpus lay.
    is_oldest = not {"corpus", "corpus_sha256"} & stored.keys()
    sections = (*IDENTITY, "data") if is_oldest else IDENTITY
    if "corpus" not in record or "corpus" not in stored:
        record, stored = record | {"corpus": None}, stored | {"corpus": None}
    old, new = identity(stored, sections), identity(record, sections)
    return [
        f"{name} (was {shown(old.get(name))}, now {shown(new.get(name))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def is_same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of one run. Those of older versions have no run_id."""
    is_known = {"run_id"} <= one.keys() & other.keys()
    parts = ("run_id",) if is_known else ("seed", "train")
    old, new = identity(one, parts), identity(other, parts)
    return all(old[name] == new[name] for name in old.keys() & new.keys())


def changed_model(copy: dict[str, Any], stored: dict[str, Any]) -> str | None:
    """The first knob of the model in which two records differ, with both values."""
    sections = ("model", *({"vocab_size"} & copy.keys() & stored.keys()))
    old, new = identity(copy, sections), identity(stored, sections)
    differing = (name for name in old.keys() & new.keys() if old[name] != new[name])
    name = min(differing, default=None)
    return name and f"{name} is {new[name]}, and {old[name]} in the checkpoint"
