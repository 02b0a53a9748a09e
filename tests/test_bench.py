"""The benchmark at a size of nothing: what it prints and writes, not how fast it is."""

import json
import sys
from pathlib import Path

import jax
import pytest

from pcagpt.model import training_flops_per_token

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
sys.path.insert(0, SCRIPTS)
import bench  # noqa: E402
import bench_pcagpt  # noqa: E402
import bench_torch  # noqa: E402

sys.path.remove(SCRIPTS)

TINY = bench_pcagpt.Size(97, 16, 1, 2, 32, 8, 8, 2000, 2)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(bench, "prepare_process", lambda: None)
    monkeypatch.setattr(bench_pcagpt, "QUICK", TINY)
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", *arguments])
    bench.main()


def test_every_system_of_ours_has_a_row_with_what_it_depends_on(
    quick, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "bench.json"
    asked = ["--quick", "--steps", "2", "--rounds", "1", "--profile", "--out", str(out)]
    run(monkeypatch, *asked)
    found = json.loads(out.read_text())
    systems = {(row["system"], row["model"]): row for row in found["rows"]}
    names = ("pcagpt", "pcagpt loop", "data parallel", "fsdp", "decode")
    assert set(systems) == {(name, model) for name in names for model in ("D", "k8")}
    for (name, model), row in systems.items():
        assert row["devices"] == (8 if name in ("data parallel", "fsdp") else 1)
        tokens = row["batch"] * (1 if name == "decode" else TINY.block_size)
        tokens *= row["devices"]
        seconds = row["ms_per_step"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert len(row["rounds_ms"]) == 1
        assert min(row["rounds_ms"]) <= row["ms_per_step"] <= max(row["rounds_ms"])
        if name != "decode":
            gpt = bench_pcagpt.training(TINY, model, 8, Path(found_corpus(tmp_path)))
            config = gpt.model.config
            assert row["flops_per_token"] == training_flops_per_token(config)
            assert row["peak_bytes"] > 4 * 97 * (8 if model == "k8" else 32)
    assert len(systems["pcagpt loop", "D"]["checkpoint_ms"]) == 1
    # A device's share of the table, the positions and their moments.
    whole, shared = (systems[name, "D"]["peak_bytes"] for name in ("pcagpt", "fsdp"))
    assert whole - shared > 0.8 * 3 * 4 * 112 * 32
    others = "pcagpt loop", "data parallel", "fsdp"
    wanted = [
        "decode, batch 1: k8 / D",
        *(f"{name}, batch 8: k8 / D" for name in ("pcagpt", *others)),
        *(f"{m}, batch 8: {name} / pcagpt" for m in ("D", "k8") for name in others),
    ]
    assert sorted(found["ratios"]) == sorted(wanted)
    assert found["command"] == "python scripts/bench.py " + " ".join(asked)
    assert {"jax", "jaxlib", "python"} <= found["versions"].keys()
    shown = capsys.readouterr().out
    assert "round 1 of 1: decode k8 at batch 1" in shown
    assert "k8, batch 8:" in shown and " ms a step\n" in shown


def found_corpus(folder):
    bench_pcagpt.write_corpus(folder, TINY)
    return folder


def test_ratios_are_of_tokens_per_second_and_device_at_one_batch():
    rates = {
        ("pcagpt", "D", 32): 500,
        ("pcagpt", "k128", 32): 650,
        ("torch", "D", 32): 400,
        ("torch", "D", 64): 1,
        ("pcagpt loop", "D", 32): 495,
        ("fsdp", "D", 32): 960,
    }
    names = ("system", "model", "batch")
    rows = [
        dict(zip(names, key, strict=True))
        | {"tokens_per_second": rate, "devices": 2 if "fsdp" in key else 1}
        for key, rate in rates.items()
    ]
    assert bench.ratios(rows) == {
        "D, batch 32: pcagpt / torch": 1.25,
        "pcagpt, batch 32: k128 / D": 1.3,
        "D, batch 32: pcagpt loop / pcagpt": 0.99,
        "D, batch 32: fsdp / pcagpt": 0.96,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--systems", "pcagpt,nanogpt"],
            "no system is called nanogpt: choose of pcag",
        ),
        (["--rounds", "0"], "whole numbers from 1 on"),
        (["--batches", "32,0"], "whole numbers from 1 on"),
        (["--batches", "many"], "--batches"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    monkeypatch, capsys, arguments, said
):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("torch", "PyTorch is not installed"),
        ("transformers", "PyTorch is not installed"),
        ("data parallel", "there is one device"),
        ("fsdp", "there is one device"),
    ],
)
def test_systems_that_cannot_run_here_are_left_out_and_the_reason_is_told(
    monkeypatch, capsys, tmp_path, system, reason
):
    monkeypatch.setattr(bench_torch, "why_not", lambda: "PyTorch is not installed")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--systems", system])
    asked = bench.arguments()
    assert bench.make_systems(asked, TINY, 8, tmp_path) == []
    assert f"{system} is left out: {reason}" in capsys.readouterr().out
