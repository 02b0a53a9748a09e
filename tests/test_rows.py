"""sweep.json and its rows: what is read, from which versions, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from pcagpt.errors import UserError
from pcagpt.json_files import write_json
from pcagpt.report import write_sweep_report
from pcagpt.report.sweep import recovery_rows
from pcagpt.rows import Recipe, Row, in_bands, read_sweep

PUBLISHED = Path(__file__).parent.parent / "checkpoints" / "published"
SWEEPS = list(PUBLISHED.rglob("sweep.json"))
STORED = json.loads(SWEEPS[0].read_text())["rows"][0]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_published_sweeps_are_read_reported_and_written_with_all_fields(path, tmp_path):
    stored, sweep = json.loads(path.read_text()), read_sweep(path)
    write_json(tmp_path / "sweep.json", sweep)
    written = json.loads((tmp_path / "sweep.json").read_text())
    # Not in the file; its own hash is of what it holds.
    newer = dict.fromkeys(("added_loss_interval", "memory", "table_sha256"))
    stored.pop("sha256", None)
    for name in ("rows", "other_rows"):
        stored[name] = [newer | row for row in stored.get(name, [])]
    assert all(written[name] == stored[name] for name in stored)
    report = write_sweep_report(tmp_path, sweep).with_suffix(".md").read_text("utf-8")
    assert all(f"| {row.bytes:,} | " in report for row in sweep["rows"])


def test_a_field_that_an_older_version_did_not_write_has_its_default():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewerRow(Row):
        interval: list[float] | None = None

    assert NewerRow.of(STORED, "row 0").interval is None
    older = {name: STORED[name] for name in STORED.keys() - {"bits", "predicted_loss"}}
    row = Row.of(older, "row 0")
    assert (row.bits, row.predicted_loss) == (32, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kl", value) for value in ("0.1", None, True, math.nan, math.inf)),
        *(("bytes", value) for value in (1.5, None, True, 0)),
        ("band_ranks", [3, 4, 5]),
        ("added_loss_interval", [0.1]),
        *(("predicted_loss", value) for value in ("0.1", math.nan)),
        *(("added_loss_by_decile", value) for value in (0.1, ["a"], [math.inf])),
        *(("bits", None), ("band_sizes", [1.5]), ("is_anchor", 1), ("method", 3)),
    ],
)
def test_a_damaged_field_is_refused_in_one_line(name, value):
    with pytest.raises(UserError, match=f"^row 0 is damaged .'{name}' is .*: delete"):
        Row.of(STORED | {name: value}, "row 0")


def test_a_row_without_a_required_field_and_no_row_are_refused(tmp_path):
    lacking = {name: STORED[name] for name in STORED if name != "added_loss"}
    sweep = {"protocol": {"table": [97, 32]}, "rows": [STORED]}
    sweep["other_rows"] = [lacking]
    write_json(tmp_path / "sweep.json", sweep)
    with pytest.raises(UserError, match="row 0 of other_rows .*'added_loss' is missi"):
        read_sweep(tmp_path / "sweep.json")
    with pytest.raises(UserError, match="row 0 is damaged .it is not a JSON object"):
        Row.of([], "row 0")


SAMPLE = {"prompt": "a", "seed": 1, "temperature": 0.8, "texts": {"D": "b"}}
TRAINED = {"run": "x", "val_loss": 1, "added_loss": 0.1, "tokens_seen": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("measured_on", value) for value in ([1], "a", 3, True, {"window": []})),
        *(
            ("protocol", {"table": [97, 32], name: []})
            for name in ("corpus", "split", "tokens_sha256")
        ),
        *(("protocol", of) for of in ({}, {"table": [97]}, {"table": [97, "a"]})),
        ("rows", []),
        ("samples", [{"texts": {"D": "a"}}]),
        *(("samples", [SAMPLE | {"texts": texts}]) for texts in (["a"], {"D": 3})),
        *(("samples_of", value) for value in ([], {"D": 3})),
        *(("gaussian_limit", value) for value in ([[1]], [[1, "a"]], [3])),
        *(("recovered", value) for value in ([{"run": "x"}], [3])),
        ("recovered", [TRAINED | {"rank": 8, "bands": 1}]),
        *(("recovered", [TRAINED | {n: [1]}]) for n in ("interval", "method")),
        ("models", {"best_k8": 3}),
    ],
)
def test_a_sweep_with_an_odd_value_in_a_field_is_refused_in_one_line(
    name, value, tmp_path
):
    sweep = {"rows": [STORED], "samples": [SAMPLE]}
    sweep["protocol"] = {"table": [97, 32]}
    sweep["recovered"] = [TRAINED, TRAINED | {"rank": 8, "method": "svd", "bands": 1}]
    write_json(tmp_path / "sweep.json", sweep)
    assert read_sweep(tmp_path / "sweep.json")["samples"] == [SAMPLE]
    assert len(recovery_rows(read_sweep(tmp_path / "sweep.json"))) == 3
    write_json(tmp_path / "sweep.json", sweep | {name: value})
    with pytest.raises(UserError, match=f"json is damaged .'{name}' is .*: delete it"):
        read_sweep(tmp_path / "sweep.json")


def test_a_sweep_of_a_table_without_numbers_is_refused(tmp_path):
    sweep = {"protocol": {"table": [0, 32]}, "rows": [STORED]}
    write_json(tmp_path / "sweep.json", sweep)
    with pytest.raises(UserError, match=r"damaged .'table' is \[0, 32\].: delete it"):
        read_sweep(tmp_path / "sweep.json")


def test_tables_that_differ_only_in_their_bands_have_other_words():
    words = [in_bands(Recipe("packed", bands, 100, 2, 0)) for bands in (1, 2, 7)]
    assert words == ["packed", "packed in 2 bands", "packed in 7 bands"]
