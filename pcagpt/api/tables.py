"""The table that fits a bound.

Shape letters: V vocabulary, D model width.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from pcagpt.api.calls import (
    absolute,
    call,
    check_is_no_file,
    encoded,
    ids_of,
    list_of,
    named,
    settings_of,
)
from pcagpt.api.factors import table_of
from pcagpt.api.model import Model
from pcagpt.compression.advise import find
from pcagpt.compression.bare_table import (
    BareTable,
    check_needs_no_text,
    relative_error,
)
from pcagpt.compression.candidates import Candidate
from pcagpt.compression.original import Original, platform_of
from pcagpt.compression.table_files import write_table
from pcagpt.compression.write_model import write_new
from pcagpt.config import Settings, methods_of
from pcagpt.data import sources
from pcagpt.data.meta import DTYPES, SPLITS, narrowest
from pcagpt.errors import UserError, naming
from pcagpt.json_files import write_json
from pcagpt.pipeline.compress_plan import decide_effort
from pcagpt.pipeline.execute import unwritable
from pcagpt.pipeline.sample import tokenizer_of
from pcagpt.rows import Row
from pcagpt.run import checkpoint, lock
from pcagpt.run.folder import is_vacant, replacing
from pcagpt.run.trained import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """A table that fits a bound, as `compress` found it.

    method: how it is stored, such as coded, packed or context (factors), or baseline
    for the table itself in few bits; bands: number of frequency bands; bits: per stored
    value of factors and of baseline, 0 for codes; bytes: its storage; added_loss: loss
    that it adds in nats per token, in place of the model's table; interval: its 95 %
    interval over windows, None for a single window; relative_error: |new - own| / |own|
    in Frobenius norm. A bare table has no model: added_loss and interval are None.
    """

    method: str
    bands: int
    bits: int
    bytes: int
    added_loss: float | None
    interval: tuple[float, float] | None
    relative_error: float
    _table_VD: np.ndarray = dataclasses.field(repr=False)
    _write: Callable[[Path], Any] = dataclasses.field(repr=False)

    def dense(self) -> np.ndarray:
        """The table that the stored values stand for: float32 [V, D]."""
        return np.array(self._table_VD, np.float32)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the model with this table into a new folder; returns its path.

        `load` and every command take the folder as a run. For a model of another
        architecture and for a bare table, it has only the table: codes in a file,
        others as factors/ in float32.

        Raises:
          UserError: the folder is not empty or cannot be made, a task `compress` writes
            beside it, or the model has changed on the disk since it was loaded.
        """
        with call():
            place = Path(absolute(folder))
            checkpoint.check_path(place)

            def check_vacant() -> None:
                if not is_vacant(place):
                    raise UserError(
                        f"{place} is not empty: name a folder that is not there"
                    )

            check_vacant()
            if nearest := unwritable(place):
                raise UserError(
                    f"{place} cannot be written: {nearest} is not a writable folder; "
                    "name another one"
                )
            # A task `compress` writes its models under the lock of the folder above.
            if holder := lock.holder_of(above := place.resolve().parent):
                raise UserError(
                    f"another command writes into {above} ({holder}): name a folder "
                    "elsewhere, or wait for its end"
                )
            with naming(place), lock.held(place, check_vacant) as check_lock:
                check_vacant()
                with replacing(place) as written:
                    self._write(written)
                    check_lock()
                    check_vacant()
            return place


def compress(
    model: Model | str | os.PathLike[str] | ArrayLike,
    *,
    max_bytes: int | None = None,
    max_added_loss: float | None = None,
    data: str | os.PathLike[str] | Mapping[str, ArrayLike] | None = None,
    methods: str | Sequence[str] | None = (),
    bands: Sequence[int] = (),
    max_tokens: int = 0,
    tokenizer: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Compressed:
    """Finds the table that fits a bound, as `pcagpt compress` does.

    It measures the model on the training text, makes tables, and measures on the
    validation text what loss they add.

    Args:
      model: a `Model`, a path that `load` takes, a Hugging Face folder of another
        architecture or a GGUF file, if input and output share one table, or a bare
        table [V, D]. For a bare table there is no loss: the search finds the smallest
        error. `data`, `max_tokens`, `tokenizer` and `cache_dir` then have no effect.
      max_bytes: finds the table of at most this many bytes that adds the least loss.
      max_added_loss: finds the smallest table that adds at most this loss, in nats per
        token. One of the two bounds must be given.
      data: the text. None: that on which the run was trained; a name, a text file or a
        folder, as for `data.source`; or {'train': text, 'val': text}, each a str, which
        is no path, or token ids.
      methods: names of methods and codes, as for `compress.methods`; 'all'; empty: the
        command's own choice.
      bands: numbers of frequency bands to try; empty: the command's own choice.
      max_tokens: number of validation tokens to predict; 0: all.
      tokenizer: for a path of a model that names none, as for `load`.
      cache_dir: keeps tokenized text, hashes of token files and measured statistics for
        the next call. None: a temporary folder, which is removed.
      progress: shows progress on stderr.

    Raises:
      UserError: no table fits, the table is already factorized, the text is missing or
        does not fit the model, or a value is out of range.
    """
    with (
        call(bool(progress), model="model"),
        tempfile.TemporaryDirectory(prefix="pcagpt-") as own,
    ):
        names = ",".join(list_of("methods", methods))
        cache = Path(own if cache_dir is None else absolute(cache_dir))
        if place := unwritable(cache, writes=False):
            below = "" if place == cache else f"below {place}, "
            raise UserError(
                f"cache_dir is {cache}, {below}which is no folder: name a folder"
            )
        given = {
            "compress.max_bytes": max_bytes,
            "compress.max_added_loss": max_added_loss,
            "compress.methods": names,
            "compress.bands": bands,
            "evaluate.max_tokens": max_tokens,
            "workdir": str(cache),
            "data.cache_dir": str(cache),
            "mesh.data": 1,
            "data.source": "",
            "data.tokenizer": named(tokenizer),
        }
        given = {path: value for path, value in given.items() if value is not None}
        if isinstance(model, Model):
            run, asked = model._run, model._settings
            given["model.compute_dtype"] = asked.model.compute_dtype
            given["data.tokenizer"] = asked.data.tokenizer
        elif isinstance(model, str | os.PathLike):
            run = Run.open(absolute(model), any_architecture=True)
        else:
            of_table = {p: v for p, v in given.items() if p.startswith("compress.")}
            settings = settings_of("compress", {"model_path": "table.npy", **of_table})
            return _compress_table(table_of(model), settings)
        own_or_named = given.get("data.tokenizer", "auto")
        if data is not None:
            given |= _source(run, data, Path(own), own_or_named)
        settings = settings_of("compress", {"model_path": str(run.folder), **given})
        _check_bound(settings)
        settings = decide_effort(settings, platform_of(run), run.table_shape)
        original = Original.of(run, settings, cache / "measured")
        # `data` became ids, so the settings no longer name their tokenizer.
        told = run.tokens.told_by(original.corpus, own_or_named)
        original = dataclasses.replace(original, told=told)
        if original.model.sides:
            raise UserError(
                f"{run.folder} has two tables, of input and output: "
                "configs/compress.py compresses them one by one"
            )
        options = settings.compress
        _ = original.protocol  # Reads the text, which may be removed later.
        chosen, _ = find(original, methods_of(options.methods), options)
        original.corpus.check_unchanged()
        row, candidate = chosen.row(), chosen.candidate

        def write(folder: Path) -> None:
            if not run.folder.exists():
                raise UserError(
                    f"{run.folder} is gone: move it back, and call save again; the "
                    "table is kept in memory"
                )
            write_new(folder, original, candidate, row)

        return _compressed(row, candidate, original.table_VD, write)


def _compress_table(table_VD: np.ndarray, settings: Settings) -> Compressed:
    _check_bound(settings)
    options = decide_effort(settings, jax.default_backend()).compress
    methods = methods_of(options.methods)
    check_needs_no_text(methods)
    chosen, _ = find(BareTable(table_VD), methods, options)
    candidate = chosen.candidate
    write = functools.partial(write_table, candidate=candidate)
    found = _compressed(chosen.row(), candidate, table_VD, write)
    return dataclasses.replace(found, added_loss=None, interval=None)


def _compressed(
    row: Row, candidate: Candidate, own_VD: np.ndarray, write: Callable[[Path], Any]
) -> Compressed:
    interval = row.added_loss_interval
    return Compressed(
        method=row.method,
        bands=len(row.band_sizes),
        bits=row.bits,
        bytes=row.bytes,
        added_loss=row.added_loss,
        interval=None if interval is None else (interval[0], interval[1]),
        relative_error=relative_error(candidate.dense, own_VD),
        _table_VD=candidate.dense,
        _write=write,
    )


def _source(run: Run, data: Any, folder: Path, tokenizer: str) -> dict[str, Any]:
    """The knobs that name a corpus; that of a mapping is written into a folder."""
    if not isinstance(data, str | os.PathLike | Mapping):
        raise UserError(
            f"data is {data!r}: give a name, a folder, or the texts 'train' and 'val'"
        )
    if not isinstance(data, Mapping):
        source = os.path.expanduser(data)
        is_text = isinstance(sources.find_source(source), sources.TextSource)
        # A text is read with the tokenizer of the model.
        own = run.tokens.tokenizer_name(tokenizer) if is_text else None
        return {"data.source": source, "data.tokenizer": own or tokenizer}
    if {"train", "val"} - data.keys() or data.keys() - set(SPLITS):
        raise UserError(
            f"data has {', '.join(map(str, data)) or 'no split'}: give the texts "
            "'train' and 'val'"
        )
    size = run.record["vocab_size"]
    settings = Settings().replace({"data.tokenizer": tokenizer, "workdir": str(folder)})
    place, name, counts = folder / "data", narrowest(size), {}
    place.mkdir()
    for split, text in data.items():
        if isinstance(text, str):
            check_is_no_file(text, f"data['{split}']")
            text = np.array(encoded(tokenizer_of(run, settings), text), np.int64)
        tokens = ids_of(text, size)
        if len(tokens) < 2:
            raise UserError(
                f"data['{split}'] has {len(tokens)} tokens: give at least two, and "
                "for 'train' more than the model reads at a time"
            )
        counts[split] = len(tokens)
        tokens.astype(DTYPES[name]).tofile(place / f"{split}.bin")
    meta = {"name": "data", "vocab_size": size, "dtype": name, "tokens": counts}
    write_json(place / "meta.json", meta)
    return {"data.source": str(place), "data.tokenizer": "auto"}


def _check_bound(settings: Settings) -> None:
    if not settings.compress.bounds:
        raise UserError("no bound is given: give max_bytes or max_added_loss, above 0")
