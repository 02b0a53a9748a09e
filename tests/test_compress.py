"""The task 'compress': what it measures, writes, reuses, finds and refuses."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import call
from runs import assert_equal, changed, execute, json_of, quick_compiles, snapshot
from test_rows import STORED

from pcagpt import coding, json_files, main, trees
from pcagpt.compression import fit, write_model
from pcagpt.compression import sweep as sweep_module
from pcagpt.compression.candidates import Compressor, recipes
from pcagpt.compression.codes import KINDS
from pcagpt.compression.original import Original
from pcagpt.compression.output import Output
from pcagpt.compression.score import TableSwap
from pcagpt.compression.sweep import _predicted
from pcagpt.config import Settings, validate
from pcagpt.config.schema import KNOBS, ModelSettings
from pcagpt.errors import Unreadable, UserError
from pcagpt.export.measured import measured
from pcagpt.export.model_card import model_card
from pcagpt.export.source import open_source
from pcagpt.factorization import factor_files
from pcagpt.json_files import read_json, write_json
from pcagpt.losses.deciles import frequency_deciles
from pcagpt.methods import CODES
from pcagpt.model import GPT
from pcagpt.pipeline import compress as task
from pcagpt.pipeline.compress import _models_to_train, compress
from pcagpt.pipeline.evaluate import evaluate
from pcagpt.pipeline.plan import recovery_plan
from pcagpt.report import collect, figures
from pcagpt.report.row_text import row_name
from pcagpt.rows import Provenance, Recipe, Row
from pcagpt.run import checkpoint, digests, fingerprint
from pcagpt.run.folder import FolderState, read_record, read_result, write_record
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run
from pcagpt.sharding import placement

pytestmark = pytest.mark.usefixtures("quick")
WIDTH, VOCAB_SIZE = 32, 97


def asked_in(workdir, finished_experiment):
    """The config that compresses a copy of a finished baseline in a folder."""
    run = shutil.copytree(
        Path(finished_experiment.workdir) / "gpt_baseline", workdir / "gpt_baseline"
    )
    return changed(
        finished_experiment,
        task="compress",
        workdir=str(workdir),
        model_path=str(run),
        ranks=(4, 8),
        **{"data.source": "", "compress.methods": "svd,context"},
        **{"compress.bands": (1, 3), "compress.bits": (8,)},
        **{"compress.calibration_tokens": 512},
    )


@pytest.fixture
def asked(finished_experiment, tmp_path):
    return asked_in(tmp_path, finished_experiment)


@pytest.fixture(scope="module")
def swept(finished_experiment, compiled, tmp_path_factory):
    """(config, sweep.json) of a finished sweep, not to be changed."""
    config = asked_in(tmp_path_factory.mktemp("swept"), finished_experiment)
    with quick_compiles(compiled):
        return config, sweep_of(config)


@pytest.fixture
def original(asked):
    return Original.of(Run.open(asked.model_path), Settings.of(asked))


def folder_of(config):
    return Path(config.workdir) / "compressed"


def sweep_of(config, **overrides):
    compress(Settings.of(changed(config, **overrides)), "a command")
    return json.loads((folder_of(config) / "sweep.json").read_text())


def loss_of(config, name):
    """Validation loss of a compressed model."""
    model = str(folder_of(config) / name)
    return evaluate(Settings.of(changed(config, model_path=model)))["loss"]


def test_a_compressed_model_with_other_weights_is_refused(swept, tmp_path):
    config, _ = swept
    shutil.copytree(folder_of(config) / "best_k8", tmp_path / "compressed/best_k8")
    copy = changed(config, workdir=str(tmp_path))
    wanted, model = loss_of(copy, "best_k8"), folder_of(copy) / "best_k8"
    weights = checkpoint.load_weights(model)
    weights["params"]["wpe"] = weights["params"]["wpe"] + 0.01
    shutil.rmtree(model / "ckpt")
    checkpoint.save_weights(model, weights)
    with pytest.raises(UserError, match="ckpt/0 holds other weights than those of"):
        loss_of(copy, "best_k8")
    record = read_record(model)
    del record["compressed"]["weights_sha256"]  # as an earlier version wrote it
    write_record(model, record)
    assert loss_of(copy, "best_k8") != wanted


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ("compressed", "method", r"compressed.method is 8, and \w+"),
        ("compressed", "bands", r"compressed.bands is 8, and \d"),
        ("model", "n_head", "model.n_head is 8, and 2"),
        (None, "vocab_size", "vocab_size is 98, and 97"),
    ],
)
def test_a_compressed_model_whose_record_describes_another_is_refused_and_made_again(
    copied_sweep, section, field, words
):
    model = folder_of(copied_sweep) / "best_k8"
    wanted, record = loss_of(copied_sweep, "best_k8"), read_record(model)
    (record[section] if section else record)[field] = 8 if section else 98
    write_record(model, record)
    with pytest.raises(UserError, match=f"json contradicts .*0: {words} there"):
        loss_of(copied_sweep, "best_k8")
    sweep_of(copied_sweep)
    assert len(replaced(model.parent)) == 1
    assert loss_of(copied_sweep, "best_k8") == wanted


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("is_measured", [True, False])
def test_a_compressed_model_without_its_record_is_read_and_gets_it_back(
    copied_sweep, is_used, is_measured
):
    model = folder_of(copied_sweep) / "best_k8"
    wanted, record = loss_of(copied_sweep, "best_k8"), read_record(model)
    if is_used:
        started = {"imported_sha256": {"weights_from": fingerprint.of(model)}}
        write_record(model.parent / "gpt_pca_finetune_from_best_k8", started)
    (model / "config.json").unlink()
    assert Run.open(model).record == record
    assert loss_of(copied_sweep, "best_k8") == wanted
    before = snapshot(model)
    if not is_measured:
        (model.parent / "sweep.json").unlink()
    sweep_of(copied_sweep)
    after = snapshot(model)
    assert read_record(model) == record
    del after["config.json"]
    assert after == before
    assert not replaced(model.parent)


def test_a_compressed_model_without_a_copy_of_its_record_is_read_and_stays(
    copied_sweep,
):
    model = folder_of(copied_sweep) / "best_k8"
    wanted, weights = loss_of(copied_sweep, "best_k8"), Run.open(model).weights
    shutil.rmtree(model / "ckpt")
    checkpoint.save_weights(model, weights)
    assert loss_of(copied_sweep, "best_k8") == wanted
    before = snapshot(model)
    sweep_of(copied_sweep)
    assert snapshot(model) == before


def key(row):
    return row["method"], row["bands"], row["rank"], row["bits"]


def best_of(sweep, rank):
    rows = [r for r in sweep["rows"] if r["rank"] == rank and r["bits"] == 32]
    return min(rows, key=lambda row: row["added_loss"])


# A sweep


def test_a_sweep_measures_every_method_rank_and_number_of_bands(swept):
    config, sweep = swept
    rows = {key(row): row for row in sweep["rows"]}
    assert set(rows) == {
        *(("svd", 1, rank, 32) for rank in (4, 8)),
        *(("context", bands, rank, 32) for bands in (1, 3) for rank in (4, 8)),
        *(("context", 3, rank, 8) for rank in (4, 8)),
        ("baseline", 1, 0, 8),
    }
    numbers = ["params", "bytes", "added_loss", "added_loss_input", "added_loss_head"]
    numbers += ["predicted_loss", "kl", "top1_agreement", "seconds"]
    for row in rows.values():
        assert np.isfinite([row[name] for name in numbers]).all()
        assert row["params"] == row["bytes"] / 4 or row["bits"] < 32
    for rank in (4, 8):
        budget = rank * (VOCAB_SIZE + WIDTH)
        assert rows["svd", 1, rank, 32]["params"] == budget
        assert rows["context", 3, rank, 32]["params"] <= budget
    # A table that adds nothing says nothing about the others.
    assert {key(row) for row in rows.values() if row["is_anchor"]} == {
        key(row)
        for row in rows.values()
        if row["bits"] == 32 and row["rank"] > 0 and row["added_loss"] >= 1e-3
    }
    assert rows["svd", 1, 4, 32]["is_anchor"]
    assert "rows_left" not in sweep
    assert "evaluated_tokens" not in sweep["protocol"]
    folder = folder_of(config)
    assert "</html>" in (folder / "report.html").read_text()
    assert (folder / "plots" / "pareto.png").stat().st_size > 10_000


def test_anchors_are_the_extremes_of_each_method_and_leave_out_exact_tables(swept):
    """A line through a table that adds only rounding would predict nothing."""
    rows = [
        dataclasses.replace(
            Row.of(swept[1]["rows"][0], "the sweep"),
            method="kl",
            bands=bands,
            bits=32,
            budget=budget,
            second_order_head=total,
            second_order_input=0.0,
            added_loss=added,
        )
        for bands, budget, total, added in (
            *((1, 40, 0.4, 0.3), (1, 80, 0.2, 0.16), (1, 160, 0.1, 0.09)),
            *((1, 320, 1e-13, 3e-7), (3, 80, 0.15, 0.12), (5, 80, 0.14, 0.11)),
        )
    ]
    rows = _predicted(rows)
    anchors = [i for i, row in enumerate(rows) if row.is_anchor]
    assert anchors == [0, 2, 4]
    for row in rows[:3]:
        assert row.predicted_loss == pytest.approx(row.added_loss, rel=0.3)
    # Nothing is fitted to codes.
    codes = [dataclasses.replace(row, method="coded", bits=0) for row in rows]
    assert not any(row.is_anchor or row.predicted_loss for row in _predicted(codes))


@pytest.mark.parametrize("rank", [4, 8])
def test_the_best_model_of_a_rank_is_a_run_with_the_loss_that_was_measured(swept, rank):
    config, sweep = swept
    best = best_of(sweep, rank)
    wanted = best["loss"] + best["added_loss"]
    assert loss_of(config, f"best_k{rank}") == pytest.approx(wanted, abs=2e-6)


@pytest.fixture
def copied_sweep(asked, swept):
    """The config of a copy of the finished sweep."""
    config, _ = swept
    shutil.copytree(folder_of(config), folder_of(asked))
    return asked


def replaced(folder):
    return [path.name for path in folder.glob("best_k8.replaced-*")]


def test_a_narrower_sweep_keeps_a_better_model_of_an_earlier_one(copied_sweep):
    folder = folder_of(copied_sweep)
    before = snapshot(folder / "best_k8")
    assert read_record(folder / "best_k8")["compressed"]["method"] != "svd"
    sweep = sweep_of(changed(copied_sweep, **{"compress.methods": "svd"}))
    assert {row["method"] for row in sweep["rows"]} == {"svd", "baseline"}
    assert snapshot(folder / "best_k8") == before
    assert sweep["models"]["best_k8"]["method"] != "svd"
    text = (folder / "report.md").read_text()
    shown = re.search(r"model_path=FOLDER/(best_k\d+)", text)[1]
    made = sweep["models"][shown]
    name = row_name(made["method"], made["bands"], made["bits"])
    assert f"To sample or export {name}, k={made['rank']}," in text
    assert f"| {name} | {made['rank']} |" in text.split("## All tables")[1]


def test_of_equal_tables_the_best_model_that_is_there_stays(copied_sweep):
    folder = folder_of(copied_sweep)
    sweep = json.loads((folder / "sweep.json").read_text())
    least = best_of(sweep, 8)["added_loss"]
    for row in sweep["rows"]:
        row["added_loss"] = least
    json_files.write_json(folder / "sweep.json", sweep)
    # An older version may have recorded fewer fields, which then have their default.
    record = read_record(folder / "best_k8")
    del record["compressed"]["bits"]
    json_files.write_json(folder / "best_k8" / "config.json", record)
    shutil.rmtree(folder / "best_k8" / "ckpt/0/meta")  # It has a copy of the record.
    before = snapshot(folder / "best_k8")
    sweep_of(copied_sweep)
    assert snapshot(folder / "best_k8") == before
    # Another one that is as good may be there, too.
    made = {key(row) for row in sweep["rows"] if row["rank"] == 8 and row["bits"] == 32}
    record = read_record(folder / "best_k8")
    of = record["compressed"]
    (other, *_) = made - {(of["method"], of["bands"], 8, 32)}
    record["compressed"] |= {"method": other[0], "bands": other[1]}
    json_files.write_json(folder / "best_k8" / "config.json", record)
    row = next(row for row in sweep["rows"] if key(row) == other)
    record["compressed"] |= {name: row[name] for name in ("budget", "table_sha256")}
    json_files.write_json(folder / "best_k8" / "config.json", record)
    sweep_of(copied_sweep)
    compressed = read_record(folder / "best_k8")["compressed"]
    assert (compressed["method"], compressed["bands"]) == other[:2]


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_best_model_with_other_weights_is_moved_aside_and_made_again(
    copied_sweep, is_swapped
):
    folder = folder_of(copied_sweep)
    weights = folder / "best_k8" / "ckpt" / "0"
    wanted = loss_of(copied_sweep, "best_k8")
    if is_swapped:
        shutil.rmtree(weights)
        shutil.copytree(folder / "best_k4" / "ckpt" / "0", weights)
    else:
        (weights / "weights" / "_METADATA").write_text("{}")
    sweep_of(copied_sweep)
    assert len(replaced(folder)) == 1
    assert loss_of(copied_sweep, "best_k8") == wanted
    sweep_of(copied_sweep)
    assert len(replaced(folder)) == 1


@pytest.mark.parametrize("harm", ["lost", "damaged", "exchanged"])
def test_lost_or_damaged_factors_of_a_best_model_are_written_again(copied_sweep, harm):
    folder = folder_of(copied_sweep)
    factors, model = folder / "best_k8" / "factors", folder / "best_k8" / "ckpt"
    wanted, before = factor_files.sha256_of_bands(factors), snapshot(model)
    if harm == "damaged":
        (factors / "token_order.npy").write_bytes(b"garbage")
        with pytest.raises(UserError, match=f"the command that made {factors} writes"):
            factor_files.read_bands(factors)
    else:
        shutil.rmtree(factors)
    if harm == "exchanged":
        shutil.copytree(folder / "best_k4" / "factors", factors)
    sweep_of(copied_sweep)
    assert factor_files.sha256_of_bands(factors) == wanted
    assert snapshot(model) == before and not replaced(folder)
    # What a person may have put there is kept.
    assert len(list(factors.parent.glob("factors.replaced-*"))) == (harm != "lost")
    before = snapshot(factors.parent)
    sweep_of(copied_sweep)
    assert snapshot(factors.parent) == before


@pytest.fixture
def other_rounding(monkeypatch):
    """Factors differ in their last bit, as those of another machine can."""
    make = Compressor._make

    def rounded(self, recipe):
        table = make(self, recipe)
        bands = [b._replace(wte=np.nextafter(b.wte, np.inf)) for b in table.bands]
        return table._replace(bands=tuple(bands))

    monkeypatch.setattr(Compressor, "_make", rounded)


@pytest.mark.usefixtures("other_rounding")
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_best_model_stays_where_the_solver_rounds_differently(copied_sweep, is_lost):
    folder = folder_of(copied_sweep)
    factors = folder / "best_k8" / "factors"
    before = snapshot(folder / "best_k8")
    wanted = factor_files.sha256_of_bands(factors)
    if is_lost:
        shutil.rmtree(factors)
    sweep_of(copied_sweep)
    after = snapshot(folder / "best_k8")
    assert factor_files.sha256_of_bands(factors) == wanted
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == (
        {name for name in after if name.startswith("factors/")} if is_lost else set()
    )
    assert not replaced(folder)


@pytest.mark.usefixtures("other_rounding")
@pytest.mark.parametrize("is_used", [False, True])
def test_a_model_of_rows_measured_anew_is_replaced_unless_a_run_started_from_it(
    copied_sweep, is_used
):
    folder = folder_of(copied_sweep)
    if is_used:
        of = fingerprint.of(folder / "best_k8")
        record = {"imported_sha256": {"weights_from": of}}
        write_record(folder / "gpt_pca_finetune_from_best_k8", record)
    before = snapshot(folder / "best_k8")
    (folder / "sweep.json").unlink()
    made = read_record(folder / "best_k8")["compressed"]
    own = {"compress.methods": made["method"], "compress.bands": (made["bands"],)}
    sweep_of(copied_sweep, ranks=(8,), **own, **{"compress.bits": ()})
    assert (snapshot(folder / "best_k8") == before) == is_used
    assert len(replaced(folder)) == (not is_used)


@pytest.mark.parametrize("at", ["measure", "report"])
def test_a_sweep_whose_folder_is_moved_stops_with_a_line_and_goes_on_when_it_is_back(
    asked, monkeypatch, at
):
    folder, away = folder_of(asked), Path(asked.workdir) / "away"
    owner, name = (Original, "measure")
    if at == "report":
        owner, name = sweep_module, "write_sweep_report"
    call = getattr(owner, name)

    def move_and_call(*args):
        if folder.exists():
            folder.rename(away)
        return call(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, move_and_call)
        with pytest.raises(UserError, match=f"{folder} was removed or .* move it back"):
            sweep_of(asked, ranks=(8,))
    away.rename(folder)
    assert sweep_of(asked, ranks=(8,))["models"].keys() == {"best_k8"}


@pytest.mark.parametrize("name", ["write_sweep_report", "write_model"])
def test_the_choice_of_a_sweep_is_told_on_a_full_disk(asked, monkeypatch, capsys, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep_module, name, fail)
    with pytest.raises(OSError, match="No space left"):
        sweep_of(asked, ranks=(8,))
    *_, last = capsys.readouterr().out.splitlines()
    assert re.match("recommended: .* nats per token$|none is recommended; best: ", last)


@pytest.mark.parametrize("lost", ["best_k8", "sweep.json"])
def test_a_sweep_notices_that_a_part_of_its_results_is_removed(
    copied_sweep, monkeypatch, lost
):
    place = folder_of(copied_sweep) / lost
    monkeypatch.setattr(
        task, "_sample", lambda *_: place.rename(place.with_name("away"))
    )
    with pytest.raises(UserError, match=f"{place} was removed or replaced while this"):
        sweep_of(copied_sweep)


def test_another_calibration_is_refused_with_the_knob_that_makes_both_agree(
    copied_sweep,
):
    agrees = "--config.compress.calibration_tokens=512"
    with pytest.raises(
        UserError,
        match=rf"calibration_tokens \(there 512, here 256; use {agrees} to match",
    ):
        sweep_of(copied_sweep, **{"compress.calibration_tokens": 256})


def test_rows_of_another_calibration_batch_size_are_refused_or_measured_anew(
    copied_sweep,
):
    folder, size = folder_of(copied_sweep), copied_sweep.train.batch_size
    before = json.loads((folder / "sweep.json").read_text())
    assert before["protocol"]["calibration_batch_size"] == size
    other, agrees = {"train.batch_size": 2 * size}, f"--config.train.batch_size={size}"
    with pytest.raises(
        UserError,
        match=rf"batch_size \(there {size}, here {2 * size}; use {agrees} to match",
    ):
        sweep_of(copied_sweep, **other)
    assert json.loads((folder / "sweep.json").read_text()) == before
    after = sweep_of(copied_sweep, overwrite=True, **other)
    assert after["protocol"]["calibration_batch_size"] == 2 * size
    known = {(key(row), row["seconds"]) for row in before["rows"]}
    assert not known & {(key(row), row["seconds"]) for row in after["rows"]}
    assert not after["other_rows"]


def test_measured_rows_are_kept_and_not_measured_again(asked, swept, monkeypatch):
    config, first = swept
    shutil.copytree(folder_of(config), folder_of(asked))
    known = {key(row): row for row in first["rows"]}
    sweep_of(asked)  # Finds the whole sweep; writes the statistics.
    before, made = snapshot(Path(asked.model_path)), []
    make = Compressor.__call__
    monkeypatch.setattr(
        Compressor, "__call__", lambda self, r: made.append(r) or make(self, r)
    )
    monkeypatch.setattr(Compressor, "gaussian_limit", pytest.fail)
    larger = sweep_of(asked, ranks=(4, 8, 12))
    assert larger["gaussian_limit"] == first["gaussian_limit"]
    assert {recipe.rank for recipe in made} == {12}
    for row in larger["rows"]:
        assert row["rank"] == 12 or row["seconds"] == known[key(row)]["seconds"]
    assert snapshot(Path(asked.model_path)) == before
    smaller = sweep_of(asked, ranks=(8,), **{"compress.bands": (1,)})
    assert {row["rank"] for row in smaller["rows"]} == {0, 8}
    assert {key(r) for r in smaller["rows"] + smaller["other_rows"]} > known.keys()


def test_a_sweep_names_the_commits_under_which_its_rows_were_measured_and_no_other(
    asked, monkeypatch
):
    few = {"compress.methods": "svd", "compress.bands": (1,), "compress.bits": ()}

    def commits(commit, **ranks):
        monkeypatch.setenv("PCAGPT_COMMIT", commit)
        found = sweep_of(asked, **few, **ranks)
        report = (folder_of(asked) / "report.md").read_text()
        assert f"| git commit | {found['git_commit']} |" in report
        return found["git_commit"]

    assert commits("one", ranks=(4, 8)) == "one"
    assert commits("two", ranks=(8,)) == "one"  # It measured nothing.
    shutil.rmtree(folder_of(asked) / "best_k8")
    assert commits("two", ranks=(8,)) == "one"  # The same table.
    assert commits("three", ranks=(4, 12)) == "one, three"
    assert commits("three", ranks=(16,)) == "one, three"
    found = json_of(folder_of(asked) / "sweep.json")
    assert "grain" in found["versions"]
    trained = {"run": "k4", "rank": 4, "method": "svd", "bands": 1, "tokens_seen": 5}
    trained |= {"val_loss": 1.0, "added_loss": 0.1, "git_commit": "four"}
    found["recovered"] = [trained | {"device": "1 x B", "versions": {"jax": "9"}}]
    write_json(folder_of(asked) / "sweep.json", found)
    sweep_of(asked, **few, ranks=(4,))
    report = (folder_of(asked) / "report.md").read_text()
    assert "| git commit | one, three, four |" in report
    assert f"jax {found['versions']['jax']}, 9," in report


@pytest.mark.usefixtures("other_rounding")
def test_a_sweep_names_the_commit_of_a_table_that_is_made_again_with_other_rounding(
    copied_sweep, monkeypatch
):
    earlier = json_of(folder_of(copied_sweep) / "sweep.json")["git_commit"]
    shutil.rmtree(folder_of(copied_sweep) / "best_k8")
    monkeypatch.setenv("PCAGPT_COMMIT", "two")
    assert sweep_of(copied_sweep)["git_commit"] == f"{earlier}, two"


@pytest.mark.parametrize("file", ["sweep.json", "advice.json"])
def test_numbers_stay_when_the_file_of_the_tokenizer_is_moved(copied_sweep, file):
    """Its content is in the hash of the corpus."""
    folder, bound = folder_of(copied_sweep), {"compress.max_params": 1000}
    again = changed(copied_sweep, **(bound if file == "advice.json" else {}))
    compress(Settings.of(again), "a command")
    found = json_of(folder / file)
    found["protocol"] |= {"tokenizer": "/moved/tokenizer.json", "corpus": "/moved"}
    write_json(folder / file, found)
    compress(Settings.of(again), "a command")
    assert json_of(folder / file)["protocol"]["tokenizer"] is None
    assert not [*folder.glob("*.replaced-*")]


def interrupted_sweep(config, rows, monkeypatch):
    """sweep.json of a sweep that was interrupted after so many new rows."""
    measured, score = [], TableSwap.__call__

    def interrupted(self, *arguments):
        if len(measured) == rows:
            raise KeyboardInterrupt
        measured.append(score(self, *arguments))
        return measured[-1]

    with monkeypatch.context() as patched:
        patched.setattr(TableSwap, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_of(config)
    return json.loads((folder_of(config) / "sweep.json").read_text())


def test_a_sweep_that_was_interrupted_has_a_report_and_goes_on(asked, monkeypatch):
    sweep = interrupted_sweep(asked, 6, monkeypatch)
    assert (len(sweep["rows"]), sweep["rows_left"]) == (6, 3)
    assert [key(row)[:2] for row in sweep["rows"][:2]] == [("context", 3)] * 2
    assert all(row["predicted_loss"] is not None for row in sweep["rows"])
    report = (folder_of(asked) / "report.md").read_text()
    assert "4 tables are left" in report
    assert "configs/export.py" not in report  # There are no models yet.
    finished = sweep_of(asked)
    assert "rows_left" not in finished
    assert finished["rows"][:6] == [
        row | {k: finished["rows"][i][k] for k in ("predicted_loss", "is_anchor")}
        for i, row in enumerate(sweep["rows"])
    ]


def test_a_wider_sweep_that_was_interrupted_knows_which_models_are_there(
    copied_sweep, monkeypatch
):
    earlier = json.loads((folder_of(copied_sweep) / "sweep.json").read_text())
    wider = changed(copied_sweep, ranks=(4, 8, 12))
    sweep = interrupted_sweep(wider, 2, monkeypatch)
    assert sweep["rows_left"]
    assert sweep["models"] == earlier["models"]
    assert sweep_of(wider)["models"].keys() == {"best_k4", "best_k8", "best_k12"}


def test_a_limit_of_tokens_is_part_of_the_protocol_and_of_the_report(asked):
    limited = {"evaluate.max_tokens": 100, "compress.methods": "svd"}
    sweep = sweep_of(asked, **limited)
    assert sweep["protocol"]["evaluated_tokens"] == 100
    report = (folder_of(asked) / "report.md").read_text()
    assert "first 100 tokens of the validation split" in report
    whole = sweep_of(asked, **limited | {"evaluate.max_tokens": 10**9})
    with pytest.raises(UserError, match=r"ns \(there the whole split, here 100\)"):
        sweep_of(asked, **limited)  # A part does not replace the whole.
    assert "evaluated_tokens" not in whole["protocol"]
    for one, other in zip(sweep["rows"], whole["rows"], strict=True):
        assert one["loss"] != other["loss"]
    original = Original.of(
        Run.open(asked.model_path), Settings.of(changed(asked, **limited))
    )
    assert sum((t >= 0).sum() for _, t in original.batches) == 100


def test_another_checkpoint_is_refused_or_measured_anew(asked):
    methods = {"compress.methods": "svd"}
    step_6 = sweep_of(asked, **methods)["rows"][0]["loss"]
    earlier = {"model_path": asked.model_path + "/ckpt/3"} | methods
    with pytest.raises(UserError, match=r"other numbers, checkpoint \(there"):
        sweep_of(asked, **earlier)
    assert sweep_of(asked, overwrite=True, **earlier)["rows"][0]["loss"] != step_6


def test_best_models_of_another_d_are_named_when_a_sweep_starts(asked, capsys):
    methods = {"compress.methods": "svd", "compress.bands": (1,)}
    sweep_of(asked, **methods)
    earlier = {"model_path": asked.model_path + "/ckpt/3", "ranks": (8,)} | methods
    assert "another D" not in capsys.readouterr().out
    sweep_of(asked, overwrite=True, **earlier)
    out, folder = capsys.readouterr().out, folder_of(asked)
    than = f"belongs to another D than {asked.model_path}, step 3"
    assert f"{folder}/best_k4 {than}: sweep its rank, or delete it\n" in out
    assert f"{folder}/best_k8 {than}: this sweep renews it\n" in out
    assert out.count("another D") == 2  # No line for the one that was moved aside.
    for copy in ("best_k4.bak", "best_book"):
        shutil.copytree(folder / "best_k4", folder / copy)
    sweep_of(asked, **earlier)
    assert capsys.readouterr().out.count("another D") == 1


@pytest.mark.parametrize("kind", ["a link to nothing: remove", "a file, not a folder"])
@pytest.mark.parametrize("name", ["", "best_k8"])
def test_what_is_no_folder_is_refused_before_anything_is_measured(
    name, kind, asked, monkeypatch
):
    place = folder_of(asked) / name if name else folder_of(asked)
    place.parent.mkdir(exist_ok=True)
    if "file" in kind:
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    monkeypatch.setattr(Original, "measure", None)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{place} is {kind}"):
            sweep_of(asked, overwrite=overwrite)


def test_a_model_s_folder_may_be_directly_below_the_root():
    recipe = Recipe("svd", 1, 100, 4)
    assert not write_model.stays(Path("/no such model"), recipe, overwrite=False)


def test_another_factorization_makes_another_best_model(asked):
    table, methods = [], {"compress.methods": "svd", "compress.bits": ()}
    for split in (0.0, 0.5):
        methods |= {"factorize.singular_value_split": split, "overwrite": True}
        sweep_of(asked, **methods)
        factors = factor_files.read_bands(folder_of(asked) / "best_k8" / "factors")
        table.append(factors.bands[0].wte)
    assert not np.allclose(*table)


def test_exported_bands_and_the_model_are_the_same_dense_table(asked, original):
    """The permutation stays inside the model: logits come by token id."""
    sweep_of(asked, **{"compress.methods": "freq", "compress.bands": (3,)})
    folder = folder_of(asked) / "best_k8"
    dense = padded(factor_files.read_bands(folder / "factors").dense())
    params = original.run.weights["params"] | {"embed": {"band_0": {"wte": dense}}}
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) * 3
    wanted = jax.jit(original.model.gpt.apply)({"params": params}, tokens)
    run = Run.open(folder)
    assert sum(run.record["model"]["band_sizes"]) == VOCAB_SIZE
    model = GPT(run.config(Settings.of(asked).model))
    logits = jax.jit(model.apply)(run.variables(model.config), tokens)
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(wanted), atol=2e-5
    )


def padded(table):
    return np.pad(table, ((0, 128 - VOCAB_SIZE), (0, 0))).astype(np.float32)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_model_is_of_a_row_only_if_it_has_the_table_of_its_statistics(
    asked, monkeypatch, capsys, is_used
):
    """The sweep of other statistics was interrupted; a run may use the old model."""
    methods = {"compress.methods": "context,coded", "compress.bands": (1,)}
    asked = changed(asked, ranks=(8,), **methods)
    first = sweep_of(asked, **{"compress.calibration_tokens": 64})
    folder = folder_of(asked)
    if is_used:
        record = {
            "imported_sha256": {"weights_from": fingerprint.of(folder / "best_k8")}
        }
        write_record(folder / "gpt_pca_finetune_from_best_k8", record)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "_write_best", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep_of(asked, overwrite=True)
    for _ in range(2):
        found = sweep_of(asked)
        for name in ("best_k8", "best_coded_k8"):
            known = read_record(folder / name)["compressed"]["table_sha256"]
            is_old = is_used and name == "best_k8"
            rows = (first if is_old else found)["rows"]
            assert known in {row["table_sha256"] for row in rows}
            assert (name in found["models"]) == (not is_old)
        stays = "best_k8 stays, because"
        assert (stays in capsys.readouterr().out) == is_used


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_best_model_that_a_run_started_from_is_not_replaced_without_overwrite(
    copied_sweep, capsys, overwrite
):
    folder = folder_of(copied_sweep)
    record = {"imported_sha256": {"weights_from": fingerprint.of(folder / "best_k8")}}
    run = folder / "gpt_pca_finetune_from_best_k8"
    write_record(run, record)
    before = snapshot(folder / "best_k8")
    sweep = json.loads((folder / "sweep.json").read_text())
    own = best_of(sweep, 8)
    for row in sweep["rows"]:
        if row["rank"] == 8 and key(row) != key(own):
            row["added_loss"] = own["added_loss"] - 1
    json_files.write_json(folder / "sweep.json", sweep)
    sweep_of(copied_sweep, overwrite=overwrite)
    assert (snapshot(folder / "best_k8") == before) == (not overwrite)
    assert len(replaced(folder)) == overwrite
    said = f"best_k8 stays, because {run} started from it; another table"
    assert (said in capsys.readouterr().out) == (not overwrite)


def test_overwrite_moves_what_is_damaged_in_a_best_model_s_place_aside(copied_sweep):
    """Its refusal gives this advice."""
    place = folder_of(copied_sweep) / "best_k8"
    os.truncate(place / "config.json", 200)
    with pytest.raises(UserError, match="with --config.overwrite=True"):
        sweep_of(copied_sweep)
    sweep_of(copied_sweep, overwrite=True)
    assert Run.open(place).step == 0
    (kept,) = place.parent.glob("best_k8.replaced-*")
    assert (kept / "config.json").stat().st_size == 200


def test_a_model_card_has_no_loss_of_another_table_of_its_recipe(asked):
    methods = {"compress.methods": "context,coded", "compress.bands": (1,)}
    for tokens in (64, 512):
        calibration = {"compress.calibration_tokens": tokens}
        sweep_of(asked, overwrite=True, ranks=(8,), **methods, **calibration)
    for name in ("best_k8", "best_coded_k8"):
        (moved,) = folder_of(asked).glob(f"{name}.replaced-*")
        for place, count in ((folder_of(asked) / name, 1), (moved, 0)):
            source = open_source(Settings(task="export", model_path=str(place)))
            assert len(measured(source, asked.workdir)) == count, place


@pytest.mark.parametrize("limit", [0, 96])
def test_a_sweep_and_an_evaluation_of_one_text_are_one_line_of_a_model_card(
    asked, limit
):
    methods = {"compress.methods": "svd", "compress.bands": (1,), "ranks": (8,)}
    cut = {"evaluate.max_tokens": limit}
    sweep = sweep_of(asked, **methods, **cut)
    place = folder_of(asked) / "best_k8"
    kept = {"data.source": asked.data.source, "workdir": asked.workdir}
    settings = Settings(task="evaluate", model_path=str(place)).replace(kept | cut)
    loss = evaluate(settings)["loss"]
    source = open_source(settings.replace({"task": "export"}))
    (found,) = measured(source, asked.workdir)
    (row,) = [row for row in sweep["rows"] if row["bits"] == 32]
    assert found["loss"] == loss
    assert found["added"] == row["added_loss"]
    assert found["tokens"] == (limit or found["tokens"]) > 0
    card = model_card(source, "hf", [found])
    assert ("predicts the N tokens after the split's first" in card) == bool(limit)
    assert ("All tokens of the split except the first" in card) != bool(limit)
    assert (f"| first {limit} |" in card) == bool(limit)
    # A sweep of an older version does not say which tokens it is of.
    path = folder_of(asked) / "sweep.json"
    write_json(path, read_json(path, "") | {"measured_on": None})
    assert measured(source, asked.workdir) == [found]
    # An evaluation alone says so itself, whatever the names of file and corpus.
    path.unlink()
    (file,) = place.glob("evaluation_*.json")
    corpus = "a" if limit else f"a_first{found['tokens']}_step"
    file = file.rename(place / f"evaluation_{corpus}_val_step0.json")
    (alone,) = measured(source, asked.workdir)
    assert alone.get("is_first", False) == bool(limit)
    if limit:  # Older versions say it only in the name.
        content = read_json(file, "")
        del content["protocol"]["evaluated_tokens"]
        file.unlink()
        write_json(
            place / f"evaluation_c_val_first{limit}_step0_0a1b2c3d.json", content
        )
        assert measured(source, asked.workdir) == [alone]


def test_a_compressed_model_is_not_compressed_again(asked):
    sweep_of(asked, ranks=(8,), **{"compress.methods": "coded"})
    model = folder_of(asked) / "best_coded_k8"
    again = changed(asked, model_path=str(model), workdir=f"{model}/runs")
    with pytest.raises(UserError, match=r"compressed table: give the model .* from, /"):
        sweep_of(again)
    words = f"--config.model_path={model}", "--print_config"
    outcome = call("--config=configs/compress.py", *words)
    assert outcome.code == 2 and "has a compressed table" in outcome.err


# What is measured


def test_a_new_table_is_scored_as_two_naive_models_are(original):
    noise = np.random.default_rng(0).normal(size=original.table_VD.shape)
    own, table = original.table_VD, original.table_VD + 0.05 * noise.astype(np.float32)
    deciles = frequency_deciles(original.corpus.count_tokens("train") * 1.0)
    swap = TableSwap(
        original.model.gpt, original.model.variables, original.model.mesh, 3
    )
    batches = list(original.batches)[:2]
    scores = swap(table, deciles, batches)

    @jax.jit
    def hidden_of(params, inputs):
        return original.model.gpt.apply({"params": params}, inputs, method="hidden")

    def log_p(input_table, head_table):
        embed = {"band_0": {"wte": padded(input_table)}}
        params = original.run.weights["params"] | {"embed": embed}
        hidden = [hidden_of(params, inputs) for inputs, _ in batches]
        logits = np.concatenate(hidden) @ head_table.T
        return np.asarray(jax.nn.log_softmax(logits), np.float64)

    targets = np.concatenate([t.reshape(-1) for _, t in batches])
    counted = targets >= 0
    log = {
        "loss": log_p(own, own),
        "added_loss": log_p(table, table),
        "added_loss_input": log_p(table, own),
        "added_loss_head": log_p(own, table),
    }
    loss = {n: -v[np.arange(len(v)), targets][counted] for n, v in log.items()}
    assert scores.loss == pytest.approx(loss.pop("loss").mean(), rel=1e-6)
    own_loss = -log["loss"][np.arange(len(targets)), targets][counted]
    for name, losses in loss.items():
        wanted = pytest.approx((losses - own_loss).mean(), abs=1e-6)
        assert getattr(scores, name) == wanted
    log_own, log_new = log["loss"], log["added_loss"]
    kl = (np.exp(log_own) * (log_own - log_new)).sum(axis=1)[counted]
    assert scores.kl == pytest.approx(kl.mean(), abs=1e-6)
    same = (log_own.argmax(1) == log_new.argmax(1))[counted]
    assert scores.top1_agreement == pytest.approx(same.mean())
    # The ratio estimator, with t of n - 1 = 63 windows; the last window is not full.
    count_W = counted.reshape(-1, 16).sum(axis=1)
    counts = count_W[count_W > 0]
    assert len(counts) == 63 and counts[-1] < 16
    added_N = np.zeros(len(targets))
    added_N[counted] = loss["added_loss"] - own_loss
    sums = added_N.reshape(-1, 16).sum(axis=1)[count_W > 0]
    residuals = sums - counts * sums.sum() / counts.sum()
    shares = counts / counts.sum()
    variance = (residuals**2).sum() / counts.sum() ** 2 / (1 - (shares**2).sum())
    half = 1.998971517 * np.sqrt(variance)  # The 97.5th percentile, 62 degrees.
    middle = (loss["added_loss"] - own_loss).mean()
    wanted = pytest.approx([middle - half, middle + half], abs=1e-6)
    assert scores.added_loss_interval == wanted
    of_target = deciles[targets[counted]]
    for decile, found in enumerate(scores.added_loss_by_decile):
        chosen = (loss["added_loss"] - own_loss)[of_target == decile]
        wanted = pytest.approx(chosen.mean(), abs=1e-5) if len(chosen) else None
        assert found == wanted


@pytest.mark.parametrize(("devices", "chunks"), [(2, 3), (8, 4), (8, 1)])
def test_the_interval_is_the_same_on_several_devices_and_in_chunks(
    original, devices, chunks
):
    """Chunks take every n-th token, so windows must be put together again."""
    noise = np.random.default_rng(0).normal(size=original.table_VD.shape)
    table = original.table_VD + 0.05 * noise.astype(np.float32)
    deciles = np.zeros(VOCAB_SIZE, np.int32)

    def interval(mesh, chunks):
        host = original.run.variables(original.model.gpt.config)
        variables = jax.device_put(host, placement.shardings(host, mesh))
        swap = TableSwap(original.model.gpt, variables, mesh, chunks)
        return swap(table, deciles, original.batches).added_loss_interval

    wanted = interval(original.model.mesh, 1)
    found = interval(placement.make_mesh(devices // 2, 2), chunks)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert wanted[0] < wanted[1]


def test_the_own_table_adds_nothing_within_an_interval_of_width_zero(original):
    deciles = np.zeros(VOCAB_SIZE, np.int32)
    swap = TableSwap(
        original.model.gpt, original.model.variables, original.model.mesh, 3
    )
    scores = swap(original.table_VD, deciles, original.batches)
    assert (scores.added_loss, scores.added_loss_interval) == (0, [0, 0])


def test_one_window_has_no_interval(original):
    deciles = np.zeros(VOCAB_SIZE, np.int32)
    swap = TableSwap(
        original.model.gpt, original.model.variables, original.model.mesh, 3
    )
    inputs, targets = next(iter(original.batches))
    targets = np.where(np.arange(len(targets))[:, None] == 0, targets, -1)
    scores = swap(original.table_VD, deciles, [(inputs, targets)])
    assert scores.added_loss_interval is None


# The test split


def measure(config, **overrides):
    compress(Settings.of(changed(config, **overrides)), "a command")


def test_a_sweep_on_the_test_split_leaves_the_other_one_and_its_models_as_they_are(
    copied_sweep, swept
):
    before, workdir = snapshot(folder_of(copied_sweep)), Path(copied_sweep.workdir)
    measure(copied_sweep, split="test")
    assert snapshot(folder_of(copied_sweep)) == before
    folder = workdir / "compressed_test"
    assert {path.name for path in folder.iterdir()} == {
        *("sweep.json", "report.md", "report.html", "plots")
    }
    test, val = json.loads((folder / "sweep.json").read_text()), swept[1]
    assert (test["protocol"]["split"], val["protocol"]["split"]) == ("test", "val")
    assert [key(row) for row in test["rows"]] == [key(row) for row in val["rows"]]
    run = changed(copied_sweep, split="test")
    loss = pytest.approx(evaluate(Settings.of(run))["loss"], abs=2e-6)
    for one, other in zip(test["rows"], val["rows"], strict=True):
        assert one["loss"] == loss and one["added_loss"] != other["added_loss"]
    report = (folder / "report.md").read_text()
    assert "over the whole test split" in report and "validation loss" not in report
    assert "Nothing is chosen on this split." in report
    # Its rows are kept like those of the other sweep.
    measure(copied_sweep, split="test")
    again = json.loads((folder / "sweep.json").read_text())
    assert [r["seconds"] for r in again["rows"]] == [r["seconds"] for r in test["rows"]]


def test_rows_of_another_test_split_are_not_kept(asked, tmp_path):
    own, named = Run.open(asked.model_path).record["corpus_source"], tmp_path / "named"
    shutil.copytree(own, named, ignore=shutil.ignore_patterns(".*"))
    options = {"split": "test", "data.source": str(named), "compress.methods": "svd"}
    measure(asked, **options)
    tokens = np.fromfile(named / "test.bin", np.uint16)
    tokens[:-1] = tokens[1:]
    tokens.tofile(named / "test.bin")
    with pytest.raises(UserError, match=r"holds other numbers, tokens_sha256 \(there"):
        measure(asked, **options)


def test_a_corpus_without_a_test_split_is_refused_before_work(asked, tmp_path):
    own, named = Run.open(asked.model_path).record["corpus_source"], tmp_path / "named"
    shutil.copytree(own, named, ignore=shutil.ignore_patterns(".*", "test.bin"))
    with pytest.raises(UserError, match="no 'test' split"):
        measure(asked, split="test", **{"data.source": str(named)})
    assert not (tmp_path / "compressed_test").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_bytes", 2600), ("max_added_loss", 0.1), ("recover_ranks", (8,))],
)
def test_nothing_is_chosen_on_the_test_split(asked, name, value):
    config = changed(asked, split="test", **{f"compress.{name}": value})
    with pytest.raises(UserError, match=f"compress.{name} chooses .* split is test"):
        validate(Settings.of(config))


# A bound


def advice_of(config, **bounds):
    asked = {f"compress.{name}": value for name, value in bounds.items()}
    compress(Settings.of(changed(config, **asked)), "a command")
    advice = json.loads((folder_of(config) / "advice.json").read_text())
    chosen = advice["chosen"]
    wanted = chosen["loss"] + chosen["added_loss"]
    assert loss_of(config, "advised") == pytest.approx(wanted, abs=2e-6)
    return chosen, advice["trials"]


def test_the_table_that_fits_a_bound_is_written_as_a_run(asked):
    chosen, trials = advice_of(asked, max_added_loss=0.001)
    assert chosen["added_loss"] <= 0.001
    assert chosen in trials
    assert advice_of(asked, max_params=1000)[0]["params"] <= 1000


def test_a_loss_that_no_tried_table_fits_is_refused_with_their_number(
    asked, monkeypatch
):
    monkeypatch.setattr(fit.Fit, "_smallest", lambda self, bound: None)
    words = r"none of the \d+ tables that were tried fits compress.max_added_loss = 0.1"
    with pytest.raises(UserError, match=words):
        advice_of(asked, max_added_loss=0.1)


@pytest.mark.parametrize("allowed", [2600, 3300])
def test_a_bound_on_bytes_is_used_up_and_allows_the_full_table_in_few_bits(
    asked, allowed
):
    """97 x 32 values take 1,649 bytes in 4 bits and 3,201 in 8, with their scales."""
    chosen, trials = advice_of(asked, max_bytes=allowed, bits=(8, 4))
    tried = {(row["method"], row["bits"]): row for row in trials}
    assert ("baseline", 4) in tried
    assert (("baseline", 8) in tried) == (allowed > 3200)
    assert max(row["bytes"] for row in trials) <= allowed
    assert chosen["added_loss"] == min(row["added_loss"] for row in trials)
    assert tried["context", 8]["bytes"] > 0.9 * allowed


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_advised_model_that_a_run_started_from_is_not_replaced_without_overwrite(
    asked, capsys, overwrite
):
    advice_of(asked, max_params=1000)
    folder = folder_of(asked)
    record = {"imported_sha256": {"weights_from": fingerprint.of(folder / "advised")}}
    run = Path(asked.workdir) / "gpt_pca_distill_from_advised"
    write_record(run, record)
    before = snapshot(folder)
    capsys.readouterr()
    other = changed(asked, overwrite=overwrite, **{"compress.max_params": 900})
    refused = pytest.raises(UserError, match="max_params = 900 was not saved, because")
    with nullcontext() if overwrite else refused:
        compress(Settings.of(other), "a command")
    said = f"advised stays, because {run} started from it; another table"
    printed = capsys.readouterr().out
    assert (said in printed) == (not overwrite)
    assert ("configs/export.py" in printed) == overwrite
    assert len(list(folder.glob("advised.replaced-*"))) == overwrite
    assert (snapshot(folder) == before) == (not overwrite)


def test_an_advised_model_that_stays_answers_its_own_bound(asked, capsys):
    advice_of(asked, methods="svd", max_params=1000)
    folder = folder_of(asked)
    record = {"imported_sha256": {"weights_from": fingerprint.of(folder / "advised")}}
    write_record(Path(asked.workdir) / "gpt_pca_distill_from_advised", record)
    before = snapshot(folder)
    capsys.readouterr()
    other = {"compress.methods": "context", "compress.max_params": 1000}
    compress(Settings.of(changed(asked, **other)), "a command")
    assert "advised stays, because" in capsys.readouterr().out
    assert snapshot(folder) == before


def test_a_replaced_model_keeps_its_advice_beside_it(asked):
    first, _ = advice_of(asked, methods="svd", max_params=1000)
    second, _ = advice_of(asked, methods="context", max_params=1000)
    assert (first["method"], second["method"]) == ("svd", "context")
    (model,) = folder_of(asked).glob("advised.replaced-*")
    (advice,) = folder_of(asked).glob("advice.json.replaced-*")
    assert read_record(model)["compressed"]["method"] == "svd"
    assert json.loads(advice.read_text())["chosen"] == first


def test_another_table_of_the_same_recipe_takes_the_earlier_advice_with_it(asked):
    first, _ = advice_of(asked, max_params=1000)
    folder = folder_of(asked)
    weights = checkpoint.load_weights(folder / "advised")
    weights["params"]["wpe"] = weights["params"]["wpe"] + 0.01
    shutil.rmtree(folder / "advised" / "ckpt")
    checkpoint.save_weights(folder / "advised", weights)
    second, _ = advice_of(asked, max_params=1000)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    for model, advice in (
        ("advised", "advice.json"),
        ("advised.replaced-*", "advice.json.replaced-*"),
    ):
        (place,), (file,) = folder.glob(model), folder.glob(advice)
        of = json.loads(file.read_text())["model_run_id"]
        assert of == read_record(place)["run_id"]
    advice_of(asked, max_params=1000)
    assert len([*folder.glob("*.replaced-*")]) == 2


def test_the_same_advice_leaves_a_model_that_a_run_started_from(asked, request):
    advice_of(asked, max_params=1000)
    folder = folder_of(asked)
    of = fingerprint.of(folder / "advised")
    record = {"imported_sha256": {"weights_from": of}}
    write_record(folder / "gpt_pca_distill_from_advised", record)
    before = snapshot(folder / "advised")
    request.getfixturevalue("other_rounding")
    again = changed(asked, **{"compress.max_params": 1000})
    compress(Settings.of(again), "a command")
    assert snapshot(folder / "advised") == before


@pytest.mark.parametrize("bound", [{"max_added_loss": 0.1}, {"max_params": 1000}])
def test_a_bound_whose_methods_do_not_fit_the_bands_is_refused(asked, bound):
    methods = "svd,coded" if "max_params" in bound else "svd"
    with pytest.raises(UserError, match=r"\(3,\): list 1 in compress.bands"):
        advice_of(asked, methods=methods, bands=(3,), **bound)
    assert not (folder_of(asked) / "advised").exists()


def test_a_model_is_not_replaced_if_a_run_beside_it_cannot_be_read(asked, monkeypatch):
    advice_of(asked, max_params=1000)
    folder = folder_of(asked)
    run = folder / "gpt_pca_distill_from_advised"
    run.mkdir()
    before, state = snapshot(folder), FolderState(run, (), False)
    refused = dataclasses.replace(state, damage=Unreadable("input/output error"))
    monkeypatch.setattr(write_model, "look", lambda _: refused)
    other = changed(asked, **{"compress.max_params": 900})
    with pytest.raises(Unreadable, match="input/output error"):
        compress(Settings.of(other), "a command")
    assert snapshot(folder) == before


# Codes


def test_every_kind_of_codes_is_known_everywhere():
    assert list(KINDS) == list(CODES)  # A bound on loss tries the first one.
    helped = KNOBS["compress.methods"].meaning
    for name, code in CODES.items():
        assert f"{name} ({code.words})" in helped
        assert name in KNOBS["compress.max_added_loss"].meaning
        assert figures._look(Recipe(name, 1, 1000, 8, 0)).colour == code.colour
        models = {Path("model"): [Recipe(name, 1, 1000, 8, 0)]}
        if KINDS[name].trainable:
            assert _models_to_train(models, (8,)) == [*models]
        else:
            with pytest.raises(UserError, match="can be trained further"):
                _models_to_train(models, (8,))
        for knobs in (
            {"compress.max_bytes": 9000, "compress.methods": "gptq"},
            {"compress.max_params": 9000, "compress.methods": name},
        ):
            settings = Settings(task="compress", model_path="run").replace(knobs)
            with pytest.raises(UserError, match=name):
                validate(settings)


ALL_CODES = {"compress.methods": "context,coded,packed", "compress.bands": (1,)}
each_kind = pytest.mark.parametrize("method", KINDS)


@pytest.fixture(scope="module")
def coded(finished_experiment, compiled, tmp_path_factory):
    """(config, {(method, rank): row}) of a sweep with codes.

    Its model is wide, because packed tables of narrow ones are larger than rank bytes.
    """
    wide = {"task": "train", "model.n_embd": 64}
    wide["workdir"] = str(tmp_path_factory.mktemp("wide"))
    trained = changed(finished_experiment, **wide)
    with quick_compiles(compiled):
        execute(trained)
        config = asked_in(tmp_path_factory.mktemp("coded"), trained)
        sweep = sweep_of(config, ranks=(40, 60), **ALL_CODES)
    return config, {(row["method"], row["rank"]): row for row in sweep["rows"]}


@pytest.fixture
def copied_codes(coded, tmp_path):
    """The config of a copy of the sweep with codes."""
    asked = asked_in(tmp_path, coded[0])
    shutil.copytree(folder_of(coded[0]), folder_of(asked))
    return changed(asked, ranks=(40, 60), **ALL_CODES)


@pytest.mark.parametrize("known", [None, 1], ids=["before there were any", "another"])
def test_codes_of_another_version_are_measured_again_and_factors_kept(
    copied_codes, known
):
    path = folder_of(copied_codes) / "sweep.json"
    before = json.loads(path.read_text())
    del before["sha256"]
    before["protocol"]["codes"] = known
    for row in before["rows"]:
        row["seconds"] += 1000
    write_json(path, before)
    after = sweep_of(copied_codes)
    for row in after["rows"]:
        assert (row["seconds"] > 1000) == (row["bits"] > 0)
    assert after["protocol"]["codes"] == coding.CODES_VERSION


def codes_in(folder, method):
    """(codes, description) in the file of a model; its checkpoint holds the same."""
    codes, description = KINDS[method].read(folder / KINDS[method].file)
    run = Run.open(folder)
    if codes.constants:
        assert_equal(
            *(trees.flatten(x) for x in (run.weights["constants"], codes.constants))
        )
    else:
        np.testing.assert_array_equal(codes.dense(), run.table())
    return codes, description


@each_kind
@pytest.mark.parametrize("rank", [40, 60])
def test_a_table_of_codes_is_a_row_a_file_and_a_run(coded, method, rank):
    config, rows = coded
    row, folder = rows[method, rank], folder_of(config) / f"best_{method}_k{rank}"
    file = folder / KINDS[method].file
    assert row["bytes"] == file.stat().st_size <= rank * (VOCAB_SIZE + 64)
    _, description = codes_in(folder, method)
    assert description.measured_loss == row["added_loss"]
    assert description.predicted_loss == row["predicted_loss"]
    assert description.checkpoint == Run.open(config.model_path).fingerprint
    wanted = row["loss"] + row["added_loss"]
    assert loss_of(config, folder.name) == pytest.approx(wanted, abs=2e-6)


def test_rounded_factors_have_no_model():
    tried = [Recipe("context", 3, 100, 8), Recipe("context", 3, 100, 8, 8)]
    tried += [Recipe("coded", 1, 100, 8, 0), Recipe("baseline", 1, 900, 0, 8)]
    assert sweep_module.models_of(Path("w"), tried) == {
        Path("w/best_k8"): tried[:1],
        Path("w/best_coded_k8"): tried[2:3],
    }


@each_kind
def test_codes_are_no_anchors_and_add_less_in_more_bytes(coded, method):
    _, rows = coded
    assert not rows[method, 40]["is_anchor"]
    assert rows[method, 60]["kl"] < rows[method, 40]["kl"]


def test_coded_tables_add_less_than_factors_of_their_size(coded):
    _, rows = coded
    for rank in (40, 60):  # Factors with a byte per value would be as large.
        assert rows["coded", rank]["kl"] < rows["context", rank]["kl"]


@each_kind
def test_the_report_shows_codes_with_their_bits(coded, method):
    config, rows = coded
    text = (folder_of(config) / "report.md").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {method} | 40 |")]
    bits = 8 * rows[method, 40]["bytes"] / (VOCAB_SIZE * 64)
    assert f"| {bits:.2f} |" in line


# Coded tables


@pytest.mark.parametrize("bound", [{"max_bytes": 2600}, {"max_added_loss": 0.01}])
def test_a_coded_table_meets_a_bound(asked, bound):
    chosen, trials = advice_of(asked, methods="context,coded", bits=(4,), **bound)
    if "max_bytes" in bound:
        assert max(row["bytes"] for row in trials) <= 2600
        assert {row["method"] for row in trials} == {"baseline", "context", "coded"}
        assert min(trials, key=lambda row: row["kl"])["method"] == "coded"
    else:
        assert chosen["method"] == "coded"
        assert chosen["added_loss"] <= 0.01
        fits = [row for row in trials if row["added_loss"] <= 0.01]
        assert chosen["bytes"] == min(row["bytes"] for row in fits)


def test_a_bound_on_numbers_leaves_out_coded_tables(asked):
    chosen, _ = advice_of(asked, methods="context,coded", max_params=1000)
    assert chosen["method"] == "context"


@each_kind
@pytest.mark.parametrize(
    ("damaged", "is_lost"),
    [
        *((None, False), ("the file", True), ("the file", False)),
        ("ckpt/0/weights/_METADATA", False),
    ],
)
def test_a_finished_sweep_encodes_again_only_what_is_lost_or_damaged(
    copied_codes, monkeypatch, method, damaged, is_lost
):
    folder, made = folder_of(copied_codes) / f"best_{method}_k40", []
    file, encode = folder / KINDS[method].file, Compressor._make_codes
    wanted, before = file.read_bytes(), snapshot(folder / "ckpt")
    monkeypatch.setattr(
        Compressor, "_make_codes", lambda self, r: made.append(r) or encode(self, r)
    )
    if damaged:
        path = file if damaged == "the file" else folder / damaged
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink() if is_lost else path.write_bytes(content)
    sweep_of(copied_codes)
    assert [(r.method, r.rank) for r in made] == [(method, 40)] * bool(damaged)
    assert file.read_bytes() == wanted
    codes_in(folder, method)
    is_whole = damaged in (None, "the file")
    assert (snapshot(folder / "ckpt") == before) == is_whole
    assert len([*folder.parent.glob(f"{folder.name}.replaced-*")]) == (not is_whole)


@each_kind
@pytest.mark.parametrize("part", ["the file", "the weights"])
def test_a_model_of_codes_that_cannot_be_read_now_stays(
    copied_codes, monkeypatch, method, part
):
    folder = folder_of(copied_codes)
    before = snapshot(folder / f"best_{method}_k40")

    def fail(path):
        if "best" in str(path):
            raise Unreadable(f"{path}: input/output error")
        return arrays(path)

    arrays = digests.arrays
    if part == "the file":
        monkeypatch.setitem(KINDS, method, KINDS[method]._replace(read=fail))
    else:
        monkeypatch.setattr(digests, "arrays", fail)
    with pytest.raises(Unreadable, match="input/output error"):
        sweep_of(copied_codes)
    assert snapshot(folder / f"best_{method}_k40") == before
    assert not [*folder.glob("*.replaced-*")]


def test_factors_whose_weights_cannot_be_read_now_stay(copied_sweep, monkeypatch):
    folder = folder_of(copied_sweep)
    shutil.rmtree(folder / "best_k8" / "factors")
    before = snapshot(folder / "best_k8")

    load_weights = checkpoint.load_weights

    def fail(path):
        if "best" in str(path):
            raise Unreadable(f"{path}: input/output error")
        return load_weights(path)

    monkeypatch.setattr(checkpoint, "load_weights", fail)
    with pytest.raises(Unreadable, match="input/output error"):
        sweep_of(copied_sweep)
    assert snapshot(folder / "best_k8") == before
    assert not [*folder.glob("*.replaced-*")]


@each_kind
@pytest.mark.parametrize("change", ["another's", "more bytes", "no table"])
def test_a_table_of_codes_that_a_person_changed_is_moved_aside(
    copied_codes, method, change
):
    folder, kind = folder_of(copied_codes), KINDS[method]
    file = folder / f"best_{method}_k40" / kind.file
    wanted, other = file.read_bytes(), folder / f"best_{method}_k60" / kind.file
    own = {
        "another's": other.read_bytes(),
        "more bytes": wanted + b"my note",
        "no table": b"my note",
    }[change]
    file.write_bytes(own)
    sweep_of(copied_codes)
    assert file.read_bytes() == wanted
    (kept,) = file.parent.glob(f"{kind.file}.replaced-*")
    assert kept.read_bytes() == own


@each_kind
def test_codes_of_another_row_are_encoded_again(copied_codes, method):
    folder = folder_of(copied_codes)
    sweep = json.loads((folder / "sweep.json").read_text())
    (row,) = [row for row in sweep["rows"] if key(row) == (method, 1, 40, 0)]
    row["added_loss"] += 1e-3
    json_files.write_json(folder / "sweep.json", sweep)
    sweep_of(copied_codes)
    _, description = codes_in(folder / f"best_{method}_k40", method)
    assert description.measured_loss == row["added_loss"]
    assert not [*folder.rglob(f"{KINDS[method].file}.replaced-*")]  # It is ours.


@each_kind
def test_a_new_prediction_is_written_without_encoding(
    copied_codes, monkeypatch, method
):
    kind = KINDS[method]
    file = folder_of(copied_codes) / f"best_{method}_k40" / kind.file
    wanted, (codes, description) = file.read_bytes(), kind.read(file)
    kind.write(file, codes, dataclasses.replace(description, predicted_loss=7.0))
    monkeypatch.setattr(Compressor, "_make_codes", pytest.fail)
    sweep_of(copied_codes)
    assert file.read_bytes() == wanted
    assert not [*file.parent.glob("*.replaced-*")]


def test_a_rank_too_small_for_a_coded_table_is_left_out_of_the_sweep(asked, capsys):
    sweep = sweep_of(
        asked,
        ranks=(16, 1),
        **{"compress.methods": "context,coded", "compress.bands": (1,)},
        **{"compress.bits": ()},
    )
    assert {key(row)[:3] for row in sweep["rows"]} == {
        *(("context", 1, rank) for rank in (1, 16)),
        ("coded", 1, 16),
    }
    assert "rows_left" not in sweep
    assert "left out: rank 1, coded: a file of 129 bytes" in capsys.readouterr().out
    assert not (folder_of(asked) / "best_coded_k1").exists()


def test_codes_are_tried_at_ranks_and_methods_that_do_not_fit_the_bands(asked, capsys):
    methods = {"compress.methods": "svd,context,coded", "compress.bits": ()}
    sweep = sweep_of(asked, ranks=(9, 16), **methods | {"compress.bands": (40,)})
    assert {key(row)[:3] for row in sweep["rows"]} == {
        *(("coded", 1, rank) for rank in (9, 16)),
        ("context", 40, 16),
    }
    shown = capsys.readouterr().out
    assert "left out: svd (only one band): list 1 in compress.bands\n" in shown
    assert "left out: factors of rank 9, too low for compress.bands (40,)\n" in shown
    assert (folder_of(asked) / "best_coded_k9").is_dir()


def test_a_file_too_small_for_a_coded_table_is_refused_with_its_rank(asked):
    with pytest.raises(UserError, match="rank 1, coded: a file of 129 bytes cannot"):
        sweep_of(asked, ranks=(1,), **{"compress.methods": "coded"})


# Packed tables


def test_a_packed_table_meets_a_bound_and_is_a_run(asked):
    chosen, trials = advice_of(asked, methods="packed", bands=(2,), max_bytes=9000)
    folder = folder_of(asked) / "advised"
    assert chosen == trials[0]
    assert (chosen["method"], chosen["bands"]) == ("packed", 2)
    assert sum(chosen["band_sizes"]) == VOCAB_SIZE and len(chosen["band_sizes"]) == 2
    assert chosen["bytes"] == (folder / "table.npz").stat().st_size <= 9000
    assert chosen["memory"] < chosen["bytes"]
    packed, description = coding.read_packed(folder / "table.npz")
    assert description.measured_loss == chosen["added_loss"]
    assert packed.memory == chosen["memory"]
    wanted = chosen["loss"] + chosen["added_loss"]
    assert loss_of(asked, "advised") == pytest.approx(wanted, abs=2e-6)
    model, variables = Run.open(folder).load(ModelSettings())
    assert "embed" not in variables["params"]
    original, dense = Run.open(asked.model_path).load(ModelSettings())
    table = dense["params"]["embed"]["band_0"]["wte"]
    dense["params"]["embed"]["band_0"]["wte"] = table.at[:97].set(packed.dense())
    taken = [
        [
            int(token[0])
            for token in itertools.islice(
                generate(*model_of, [1, 2, 3], 1, seed=0, temperature=0), 12
            )
        ]
        for model_of in ((model, variables), (original, dense))
    ]
    assert taken[0] == taken[1]
    further = {"task": "train", "arm": "continued", "model_path": ""}
    source = Run.open(asked.model_path).record["corpus_source"]
    further |= {"init.weights_from": str(folder), "data.source": source}
    with pytest.raises(
        UserError, match=f"{folder} has a packed table, which cannot be"
    ):
        execute(changed(asked, **further))


@pytest.mark.parametrize("method", ["coded", "packed"])
def test_more_bytes_never_add_loss(original, method):
    """Measured as KL: a model that is hardly trained may gain by another table."""
    make, found = original.compressor, []
    least = make.codes_bytes(method, 1, math.inf)
    for most in np.geomspace(least, 3 * least, 8).astype(int).tolist():
        candidate = make(Recipe(method, 1, most, 0, 0))
        assert candidate.bytes <= most
        found.append((sum(candidate.second_order), original.measure(candidate)))
    for (loss, scores), (finer_loss, finer) in itertools.pairwise(found):
        assert finer_loss <= loss
        assert finer.kl <= scores.kl
    assert abs(finer.added_loss) < 0.1 * np.ptp(found[0][1].added_loss_interval)
    assert finer_loss < 0.1 * found[0][0]


@pytest.mark.parametrize("methods", ["packed", "coded", "context"])
def test_too_small_a_bound_on_bytes_is_refused_with_the_smallest(asked, methods):
    asking = {"methods": methods, "bands": (2 if methods == "packed" else 1,)}
    with pytest.raises(UserError, match="max_bytes = 100: raise it to") as caught:
        advice_of(asked, **asking, bits=(4,), max_bytes=100)
    least = int(str(caught.value).split()[-3])
    chosen, _ = advice_of(asked, **asking, bits=(4,), max_bytes=least)
    assert chosen["bytes"] <= least


def test_bytes_that_no_codes_can_use_are_named(asked, capsys):
    bound = {"max_bytes": 10**6}
    for methods in ("coded", "packed"):
        chosen, _ = advice_of(asked, methods=methods, bands=(1,), **bound)
        line = (
            f"{methods}: 1,000,000 bytes are more than such a table can use; it takes "
            f"{chosen['bytes']:,}\n"
        )
        assert line in capsys.readouterr().out


# Rivals


def test_rivals_are_measured_and_shown_but_are_no_models(asked, swept):
    config, earlier = swept
    shutil.copytree(folder_of(config), folder_of(asked))
    models = snapshot(folder_of(asked) / "best_k8")
    options = {"compress.methods": "svd,context,gptq,pq", "compress.bits": (8, 3)}
    sweep = sweep_of(asked, **options)
    rows = {(row["method"], row["bits"], row["budget"]): row for row in sweep["rows"]}
    whole = VOCAB_SIZE * WIDTH
    assert {key for key in rows if key[0] in ("baseline", "gptq", "pq")} == {
        *((method, bits, whole) for method in ("baseline", "gptq") for bits in (8, 3)),
        *(("pq", 8, VOCAB_SIZE * parts) for parts in (6, 8, 11)),
    }
    # Rows that were there are the same recipes.
    assert [row for row in sweep["rows"] if row["bits"] == 32] == [
        row for row in earlier["rows"] if row["bits"] == 32
    ]
    for method, bits in (("baseline", 8), ("baseline", 3), ("gptq", 8), ("gptq", 3)):
        in_a_row = WIDTH * bits // 8 + 2
        assert rows[method, bits, whole]["bytes"] == VOCAB_SIZE * in_a_row
    for parts in (6, 8, 11):
        book = 2 * VOCAB_SIZE * WIDTH
        assert rows["pq", 8, VOCAB_SIZE * parts]["bytes"] == VOCAB_SIZE * parts + book
    assert rows["gptq", 8, whole]["kl"] < rows["gptq", 3, whole]["kl"]
    assert snapshot(folder_of(asked) / "best_k8") == models
    assert {path.name for path in folder_of(asked).glob("best*")} == {
        *("best_k4", "best_k8")
    }
    text = (folder_of(asked) / "report.md").read_text("utf-8")
    for name in ("D's table, int3", "D's table, GPTQ, int3", "D's table, PQ"):
        assert f"| {name} | – | " in text
    assert sweep["gaussian_limit"]


def test_the_gaussian_limit_is_kept_with_the_sweep(swept):
    sizes, losses = np.array(swept[1]["gaussian_limit"]).T
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
    assert 6 < 8 * sizes[-1] / (VOCAB_SIZE * WIDTH) <= 8


def test_rivals_alone_need_no_ranks_and_meet_no_bound(asked):
    rivals = {"compress.methods": "baseline,gptq", "compress.bits": (4,)}
    sweep = sweep_of(asked, **rivals)
    assert [key(row) for row in sweep["rows"]] == [
        *(("baseline", 1, 0, 4), ("gptq", 1, 0, 4))
    ]
    report = (folder_of(asked) / "report.md").read_text("utf-8")
    assert "best at equal size" not in report and "## All tables" in report
    _, trials = advice_of(asked, methods="context,gptq,pq", bits=(4,), max_bytes=2600)
    assert {row["method"] for row in trials} == {"context", "baseline"}


# Refusals

ONLY_IN_BANDS = {"compress.methods": "kl", "compress.bands": (12,)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"compress.methods": "svd,nmf"},
            "compress.methods is 'svd,nmf': it must be all, or some of svd",
        ),
        ({"compress.methods": " , "}, "compress.methods is ' , '"),
        (
            {"compress.methods": "gptq", "compress.bits": ()},
            "compress.methods is 'gptq', but compress.bits is empty",
        ),
        (
            {"ranks": (33,)},
            "is at most 32; give ranks that fit, as in --config.ranks=8,16",
        ),
        ({"ranks": (1,)} | ONLY_IN_BANDS, "no table fits"),
        ({"model.n_layer": 5}, "model.n_layer is 5, but"),
        ({"model_path": "nowhere"}, "nowhere does not exist"),
        ({"compress.max_params": 100}, "no table fits compress.max_params = 100"),
        ({"mesh.data": 3}, "cannot be split over 3 devices"),
        ({"compress.recover_ranks": (16,)}, "holds 16, which the sweep leaves out"),
        (
            {"compress.recover_ranks": (8,), "evaluate.max_tokens": 64},
            "evaluate.max_tokens, but models that are trained further are evaluated",
        ),
        (
            {"compress.methods": "packed", "compress.recover_ranks": (8,)},
            "holds 8, which the sweep leaves out",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    asked, tmp_path, overrides, words
):
    def files():  # Statistics may be measured before the refusal.
        found = snapshot(tmp_path / "gpt_baseline")
        return {name: v for name, v in found.items() if "statistics" not in name}

    before = files()
    with pytest.raises(UserError) as refused:
        sweep_of(asked, **overrides)
    assert words in str(refused.value)
    assert files() == before
    assert not (tmp_path / "compressed").exists()


def test_a_model_that_is_factorized_already_is_refused(asked, finished_experiment):
    pca = Path(finished_experiment.workdir) / "gpt_pca_k8"
    one_band = execute(
        changed(
            finished_experiment,
            task="train",
            arm="random",
            workdir=asked.workdir + "/one",
            **{"model.band_sizes": (97,), "model.band_ranks": (8,)},
        )
    )
    for run in (pca, one_band):
        with pytest.raises(UserError, match="already has a factorized embedding"):
            sweep_of(asked, model_path=str(run))


def test_ranks_that_the_table_cannot_have_are_named(asked, capsys):
    sweep_of(asked, ranks=(8, 64), **{"compress.methods": "svd", "compress.bits": ()})
    assert (
        "left out: rank 64, too high for the table (97, 32)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["compress", "evaluate", "sample"])
def test_print_config_refuses_a_model_that_the_run_does_not_have(name, asked):
    words = f"--config.model_path={asked.model_path}", "--config.model.n_layer=7"
    outcome = call(f"--config=configs/{name}.py", *words, "--print_config")
    assert outcome.code == 2
    assert "model.n_layer is 7, but " in outcome.err


def test_print_config_says_what_would_be_compressed(asked):
    compressed = Path(asked.model_path).with_name("gpt_pca_k8")
    write_record(compressed, Run.open(asked.model_path).record)
    checkpoint.save_weights(compressed, Run.open(asked.model_path).weights)
    record = read_record(compressed)
    record["model"]["n_embd_wte"] = 8
    write_record(compressed, record)
    words = f"--config.model_path={compressed}", "--print_config"
    outcome = call("--config=configs/compress.py", *words)
    assert outcome.code == 2
    assert "already has a factorized embedding" in outcome.err
    model = f"--config.model_path={asked.model_path}"
    outcome = call("--config=configs/compress.py", model, "--print_config")
    assert outcome.code == 0, outcome
    bound = "--config.compress.max_bytes=9000"
    work = f"compress {asked.model_path} at step 6\n"
    amount = (
        r"\d+ tables to measure, each on at most 32,768 tokens of val: roughly .* on "
    )
    assert re.search(f"{work}{amount}8 x cpu", outcome.out)
    outcome = call(
        "--config=configs/compress.py", model, "--print_config", "--config.mesh.data=2"
    )
    assert re.search(f"{work}{amount}2 x cpu", outcome.out)
    outcome = call("--config=configs/compress.py", model, "--print_config", bound)
    amount = "a search for one table; each one that it tries is measured on val: rough"
    assert f"{work}{amount}" in outcome.out
    assert " per million tokens of the split" in outcome.out
    bands = "--config.compress.methods=svd", "--config.compress.bands=7"
    outcome = call(
        "--config=configs/compress.py", model, *bands, bound, "--print_config"
    )
    assert outcome.code == 2 and "no table fits compress.bands (7,)" in outcome.err
    further = "--config.ranks=8", "--config.compress.recover_ranks=8"
    outcome = call("--config=configs/compress.py", model, *further, "--print_config")
    # D, and two models on the text and on D's predictions.
    assert re.search(r"\n5 runs to train: roughly ", outcome.out), outcome
    assert not folder_of(asked).exists()


def test_a_damaged_sweep_is_refused_in_one_line(asked):
    folder_of(asked).mkdir()
    (folder_of(asked) / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="is damaged .*: delete it to measure again"):
        sweep_of(asked)


def test_the_last_method_that_fits_the_bands_is_rounded():
    made = recipes(600, 32, ["context", "svd"], [8], [7], [8])
    assert {r.method for r in made if r.bits == 8 and r.rank} == {"context"}


# Further training


def recovered(config, **overrides):
    """sweep.json after the best table of rank 8 and D were trained further."""
    settings = {"compress.recover_ranks": (8,), "compress.bits": ()} | overrides
    main.run(Settings.of(changed(config, **settings)), "a command", print_only=False)
    return json.loads((folder_of(config) / "sweep.json").read_text())


def test_a_result_of_d_without_its_steps_is_of_its_last_step(asked, monkeypatch):
    path = Path(asked.model_path) / "result.json"
    result = json.loads(path.read_text())
    del result["steps"]
    write_json(path, result)
    trained = []
    monkeypatch.setattr(task, "_recover", lambda *given: trained.append(given))
    few = {"compress.methods": "svd", "compress.bands": (1,), "compress.bits": ()}
    few |= {"ranks": (8,), "compress.recover_ranks": (8,)}
    compress(Settings.of(changed(asked, **few)), "")
    assert len(trained) == 1


def test_recovery_keeps_d_s_settings_but_what_concerns_memory(swept):
    own = {"compress.recover_ranks": (8,), "train.loss_chunks": 7}
    config = changed(swept[0], **own)
    d = read_record(Path(config.model_path))["train"]
    models = [folder_of(config) / "best_k8"]
    for job in recovery_plan(Settings.of(config), folder_of(config), models).jobs:
        train = job.settings.train
        assert (train.loss_chunks, train.steps) == (7, d["steps"] // 2)


def test_recovery_keeps_d_s_dropout(asked, finished_experiment):
    d = changed(finished_experiment, task="train", workdir=asked.workdir)
    d = changed(d, overwrite=True, **{"model.dropout": 0.1})
    asked.model_path = str(execute(d))
    (job,) = recovery_plan(Settings.of(asked), folder_of(asked), ()).jobs
    assert job.settings.model.dropout == 0.1


@pytest.mark.slow
def test_the_best_model_is_trained_under_d_s_settings_and_compared(asked, monkeypatch):
    # The sweep's own batch size does not matter for the training.
    own = {"train.batch_size": 16}
    own["compress.methods"] = "svd,context,coded"
    sweep, folder = recovered(asked, **own), folder_of(asked)
    letters = [row["letter"] for row in sweep["recovered"]]
    assert letters == ["D+", "B", "Bd", "B", "Bd"]
    continued, *from_codes, plain, taught = sweep["recovered"]
    d_loss = read_result(Path(asked.model_path))["val_loss"]
    coded = next(r for r in sweep["rows"] if (r["rank"], r["method"]) == (8, "coded"))
    for best, rows in ((best_of(sweep, 8), (plain, taught)), (coded, from_codes)):
        for row in rows:
            assert [row[n] for n in ("rank", "method", "bands")] == [
                best[n] for n in ("rank", "method", "bands")
            ]
            assert row["added_at_start"] == pytest.approx(best["added_loss"], abs=2e-6)
    assert (continued["rank"], continued["added_at_start"]) == (None, 0)
    for row in sweep["recovered"]:
        assert row["val_loss"] == read_result(folder / row["run"])["val_loss"]
        assert row["added_loss"] == row["val_loss"] - d_loss
        low, high = row["interval"]
        assert low < row["added_loss"] < high
        assert row["share_of_tokens"] == 0.5
    record = read_record(folder / taught["run"])
    d = read_record(Path(asked.model_path))
    assert record["distill"]["teacher"] == asked.model_path
    assert record["train"]["batch_size"] == d["train"]["batch_size"]
    assert record["train"]["learning_rate"] == d["train"]["learning_rate"] / 2
    assert record["seed"] == d["seed"]
    assert record["data"]["source"] == d["data"]["source"]
    report = (folder / "report.md").read_text()
    for letter, name in (("D+", "D"), ("B", "coded"), ("Bd", "coded")):
        assert f"| **{letter}** | {name}, trained further" in report
    # The next time all of it is done, whatever the path of the model.
    monkeypatch.chdir(asked.workdir)
    names = [*(row["run"] for row in sweep["recovered"]), "best_k8"]
    before = {name: snapshot(folder / name) for name in names}
    ranks = {"ranks": (4, 8, 12), "model_path": "gpt_baseline"}
    again = recovered(asked, **own, **ranks)
    assert again["recovered"] == sweep["recovered"]
    assert {name: snapshot(folder / name) for name in names} == before
    later = recovered(asked, **own, **{"compress.recover_ranks": ()})
    assert later["recovered"] == sweep["recovered"]


@pytest.mark.slow
def test_a_recovered_row_tells_the_table_that_is_in_a_moved_workdir(
    tmp_path, finished_experiment
):
    config = asked_in(tmp_path / "runs", finished_experiment)
    few = {"compress.methods": "svd", "compress.bands": (1,), "ranks": (8,)}
    before = recovered(config, **few)
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    # Another table is now where the runs started from.
    record = read_record(moved / "compressed/best_k8")
    record["compressed"]["rank"] = 4
    write_record(tmp_path / "runs/compressed/best_k8", record)
    at = {"workdir": str(moved), "model_path": str(moved / "gpt_baseline")}
    assert recovered(changed(config, **at), **few)["recovered"] == before["recovered"]


def test_a_recovered_row_tells_the_table_that_its_run_started_from(
    finished_experiment, monkeypatch
):
    table = {"rank": 8, "method": "context", "bands": 3}
    made = {"gpt_pca_finetune_k8": table, "gpt_baseline": {}}
    folder = Path(finished_experiment.workdir)
    read = collect.read_row
    letters = {"gpt_baseline": {"arm": "continued", "letter": "D+"}}
    monkeypatch.setattr(
        collect, "read_row", lambda run: read(run) | letters.get(run.name, {})
    )
    rows = collect.recovered_rows(folder, made, folder / "gpt_baseline")
    assert {name: rows[0][name] for name in table} == table
    assert [rows[1][name] for name in table] == [None, None, None]
    for row in rows:  # A run's result names its device, versions and commit.
        result = json_of(folder / row["run"] / "result.json")
        assert all(row[name] == result[name] for name in Provenance.__annotations__)
        assert row["device"]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, ["continued", "k4", "k8"]), ({"val_loss": 2}, ["continued", "k8"]),
     ({"tokens_seen": 9}, ["continued", "k8"])],
)  # fmt: skip
def test_results_of_other_runs_stay_while_they_are_compared_with_the_same_d_plus(
    changes, kept, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep_module, "write_sweep_report", lambda *_: None)
    sweep = {"protocol": {"table": [97, 32]}, "rows": [STORED]}
    write_json(tmp_path / "sweep.json", sweep)
    for rank, new in ((4, {}), (8, changes)):
        row = {"val_loss": 1, "added_loss": 0.1, "tokens_seen": 5} | new
        rows = [
            {"run": "continued", "rank": None} | row,
            {"run": f"k{rank}", "rank": rank, "method": "svd", "bands": 1} | row,
        ]
        sweep_module.add_recovered(Output(tmp_path, {}, {}, lambda: None), rows)
    found = json.loads((tmp_path / "sweep.json").read_text())["recovered"]
    assert [row["run"] for row in found] == kept
    assert ("left out of the report: k4," in capsys.readouterr().out) == bool(changes)
    assert found[0]["val_loss"] == changes.get("val_loss", 1)


@pytest.mark.parametrize("path", ["gpt_baseline/ckpt/3", "bare"])
def test_a_model_that_cannot_be_compared_is_refused_before_training(path, asked):
    workdir = Path(asked.workdir)
    bare = shutil.copytree(workdir / "gpt_baseline", workdir / "bare")
    (bare / "result.json").unlink()
    with pytest.raises(UserError, match="is not the last step of a finished run"):
        recovered(asked, model_path=str(workdir / path))
    assert not folder_of(asked).exists()


def test_a_d_in_another_compute_dtype_is_not_recovered(asked):
    with pytest.raises(UserError) as caught:
        recovered(asked, **{"model.compute_dtype": "bfloat16"})
    assert str(caught.value) == (
        "gpt_baseline computes in float32, gpt_continued_from_gpt_baseline in "
        "bfloat16: train both with --config.model.compute_dtype=float32; move the "
        "folder of a finished run in another dtype aside first"
    )
    assert not (folder_of(asked) / "sweep.json").exists()


def test_a_d_whose_window_losses_are_damaged_is_not_recovered(asked):
    (Path(asked.model_path) / "val_window_losses.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"delete it to get a report without interv"):
        recovered(asked)
    assert not (folder_of(asked) / "sweep.json").exists()


@pytest.mark.slow
def test_a_best_table_at_full_width_is_trained_under_names_of_its_own(asked):
    full = {"ranks": (32,), "compress.methods": "context", "compress.bands": (3,)}
    sweep = recovered(asked, **full, **{"compress.recover_ranks": (32,)})
    assert len({row["run"] for row in sweep["recovered"]}) == 3
