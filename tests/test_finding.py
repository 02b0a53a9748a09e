"""What a report found, in a few lines for the terminal."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from command_line import ROOT

from pcagpt.methods import RIVALS
from pcagpt.report import (
    experiment_lines,
    how_to_take,
    recommended_row,
    sweep_lines,
    write_sweep_report,
)
from pcagpt.report.text import with_interval
from pcagpt.rows import read_sweep

PUBLISHED = ROOT / "checkpoints" / "published"


def test_an_experiment_ends_with_the_loss_of_each_arm():
    results = json.loads((PUBLISHED / "demo" / "results.json").read_text("utf-8"))
    own, *others, following = experiment_lines(results, Path("runs"))
    assert re.fullmatch(r"D +val loss \d\.\d{4}", own)
    for line, letter in zip(sorted(others), "ABC", strict=True):
        loss = next(r["val_loss"] for r in results["rows"] if r["letter"] == letter)
        shown = rf"{letter}  k=32 +val loss {loss:.4f}, [+−]0\.\d{{4}}( ± 0\.\d{{4}})? "
        assert re.fullmatch(shown + r"against D, table \d\.\d\d× smaller", line)
    assert re.fullmatch(r"sample it: .*--config.model_path=runs/gpt_\w+", following)


def test_d_trained_further_has_no_smaller_table():
    results = json.loads((PUBLISHED / "demo" / "results.json").read_text("utf-8"))
    of_d = next(row for row in results["rows"] if row["letter"] == "D")
    further = of_d | {"arm": "continued", "letter": "D+", "added_loss": -0.0357}
    results["rows"].append(further | {"added_loss_interval": [-0.036, -0.0354]})
    lines = experiment_lines(results, Path("runs"))
    (line,) = (line for line in lines if line.startswith("D+"))
    assert re.fullmatch(r"D\+ +val loss [\d.]+, −0\.0357 ± 0\.0003 against D", line)


SMOLLM2 = read_sweep(PUBLISHED / "smollm2_135m" / "val" / "sweep.json")
BEST = recommended_row(SMOLLM2)
RECOMMENDED = (
    f"recommended: coded, k=256, {BEST.bytes:,} bytes (8.93× smaller than in float32), "
    f"adds {with_interval(BEST.added_loss, BEST.added_loss_interval)} nats per token"
)
COMPARISON = "that table serves for comparison: no model of it is written"
EXPORT = "export it: "
COSTLY = {"rows": [row for row in SMOLLM2["rows"] if row.added_loss > 0.1]}
ROUNDED = {"rows": [row for row in SMOLLM2["rows"] if row.method == "baseline"]}
IS_TEST = {"protocol": SMOLLM2["protocol"] | {"split": "test"}}


@pytest.mark.parametrize(
    ("change", "begin", "then"),
    [
        ({}, RECOMMENDED, [EXPORT]),
        (
            COSTLY,
            "none is recommended; best: D's table, int4, 15,925,248 bytes",
            [
                COMPARISON,
                "of the tables with a model: packed, 12 bands, k=128, 6,3",
                EXPORT,
            ],
        ),
        (ROUNDED, "recommended: D's table, int8, 28,409,856 bytes", [COMPARISON]),
        (
            IS_TEST,
            "nothing is chosen on the test split; smallest that adds at most 0.01 here",
            [],
        ),
        (
            IS_TEST | COSTLY,
            "nothing is chosen on the test split; adds least here: D's table, int4",
            [],
        ),
    ],
    ids=["cheap", "costly", "rounded", "test", "costly test"],
)
def test_a_sweep_ends_with_its_recommended_table(change, begin, then, tmp_path):
    lines = sweep_lines(SMOLLM2 | change, tmp_path, "checkpoints")
    for line, shown in zip(lines, [begin, *then], strict=True):
        assert line.startswith(shown)


def test_a_rival_is_recommended_beside_the_best_table_with_a_model(tmp_path):
    best = recommended_row(SMOLLM2)
    rival = dataclasses.replace(best, method="baseline", bits=4, bytes=9_000_000)
    lines = sweep_lines(SMOLLM2 | {"rows": [best, rival]}, tmp_path, "checkpoints")
    assert lines[1:-1] == [
        COMPARISON,
        RECOMMENDED.replace("recommended", "of the tables with a model"),
    ]
    assert lines[-1].startswith(EXPORT)
    assert lines[0].startswith("recommended: D's table, int4, k=256, 9,000,000 bytes")


def test_of_tables_of_one_size_the_best_is_recommended():
    sweep = read_sweep(PUBLISHED / "gpt2_small_table" / "val" / "sweep.json")
    rows = [row for row in sweep["rows"] if row.method in RIVALS]
    best = recommended_row(sweep | {"rows": rows})
    same = [row for row in rows if row.bytes == best.bytes]
    assert len(same) > 1
    assert best.added_loss == min(row.added_loss for row in same)
    assert recommended_row(sweep | {"rows": rows[::-1]}) == best


def of_models(model):
    """A sweep that has recorded its models."""
    best = recommended_row(SMOLLM2)
    recipe = dataclasses.asdict(best.recipe) | model
    return SMOLLM2 | {"models": {"best_coded_k256": recipe}}


@pytest.mark.parametrize(
    ("sweep", "workdir", "shown"),
    [
        (SMOLLM2, "checkpoints", "export it: {command} --config.format=coded"),
        (
            SMOLLM2 | {"models": None},
            "checkpoints",
            "export it: {command} --config.format=coded",
        ),
        (
            of_models({}),
            "runs",
            "export it: {command} --config.format=coded --config.workdir=runs",
        ),
        (
            SMOLLM2 | {"stored_as": ["Q4_1"]},
            "runs",
            "its table: {model}; pcagpt exports no model that came as GGUF",
        ),
        (
            SMOLLM2 | {"protocol": SMOLLM2["protocol"] | {"side": "input"}},
            "checkpoints",
            "export it: {command} --config.format=coded",
        ),
    ],
    ids=["older", "unknown", "workdir", "GGUF", "untied"],
)
def test_a_sweep_tells_how_its_model_is_taken(sweep, workdir, shown, tmp_path):
    model = tmp_path / "best_coded_k256"
    command = (
        f"python -m pcagpt.main --config=configs/export.py --config.model_path={model}"
    )
    _, last = sweep_lines(sweep, tmp_path, workdir)
    assert last == shown.format(command=command, model=model)


UNTIED = {"protocol": SMOLLM2["protocol"] | {"side": "input"}}
FACTORED = {"method": "context", "bits": 32, "band_ranks": [64, 0]}


@pytest.mark.parametrize(
    ("changes", "sweep", "form"),
    [
        (FACTORED, SMOLLM2, " --config.format=hf-factored"),
        ({"method": "packed"}, SMOLLM2, " --config.format=hf-factored"),
        (FACTORED, SMOLLM2 | UNTIED, ""),
        # Rounded, it is written as the full table.
        ({"method": "baseline", "bits": 4, "band_ranks": [0]}, SMOLLM2, ""),
    ],
    ids=["factors", "packed", "factors of a side", "rounded"],
)
def test_a_model_is_exported_in_its_smallest_form(changes, sweep, form, tmp_path):
    row = dataclasses.replace(BEST, **changes)
    last = how_to_take(row, tmp_path, "checkpoints", sweep)
    assert last.endswith(f"--config.model_path={tmp_path}{form}")


@pytest.mark.parametrize("changes", [{}, FACTORED, {"method": "packed"}])
def test_the_page_and_the_terminal_have_one_command_to_export(changes, tmp_path):
    best = dataclasses.replace(BEST, **changes)
    sweep = SMOLLM2 | {"rows": [best]}
    *_, last = sweep_lines(sweep, tmp_path, "checkpoints")
    command = last.removeprefix("export it: ").replace(str(tmp_path), "FOLDER")
    write_sweep_report(tmp_path, sweep)
    assert f"\n    {command}\n" in (tmp_path / "report.md").read_text("utf-8")


def finding_of(sweep, folder):
    """The lines of a sweep for the terminal, and the text of its report."""
    write_sweep_report(folder, sweep)
    text = (folder / "report.md").read_text("utf-8")
    return sweep_lines(sweep, folder, "checkpoints"), text


# Two tables of one model, as the demo's D has them: both are cheap, and the sweep
# writes the larger one, which adds less.
SMALLER, WRITTEN = (
    dataclasses.replace(
        BEST,
        **{"method": "packed", "bands": bands, "rank": 32, "bytes": size},
        **{"added_loss": added, "added_loss_interval": None},
    )
    for bands, size, added in ((1, 128_200, 0.0034), (7, 133_990, 0.0007))
)
PACKED = SMOLLM2 | {"rows": [SMALLER, WRITTEN]}
OF_WRITTEN = {"models": {"best_packed_k32": dataclasses.asdict(WRITTEN.recipe)}}


@pytest.mark.parametrize("models", [{"models": None}, OF_WRITTEN])
def test_of_the_tables_of_one_model_only_its_own_is_recommended(models, tmp_path):
    (line, command), text = finding_of(PACKED | models, tmp_path)
    assert line.startswith("recommended: packed, 7 bands, k=32, 133,990 bytes")
    model = f"model_path={tmp_path}/best_packed_k32"
    assert command.endswith(f"{model} --config.format=hf-factored")
    assert "**packed, 7 bands, k=32** stores the table in 133,990 bytes" in text
    assert "otherwise name packed, k=32, with 128,200 bytes for +0.0034." in text
    assert "model_path=FOLDER/best_packed_k32" in text


def test_beside_a_recommended_rounding_the_table_of_the_model_is_named(tmp_path):
    rival = dataclasses.replace(SMALLER, method="baseline", bits=4, bytes=100_000)
    sweep = PACKED | OF_WRITTEN | {"rows": [*PACKED["rows"], rival]}
    lines, text = finding_of(sweep, tmp_path)
    assert lines[2].startswith("of the tables with a model: packed, 7 bands, k=32")
    assert lines[3].startswith(EXPORT)
    assert "Of the tables with a model, **packed, 7 bands, k=32**" in text


def test_the_model_of_an_earlier_command_is_recommended(tmp_path):
    narrower = PACKED | OF_WRITTEN | {"rows": [SMALLER], "other_rows": [WRITTEN]}
    (line, command), text = finding_of(narrower, tmp_path)
    assert line.startswith("recommended: packed, 7 bands, k=32, 133,990 bytes")
    assert command.startswith(EXPORT)
    assert "| packed, 7 bands | 32 | 133,990 |" in text.split("## All tables")[1]


def test_a_model_that_stays_is_recommended_as_it_is(tmp_path):
    """A run started from it, so the table that adds less was not written."""
    stays = {"models": {"best_packed_k32": dataclasses.asdict(SMALLER.recipe)}}
    (line, _), _ = finding_of(PACKED | stays, tmp_path)
    assert line.startswith("recommended: packed, k=32, 128,200 bytes")


def test_a_table_whose_model_is_not_written_is_not_exported(tmp_path):
    lines, text = finding_of(SMOLLM2 | {"models": {}}, tmp_path)
    assert lines == [RECOMMENDED, "no model of it is written"]
    assert "No model of it is written." in text and "export.py" not in text
    _, text = finding_of(SMOLLM2 | {"models": {}, "rows_left": 2}, tmp_path)
    assert "No model of it is written yet." in text


def test_on_another_split_each_table_stands_for_itself(tmp_path):
    (line,), _ = finding_of(PACKED | IS_TEST, tmp_path)
    assert "at most 0.01 here: packed, k=32, 128,200 bytes" in line
