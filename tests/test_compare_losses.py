"""Losses before and after a change, from made-up run folders."""

import json
import runpy
import sys

import pytest
from command_line import ROOT

MAIN = runpy.run_path(str(ROOT / "scripts" / "compare_losses.py"))["main"]


def write_run(folder, losses):
    """A run folder in which steps 1, 2, ... have these training losses."""
    folder.mkdir(parents=True)
    entries = [
        {"step": step, "tokens": 64 * step, "split": split, "loss": loss}
        for step, loss in enumerate(losses, start=1)
        for split in ("train", "val")
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    # A killed run leaves half a line.
    (folder / "metrics.jsonl").write_text(text + '{"step": 7')
    return str(folder)


def compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *arguments])
    MAIN()


def test_each_pair_gets_a_line_and_a_panel(tmp_path, monkeypatch, capsys):
    before = write_run(tmp_path / "before", [5.0, 4.0, 3.0, 2.0])
    after = write_run(tmp_path / "after", [5.5, 4.0, 2.0, 2.25, 1.0])
    chart = tmp_path / "losses.svg"
    names = ["--names", "D,k128"]
    compare(monkeypatch, before, after, before, before, *names, "--chart", str(chart))
    _, of_d, of_k128, written = capsys.readouterr().out.splitlines()
    found = " ".join(of_d.split())
    assert found == "D 4 +0.50000 -1.00000 at step 3 +0.25000 ± 0.00000 2.0000 2.2500"
    assert of_k128.split()[:4] == ["k128", "4", "+0.00000", "+0.00000"]
    assert written == f"written to {chart}"
    assert chart.read_text().count('id="axes_') == 4


def test_a_loss_that_is_no_number_is_named(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / name, [1.0, loss])
        for name, loss in (("a", None), ("b", 1.0))
    ]
    with pytest.raises(SystemExit, match="a: the loss of step 2 is no number: train"):
        compare(monkeypatch, *runs)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["a"], "in pairs, BEFORE AFTER: 1 is odd"),
        (["a", "b", "a"], "in pairs, BEFORE AFTER: 3 is odd"),
        (["a", "c"], "c has no metrics.jsonl: give the folder of a run"),
        (["a", "b", "--names", "D,k"], "--names must have one name for each pair (1)"),
        (["a", "b", "--chart", "no/x.png"], "no folder no: make it first"),
        (["a", "b", "--chart", "x.pngg"], "x.pngg: its name must end with .png or"),
        (["a", "b", "--chart", "d.png"], "d.png cannot be written: Is a directory"),
        (["a", "odd"], "odd/metrics.jsonl"),
        (["a", "empty"], "empty: the runs have no logged step in common"),
    ],
)
def test_a_mistake_is_refused(tmp_path, monkeypatch, capsys, runs, said):
    for name, losses in (("a", [1.0]), ("b", [1.0]), ("empty", [])):
        write_run(tmp_path / name, losses)
    for name in ("odd/metrics.jsonl", "d.png"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        compare(monkeypatch, *runs)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
