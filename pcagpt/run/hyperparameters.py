"""What tells runs apart in tables of runs: TensorBoard's HPARAMS, W&B's columns."""

from collections.abc import Iterable, Mapping
from typing import Any

from pcagpt.model import GPTConfig, embedding_parameters, total_parameters
from pcagpt.run.identity import identity

_SECTIONS = ("arm", "seed", "model", "train", "distill", "init")
_RANK = "model.n_embd_wte"  # `sizes` has it.
# The columns that are always there, with a value of each type.
_COLUMNS = {"arm": "", "params_embedding": 0, "params_total": 0, "rank": 0}


def hyperparameters(record: Mapping[str, Any]) -> dict[str, Any]:
    """{knob: value} of a run's record: the knobs that decide its numbers, no paths."""
    found = identity(dict(record), _SECTIONS)
    return {name: value for name, value in found.items() if name != _RANK}


def sizes(config: GPTConfig) -> dict[str, int | None]:
    """Rank, parameters of the token table, and parameters of the model.

    The rank is None for a full table and for bands that were not made for a rank.
    """
    return {
        "rank": config.n_embd_wte or None,
        "params_embedding": embedding_parameters(config),
        "params_total": total_parameters(config),
    }


def columns(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{name: an example}: arm, rank and sizes, and each knob in which runs differ."""
    rows = [hyperparameters(record) for record in records]
    found = dict(_COLUMNS)
    for name in sorted(set().union(*rows)):
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        if known and any(value != values[0] for value in values):
            found.setdefault(name, known[0])
    return found
