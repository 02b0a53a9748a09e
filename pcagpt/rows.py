"""sweep.json, errors.json and their rows: tables, how they are made, what they cost.

Each field is declared here only, with its type. A field that older files lack has a
default: None for a number that was not measured.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, get_type_hints

from pcagpt.errors import UserError
from pcagpt.json_files import check_fields, has_type, read_json
from pcagpt.methods import CODES

REMEDY = "delete it to measure again"


class Provenance(TypedDict):
    """Under what numbers were measured; of several devices and so on, 'A, B'."""

    device: str | None
    versions: dict[str, str] | None
    git_commit: str | None


class MeasuredOn(TypedDict):
    """Fields of 'protocol' and 'measured_on': which tokens were predicted, and how.

    evaluated_tokens: only if they are the first of the split, and not all.
    """

    corpus: str | None
    split: str | None
    window: int | None
    tokens_predicted: int | None
    evaluated_tokens: int | None
    tokens_sha256: str | None
    compute_dtype: str | None


class _Protocol(MeasuredOn):
    table: tuple[int, int]  # its shape


class Sample(TypedDict):
    """What several models wrote after one prompt."""

    prompt: str
    seed: int | None
    temperature: float | None
    texts: dict[str, str]


class _Trained(Provenance):
    """A run of `report.collect.recovered_rows`."""

    run: str
    letter: str | None
    val_loss: float
    added_loss: float
    added_at_start: float | None
    interval: tuple[float, float] | None
    less_continued: float | None
    less_continued_interval: tuple[float, float] | None
    tokens_seen: int
    share_of_tokens: float | None
    learning_rate: float | None


class Recovered(_Trained):
    """A compressed model, trained further."""

    rank: int
    method: str
    bands: int


class Continued(_Trained):
    """D, trained further."""

    rank: None
    method: str | None


class _Sweep(Provenance):
    protocol: _Protocol
    measured_on: MeasuredOn | None
    rows: list
    other_rows: list | None
    recovered: list[Recovered | Continued] | None
    samples: list[Sample] | None
    samples_of: dict[str, str] | None
    gaussian_limit: list[tuple[float, float]] | None
    models: dict[str, dict] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way to compress a table.

    method: a name in `METHODS`, `CODES` or `RIVALS`; bands: number of frequency bands
    to start from; budget: largest number of stored values (`CODES`: of bytes in the
    file; `RIVALS`: exact number of codes; of a rank, without the mean); rank: the rank
    of one band with this budget; 0 for `RIVALS` and in a search for a bound; bits: per
    stored value, 32 (float32) or at most 8 (`CODES`: 0; `RIVALS`: per code, which can
    stand for several values).
    """

    method: str
    bands: int
    budget: int
    rank: int
    bits: int = 32

    @property
    def is_codes(self) -> bool:
        """Whether its table is stored as codes, by a method of `CODES`."""
        return self.bits == 0

    @property
    def is_factors(self) -> bool:
        """Whether it makes factors that training can go on from."""
        return self.bits == 32

    @property
    def model_name(self) -> str | None:
        """The folder of the best model of its kind and rank.

        None for rounded factors and for `RIVALS`: a sweep writes no model of them.
        """
        if self.is_codes:
            return f"best_{self.method}_k{self.rank}"
        return f"best_k{self.rank}" if self.is_factors else None

    @classmethod
    def of(cls, content: Any, where: object) -> Self:
        """Reads a JSON object; UserError, beginning with `where`, if it is damaged."""
        check_fields(content, {}, where, REMEDY)
        values = {}
        for field in dataclasses.fields(cls):
            value = content.get(field.name, field.default)
            if not has_type(value, field.type):
                raise _damaged(where, field.name, value)
            values[field.name] = value
        return cls(**values)

    @property
    def recipe(self) -> "Recipe":
        """The recipe of its table."""
        names = [field.name for field in dataclasses.fields(Recipe)]
        return Recipe(*(getattr(self, name) for name in names))


def _damaged(where: object, name: str, value: Any) -> UserError:
    shown = "is missing" if value is dataclasses.MISSING else f"is {value}"
    return UserError(f"{where} is damaged ('{name}' {shown:.40}): {REMEDY}")


def best_models(folder: Path) -> list[Path]:
    """The best models in the folder of a sweep, by their `model_name`."""
    name = re.compile(rf"best_(({'|'.join(CODES)})_)?k\d+")
    return sorted(at for at in folder.glob("best_*") if name.fullmatch(at.name))


def in_bands(recipe: Recipe) -> str:
    """The method of a recipe, as in 'packed in 3 bands'."""
    return f"{recipe.method}{f' in {recipe.bands} bands' * (recipe.bands > 1)}"


# Values of the fields of a recipe that older files lack.
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.default is not dataclasses.MISSING
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapScores:
    """Means over all targets, in nats per token.

    loss: loss with the model's own table.
    added_loss: loss added by the new table in input and head.
    added_loss_interval: [low, high], its 95 % interval over windows of block_size
      targets; None for a single window and in older files. It is paired: each window is
      scored with both tables. With d the loss added to all of a window's n targets, m =
      Σd / Σn, p = n / Σn: m ± t √(Σ p² (d/n − m)² / (1 − Σp²)), the ratio estimator,
      with Student's t.
    added_loss_input, added_loss_head: loss added by the new table on one side only.
    kl: KL(own || new), the new table on both sides.
    top1_agreement: share of positions where the most likely token stays the same.
    added_loss_by_decile: [10], added_loss over the targets of each frequency decile;
      None for a decile without targets.
    """

    loss: float
    added_loss: float
    added_loss_input: float
    added_loss_head: float
    kl: float
    top1_agreement: float
    added_loss_by_decile: list[float | None]
    added_loss_interval: list[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored(Recipe):
    """A compressed table, without a measurement.

    band_sizes, band_ranks: of its bands (rank 0: full width); params: stored values;
    bytes: its storage; memory: bytes on a device that computes with it; seconds: time
    to make it; table_sha256: hash of its factors or codes, None for other tables and in
    older files.
    """

    band_sizes: list[int]
    band_ranks: list[int]
    params: int
    bytes: int
    seconds: float
    memory: int | None = None
    table_sha256: str | None = None

    @classmethod
    def of(cls, content: Any, where: object) -> Self:
        """As `Recipe.of`; a table has bytes, and each band a size and a rank."""
        row = super().of(content, where)
        if row.bytes < 1:
            raise _damaged(where, "bytes", row.bytes)
        if len(row.band_sizes) != len(row.band_ranks):
            raise _damaged(where, "band_ranks", row.band_ranks)
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(SwapScores, Stored):
    """A row of sweep.json or advice.json: one compressed table of a model.

    second_order_head and _input: a `SecondOrder`; predicted_loss: prediction of
    added_loss, None if no table was measured to fit it; is_anchor: whether the
    predictions were fitted to this row.
    """

    second_order_head: float
    second_order_input: float
    predicted_loss: float | None = None
    is_anchor: bool = False

    @classmethod
    def of(cls, content: Any, where: object) -> Self:
        """As `Stored.of`; an interval has two ends."""
        row = super().of(content, where)
        if len(row.added_loss_interval or (0, 0)) != 2:
            raise _damaged(where, "added_loss_interval", row.added_loss_interval)
        return row


def row_of_model(
    rows: Iterable[Row], is_there: Callable[[Row], bool] = lambda row: False
) -> Row:
    """Of the rows of one `model_name`, the one that a sweep writes.

    It is that of least added loss; in a tie, the one whose model is there, or else the
    first.
    """
    return min(rows, key=lambda row: (row.added_loss, not is_there(row)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorRow(Stored):
    """A row of errors.json or advice.json: a compressed table without its model.

    relative_error: |new - own| / |own| in Frobenius norm; energy_kept: 1 minus its
    square; estimated_loss: second-order estimate of the added loss, in nats per token,
    None without statistics of the model.
    """

    relative_error: float
    energy_kept: float
    estimated_loss: float | None = None

    @property
    def error(self) -> float:
        """The number that is smallest for the best table: the estimate, if known."""
        known = self.estimated_loss
        return self.relative_error if known is None else known


AnyRow = TypeVar("AnyRow", bound=Stored)


def read_sweep(path: Path, kind: type[Stored] = Row) -> dict[str, Any]:
    """sweep.json or errors.json with its rows as `kind`; {} without a file.

    UserError if it is damaged, or has no rows.
    """
    found = read_json(path, REMEDY)
    if found is None:
        return {}
    check_fields(found, get_type_hints(_Sweep), path, REMEDY)
    if not found["rows"]:
        raise _damaged(path, "rows", [])
    if min(found["protocol"]["table"]) < 1:
        raise _damaged(path, "table", found["protocol"]["table"])
    tables = {
        name: [
            kind.of(row, f"{path}: row {number} of {name}")
            for number, row in enumerate(found.get(name) or ())
        ]
        for name in ("rows", "other_rows")
    }
    return found | tables
