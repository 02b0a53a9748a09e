"""Measures the statistics of a model on calibration text, and caches them.

Shape letters: B batch, T sequence, N = B*T, n tokens of a chunk, V vocabulary, D width.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pcagpt.array_files import read_npz, write_npz
from pcagpt.data.batches import TrainingBatches
from pcagpt.data.corpus import Corpus, count_tokens
from pcagpt.errors import UserError, shown, warn_once
from pcagpt.factorization import Statistics
from pcagpt.factorization.table import sha256_of_arrays
from pcagpt.json_files import parse_json
from pcagpt.losses import scan_chunks
from pcagpt.model import GPT, products
from pcagpt.run.generate import key_of
from pcagpt.run.trained import Run
from pcagpt.sharding import inside, placement, processes
from pcagpt.telemetry.progress import Progress

_SHAPES = {
    "frequency": "V",
    "probability": "V",
    "hidden_mean": "D",
    "hidden_moment": "DD",
    "gradient_moment": "DD",
    "context_moment": "DD",
}
SEED = 0  # of the order of the calibration text
SHARES_AGREE = 0.01  # largest distance of the sum of all shares from 1
_TABLES = "tables_sha256"  # in the protocol of a file
SIDES = ("input", "output")  # of the two tables of an untied model, in their order
LARGEST = 1e18  # Hidden states and gradients of a model that works are far below.


def collect(
    model: GPT,
    variables: dict,
    frequency_V: np.ndarray,
    batches: Iterable[np.ndarray],
    mesh: Mesh,
    chunks: int,
) -> Statistics:
    """Measures a model with a full table on batches of token ids, int32 [B, T].

    The model runs in its compute dtype. Second moments are computed in float32 at the
    highest precision; their sums over batches are float64.
    """
    measure = functools.partial(_measure, model=model, chunks=chunks)
    measure = placement.jit(measure, mesh)
    keys, total, tokens = map(key_of, itertools.count()), None, 0

    def sums_of(batch_BT):
        return measure(variables, batch_BT, next(keys))

    for (batch_BT,), sums in placement.map_batches(sums_of, zip(batches), mesh):
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        tokens += batch_BT.size
    return Statistics(
        frequency=frequency_V, **{name: value / tokens for name, value in total.items()}
    )


def _measure(variables, tokens_BT, key, *, model: GPT, chunks: int) -> dict:
    """Sums over a batch of all statistics except the frequency."""
    vocab_size = model.config.vocab_size

    def trunk(x_ND):
        return model.apply(variables, x_ND, tokens_BT.shape[1], method="contextualize")

    # flax calls a submodule only through a method of the model.
    x_ND = model.apply(
        variables, tokens_BT.reshape(-1), method=lambda gpt, tokens: gpt.embed(tokens)
    )
    h_ND, pull_back = jax.vjp(trunk, x_ND)
    wte_VD = model.apply(variables, method="head")[0].wte
    # Without this, the devices would exchange hidden states in every chunk.
    wte_VD = inside.gathered(wte_VD)[:vocab_size]
    compute_VD = wte_VD.astype(h_ND.dtype)
    keys_N = jax.random.split(key, h_ND.shape[0])

    def chunk(probability_V, inputs):
        h_nD, keys_n = inputs
        logits_nV = products(h_nD, compute_VD, jnp.float32)
        p_nV = jax.nn.softmax(logits_nV)
        expected_nD = jnp.dot(
            p_nV.astype(h_nD.dtype), compute_VD, preferred_element_type=jnp.float32
        )
        draw = functools.partial(jax.random.categorical, mode="low")
        drawn_n = jax.vmap(draw)(keys_n, logits_nV)
        # The gradient of the loss of the drawn tokens with respect to h.
        gradient_nD = expected_nD - wte_VD[drawn_n]
        return probability_V + p_nV.sum(axis=0), (expected_nD, gradient_nD)

    probability_V, (expected_ND, gradient_ND) = scan_chunks(
        chunk, jnp.zeros(vocab_size), chunks, h_ND, keys_N
    )
    (x_gradient_ND,) = pull_back(gradient_ND.astype(h_ND.dtype))
    h_ND, x_gradient_ND = (a.astype(jnp.float32) for a in (h_ND, x_gradient_ND))
    product = functools.partial(jnp.dot, precision="highest")
    return {
        "probability": probability_V,
        "hidden_mean": h_ND.sum(axis=0),
        "hidden_moment": product(h_ND.T, h_ND),
        "gradient_moment": product(x_gradient_ND.T, x_gradient_ND),
        "context_moment": product(h_ND.T, expected_ND),
    }


def statistics(
    run: Run,
    corpus: Corpus,
    measure: Callable[[np.ndarray, Iterable[np.ndarray]], Statistics],
    folder: Path,
    *,
    window: int,
    compute_dtype: str,
    tokens: int,
    batch_size: int,
    tables: Callable[[], Iterable[np.ndarray]],
    part: int = 0,
) -> Statistics:
    """Statistics of a run with a full table; cached in a folder, mostly the run's own.

    All processes must call this.

    Args:
      run: the folder and the step.
      corpus: its training split is the calibration text.
      measure: measures the run's model: (frequency [V], batches of token ids, int32
        [B, window]) -> statistics.
      folder: keeps them.
      window: tokens that the model reads at a time.
      compute_dtype: the model's.
      tokens: length of the calibration text, rounded up to what `measure` can take. A
        shorter training split is read once.
      batch_size: windows of a batch. `SEED` decides the order of the windows.
      tables: makes the model's tables, float32 [V, D]; the file has their hashes.
      part: windows that `measure` gets at a time; the last part of a batch may have
        fewer. 0: `measure` takes whole batches only.
    """
    train = corpus.tokens("train")
    batches = TrainingBatches(train, window, batch_size, SEED)
    least = 1 if part else batch_size
    asked = min(-(-tokens // window), batches.windows_per_epoch)
    count = -(-asked // least) * least  # windows
    protocol = {
        "checkpoint": run.fingerprint,
        "corpus": corpus.tokens_sha256("train"),
        "split": "train",
        "tokens": count * window,
        "window": window,
        "batch_size": batch_size,
        "seed": SEED,
        "compute_dtype": compute_dtype,
    }
    # Other commands write such files: every process must see the same.
    if known := processes.from_first(lambda: _known(run, folder, protocol)):
        return read(folder / known)
    frequency_V = count_tokens(train, run.record["vocab_size"]) / len(train)
    size = part or batch_size

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, count, batch_size):
            batch_BT = batches.batch_at(start // batch_size)[: count - start, :-1]
            for first in range(0, len(batch_BT), size):
                part_BT = batch_BT[first : first + size]
                yield part_BT
                progress.update(progress.step + len(part_BT))

    with Progress(f"calibrating on {corpus.name}", count) as progress:
        found = measure(frequency_V, parts())
    processes.from_first(corpus.check_unchanged)
    if jax.process_index() == 0:
        text = json.dumps(protocol, sort_keys=True).encode()
        digest = hashlib.sha256(text).hexdigest()
        path = folder / f"statistics_step{run.step}_{digest[:8]}.npz"
        of_tables = {_TABLES: list(map(sha256_of_arrays, tables()))}
        run.keep_result(path, lambda path: write(path, found, protocol | of_tables))
    return found


def _known(run: Run, folder: Path, protocol: dict[str, Any]) -> str | None:
    """The undamaged file of statistics of a run with this protocol in a folder."""
    for path in sorted(folder.glob(f"statistics_step{run.step}_*.npz")):
        try:
            _, measured = _read(path)
        except UserError as error:
            warn_once(f"{error}: the statistics in it are not used")
            continue
        measured.pop(_TABLES, None)  # Files of older versions do not say.
        own = measured | {"checkpoint": protocol["checkpoint"]}
        if own == protocol and run.is_at(measured.get("checkpoint")):
            return path.name
    return None


def write(path: Path, statistics: Statistics, protocol: dict[str, Any]) -> None:
    """Writes statistics, and how they were measured, as one .npz file."""
    protocol = protocol | {"arrays_sha256": _sha256(statistics)}
    write_npz(path, protocol=json.dumps(protocol), **statistics._asdict())


def read(path: Path, run: Run | None = None) -> Statistics:
    """Statistics from a file; UserError if it is missing, damaged or another file.

    Also raises UserError if the file says that it was measured on another model than
    that of `run`.
    """
    statistics, protocol = _read(path)
    measured = protocol.get("checkpoint")
    if run and measured and not run.is_at(measured):
        raise UserError(
            f"{path} was measured on another model (checkpoint {shown(measured)}) "
            f"than {run.folder} at step {run.step} ({shown(run.fingerprint)})"
        )
    return statistics


def beside(table: Path) -> Path:
    """The file that holds the statistics of a bare table's model, if it is there."""
    return table.with_suffix(".statistics.npz")


class OfTable(NamedTuple):
    """Statistics for a bare table.

    is_checked: whether they are known to be of it; side: one of SIDES, if their model
    is untied and this is one of its two tables, else ''.
    """

    statistics: Statistics
    is_checked: bool
    side: str


def read_for(path: Path, table_VD: np.ndarray, source: object) -> OfTable:
    """The statistics for the bare table of a source.

    Raises UserError as `read` does, and if they are of another table. Files of older
    versions tell only its shape.
    """
    statistics, protocol = _read(path)
    check_shape(statistics, path, table_VD.shape, source)
    own, known = sha256_of_arrays(table_VD), protocol.get(_TABLES)
    if not isinstance(known, list):
        return OfTable(statistics, False, "")
    if own not in known:
        raise UserError(
            f"{path} has statistics of another table ({shown(', '.join(known))}) than "
            f"the one in {source} ({shown(own)}): give the statistics of this table, "
            "or the table in float32 as the model has it"
        )
    sides = [side for side, of in zip(SIDES, known, strict=False) if of == own]
    is_one = len(known) == len(SIDES) and len(sides) == 1
    return OfTable(statistics, True, sides[0] if is_one else "")


def check_shape(
    statistics: Statistics, path: Path, shape: tuple[int, ...], source: object
) -> None:
    """Raises UserError if statistics are of another shape [V, D] than a source's."""
    measured = len(statistics.probability), len(statistics.hidden_mean)
    if measured != shape:
        raise UserError(
            f"{path} has statistics of a table {measured}, but the table of {source} "
            f"is {shape}: give the statistics of this table"
        )


def _read(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Statistics from a file, and their protocol; errors are those of `read`."""
    arrays = read_npz(path)
    lacking = [name for name in Statistics._fields if name not in arrays]
    if lacking:
        raise UserError(f"{path} holds no statistics: it has no '{lacking[0]}'")
    statistics = Statistics(**{name: arrays[name] for name in Statistics._fields})
    protocol: Any = None
    with contextlib.suppress(ValueError):
        protocol = parse_json(str(arrays.get("protocol")).encode())
    protocol = protocol if isinstance(protocol, dict) else {}
    sizes = {"V": statistics.probability.size, "D": statistics.hidden_mean.size}
    for name, letters in _SHAPES.items():
        array = getattr(statistics, name)
        shape = tuple(sizes[letter] for letter in letters)
        if array.dtype != np.float64 or array.shape != shape or not array.size:
            raise UserError(
                f"{path}: '{name}' is {array.dtype} {array.shape}, it must be float64 "
                f"{shape}"
            )
        is_negative = letters == "V" and array.min() < 0
        if name in ("hidden_moment", "gradient_moment"):  # Of squares, up to rounding.
            squares = array.diagonal()
            is_negative = squares.min() < -1e-6 * np.abs(squares).max()
        is_absurd = not np.abs(array).max() <= LARGEST  # Also if it is NaN.
        if is_absurd or is_negative:
            raise UserError(f"{path}: '{name}' holds values that cannot be statistics")
        if letters == "V" and abs(array.sum() - 1) > SHARES_AGREE:
            raise UserError(
                f"{path}: '{name}' must hold a share for each token; its sum is "
                f"{array.sum():.6g}, it must be 1"
            )
    if protocol.pop("arrays_sha256", None) not in (None, _sha256(statistics)):
        raise UserError(f"{path} was changed or damaged since it was written")
    return statistics, protocol


def _sha256(statistics: Statistics) -> str:
    digest = hashlib.sha256()
    for array in statistics:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
