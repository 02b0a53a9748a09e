"""What a report found, in a few lines for the terminal."""

import json
import re
from pathlib import Path

from command_line import ROOT

from pcagpt.report import experiment_lines, sweep_lines
from pcagpt.rows import read_sweep

TEST = {"split": "test"}
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


def test_a_sweep_ends_with_its_recommended_table(tmp_path):
    sweep = read_sweep(PUBLISHED / "smollm2_135m" / "val" / "sweep.json")
    (line,) = sweep_lines(sweep, tmp_path)
    assert line == (
        "recommended: coded, k=256, 12,683,480 bytes (8.93× smaller than in float32), "
        "adds +0.0041 ± 0.0005 nats per token"
    )
    (on_test,) = sweep_lines(sweep | {"protocol": sweep["protocol"] | TEST}, tmp_path)
    assert on_test.startswith("none is recommended; nearest: coded, k=256, 12,6")
    costly = {"rows": [row for row in sweep["rows"] if row.added_loss > 0.1]}
    (line_of_costly,) = sweep_lines(sweep | costly, tmp_path)
    assert line_of_costly.startswith("none is recommended; nearest: ")
    (tmp_path / "best_coded_k256").mkdir()
    assert sweep_lines(sweep, tmp_path) == [
        line,
        "export it: python -m pcagpt.main --config=configs/export.py "
        f"--config.model_path={tmp_path}/best_coded_k256",
    ]
