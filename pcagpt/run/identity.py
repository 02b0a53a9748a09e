"""Which fields of a run's record decide its numbers, and how two records differ."""

from typing import Any

from pcagpt.config import KNOBS
from pcagpt.data.tokenizer import RANKS
from pcagpt.errors import shown
from pcagpt.json_files import strict
from pcagpt.model import DEVICE_KNOBS

# The sections that determine a run's numbers. Other knobs may change when it resumes.
IDENTITY = (
    "arm", "seed", "model", "corpus", "train", "distill", "init", "imported_sha256"
)  # fmt: skip
# Corpus, imports and originals are compared by hash, not by path, so they can be moved.
# Only `evaluate` and `compress` measure on a run's test split. Chunks of the loss
# change it by rounding only. A finished run stays done whatever dtype a command
# computes in; an unfinished one goes on in its own only (see `TrainJob`).
NOT_IDENTITY = (
    "compressed.run",
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

_TYING = "model.n_embd_wte_scale_tying"
# What a record keeps of the model of another program that it came from.
KEPT = ("generation", "compressed_before", "stored_as")
# What a record claims of a run: also what its ids stand for, and how a compressed table
# was made.
_CLAIMS = (
    *IDENTITY, "corpus_sha256", "vocab_size", "tokenizer", "characters", "compressed",
    *KEPT,
)  # fmt: skip


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
    if "distill" in sections and not found.get("distill.teacher"):  # No effect.
        found["distill.share"] = KNOBS["distill.share"].default
    if "model" in sections and isinstance(record.get("model"), dict):
        if not (found["model.n_embd_wte"] or found["model.band_sizes"]):
            found[_TYING] = KNOBS[_TYING].default  # There is nothing to tie.
        has_own_bands = found["model.band_sizes"] and "init" in sections
        if has_own_bands and not found["init.import_bands"]:
            found["model.n_embd_wte"] = None  # Only imported bands have a rank.
    return strict({name: v for name, v in found.items() if name not in NOT_IDENTITY})


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


def claims(record: dict[str, Any]) -> dict[str, Any]:
    """{'train.steps': 5000, ...}: what a record says of a run's numbers and tokens.

    What it does not know is left out.
    """
    known = {name: record[name] for name in _CLAIMS if record.get(name) is not None}
    if isinstance(corpus := known.get("corpus"), dict):
        known["corpus"] = {n: v for n, v in corpus.items() if v is not None}
    # A file may have been moved. The corpus has the hash of its tokenizer.
    if known.get("tokenizer") not in RANKS:
        known.pop("tokenizer", None)
    return identity(known, tuple(known))


def contradiction(stated: dict[str, Any], record: dict[str, Any]) -> str | None:
    """The first of `claims` in which a record differs from what a file has stated."""
    found = claims(record)
    shared = stated.keys() & found.keys()
    name = min((name for name in shared if stated[name] != found[name]), default=None)
    return name and f"{name} is {_brief(found[name])}, and {_brief(stated[name])} there"


def _brief(value: object) -> str:
    return f"{shown(value):.60}"
