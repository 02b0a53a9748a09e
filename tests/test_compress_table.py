"""The task compress on a token table without its model."""

import json
import re

import numpy as np
import pytest
from command_line import CONFIGS, call, refusal
from runs import snapshot

from pcagpt.compression.codes import KINDS
from pcagpt.factorization.factor_files import read_bands
from pcagpt.report.bare_table import best_rows
from pcagpt.rows import ErrorRow

V, D = 600, 16


@pytest.fixture
def table(tmp_path):
    """A file of a table whose singular values fall."""
    random = np.random.default_rng(0)
    values = random.normal(size=(V, D)) * np.linspace(2, 0.1, D)
    np.save(tmp_path / "table.npy", values.astype(np.float32))
    return tmp_path / "table.npy"


def asked(table, *words):
    workdir = table.parent / "runs"
    ask = f"--config.model_path={table}", f"--config.workdir={workdir}"
    return f"--config={CONFIGS / 'compress.py'}", *ask, *words


RANKS = "--config.ranks=10,12"


def rows_of(table):
    stored = json.loads(
        (table.parent / "runs/compressed_table/errors.json").read_text()
    )
    return [ErrorRow.of(row, "a row") for row in stored["rows"]]


def test_every_table_has_its_size_and_error(table):
    outcome = call(*asked(table, RANKS))
    assert outcome.code == 0, outcome
    rows, own = rows_of(table), np.load(table)
    methods = {"svd", "pca", "coded", "packed", "baseline"}
    assert {row.method for row in rows} == methods
    assert {row.rank for row in rows if row.method == "coded"} == {10, 12}
    (svd,) = [row for row in rows if (row.method, row.rank) == ("svd", 10)]
    values = np.linalg.svd(own, compute_uv=False)
    error = np.sqrt(np.square(values[10:]).sum() / np.square(values).sum())
    assert svd.relative_error == pytest.approx(error, rel=1e-5)
    assert (svd.params, svd.bytes) == (10 * (V + D), 40 * (V + D))
    errors = [row.relative_error for row in rows]
    first, bound, more = outcome.out.splitlines()[-3:]
    assert first == (
        f"{len(rows)} tables, relative errors from {min(errors):.4f} to "
        f"{max(errors):.4f}: {table.parent}/runs/compressed_table/report.html"
    )
    assert bound.endswith(f"max_bytes={min(row.bytes for row in rows)}")
    assert more.startswith("no loss was measured: for losses, and for methods that")


def test_the_report_says_that_there_is_no_loss_and_lists_the_best_tables(table):
    assert call(*asked(table, RANKS)).code == 0
    folder, rows = table.parent / "runs/compressed_table", rows_of(table)
    text = (folder / "report.md").read_text()
    assert "**No loss was measured**" in text
    best = best_rows(rows)
    for row in rows:
        is_beaten = any(
            other.bytes <= row.bytes
            and other.relative_error <= row.relative_error
            and other != row
            for other in rows
        )
        assert is_beaten != (row in best)
        assert f"| {row.bytes:,} | " in text
    page = (folder / "report.html").read_text()
    assert "{: title=" not in page  # All cells became tables.
    assert (folder / "plots/errors.png").stat().st_size > 10_000


def test_an_interrupted_sweep_makes_only_what_is_missing(table, monkeypatch):
    assert call(*asked(table, "--config.ranks=10")).code == 0
    first = {row.recipe: row for row in rows_of(table)}
    assert call(*asked(table, RANKS)).code == 0
    both = {row.recipe: row for row in rows_of(table)}
    assert first.items() < both.items()
    monkeypatch.setattr("pcagpt.pipeline.compress_table._row", None)
    assert call(*asked(table, RANKS)).code == 0
    # Rows of another table are kept aside.
    monkeypatch.undo()
    np.save(table, 2 * np.load(table))
    assert call(*asked(table, "--config.ranks=10")).code == 0
    assert len(rows_of(table)) == len(first)
    assert len(list((table.parent / "runs").glob("*/errors.json.replaced-*"))) == 1


@pytest.mark.parametrize("method", ["", "coded", "packed", "svd"])
def test_the_best_table_within_a_bound_is_written(table, method):
    words = "--config.compress.max_bytes=6000", f"--config.compress.methods={method}"
    outcome = call(*asked(table, *words))
    assert outcome.code == 0, outcome
    folder = table.parent / "runs/compressed_table/advised"
    chosen = json.loads((folder / "advice.json").read_text())["chosen"]
    assert chosen["bytes"] <= 6000
    if chosen["bits"] == 0:
        kind = KINDS[chosen["method"]]
        found = kind.read(folder / kind.file)[0].dense()
        assert (folder / kind.file).stat().st_size == chosen["bytes"]
    else:
        found = read_bands(folder / "factors").dense()
    own = np.load(table)
    error = np.linalg.norm(found - own) / np.linalg.norm(own)
    assert chosen["relative_error"] == pytest.approx(error, rel=1e-5)
    assert f"relative error {error:.4f}\ntable: {folder}\n" in outcome.out
    before = snapshot(table.parent)
    assert call(*asked(table, *words)).code == 0
    assert snapshot(table.parent) == before
    assert call(*asked(table, "--config.compress.max_bytes=5500")).code == 0
    (earlier,) = folder.parent.glob("advised.replaced-*")
    assert json.loads((earlier / "advice.json").read_text())["chosen"] == chosen


def test_the_plan_counts_the_tables(table):
    outcome = call(*asked(table, RANKS), "--print_config")
    assert outcome.code == 0, outcome
    what, amount = outcome.out.splitlines()[-2:]
    assert what == f"compress {table}, a table ({V}, {D}) without its model"
    assert call(*asked(table, RANKS)).code == 0
    assert amount == f"{len(rows_of(table))} tables to make"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("compress.max_added_loss=0.1", "has no text and no loss: leave it out"),
        ("compress.recover_ranks=2", "has no text and no loss: leave it out"),
        ("evaluate.max_tokens=9", "has no text and no loss: leave it out"),
        ("split=test", "has no text and no loss: leave it out"),
        ("compress.methods=context", "'context' needs statistics of the model"),
        ("compress.methods=gptq", "'gptq' only serves for comparison"),
        ("ranks=99", r"ranks is \(99,\): the table of .* its rank is at most 16"),
        ("model_path=nothing.npy", "nothing.npy does not exist"),
    ],
)
def test_what_needs_the_model_or_fits_no_table_is_refused(table, word, said):
    line = refusal(*asked(table, f"--config.{word}"), unchanged=[])
    assert re.search(said, line), line
    assert not list(table.parent.glob("runs/compressed_table/*"))


def test_a_bound_that_no_table_fits_is_refused(table):
    outcome = call(*asked(table, "--config.compress.max_bytes=10"))
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("pcagpt: no table fits compress.max_bytes = 10: raise it to")
    assert not list(table.parent.glob("runs/compressed_table/*"))
