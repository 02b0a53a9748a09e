"""The benchmark at a size of nothing: what it prints and writes, not how fast it is."""

import gc
import json
import sys
import time
from pathlib import Path

import jax
import pytest

from pcagpt.errors import Interrupted
from pcagpt.model import GPTConfig, total_parameters, training_flops_per_token
from pcagpt.run import provenance

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
sys.path.insert(0, SCRIPTS)
import bench  # noqa: E402
import bench_pcagpt  # noqa: E402
import bench_report  # noqa: E402
import bench_torch  # noqa: E402

sys.path.remove(SCRIPTS)

TINY = bench_pcagpt.Size(97, 16, 1, 2, 32, 8, 8, 2000, 4, 2)


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch):
    monkeypatch.setattr(bench_pcagpt, "QUICK", TINY)


def run(monkeypatch, *arguments):
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", *arguments])
    return bench.main()


def test_every_system_of_ours_has_a_row_with_what_it_depends_on(
    quick, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "bench.json"
    asked = ["--quick", "--steps", "6", "--rounds", "1", "--profile", "--out", str(out)]
    assert run(monkeypatch, *asked) == 0
    found = json.loads(out.read_text())
    systems = {(row["system"], row["model"]): row for row in found["rows"]}
    names = ("pcagpt", "pcagpt-loop", "data-parallel", "fsdp", "decode")
    assert set(systems) == {(name, model) for name in names for model in ("D", "k8")}
    bench_pcagpt.write_corpus(tmp_path, TINY)
    for (name, model), row in systems.items():
        assert row["devices"] == (8 if name in ("data-parallel", "fsdp") else 1)
        assert row["batch"] == (1 if name == "decode" else 8)
        tokens = row["batch"] * (1 if name == "decode" else TINY.block_size)
        tokens *= row["devices"]
        seconds = row["ms_per_step"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert row["rounds_ms"] == [row["ms_per_step"]]
        assert row["steps"] == (TINY.decoded_tokens if name == "decode" else 6)
        assert row["peak_bytes"] > (2 if name == "decode" else 4) * 97 * 8
        if name == "decode":
            assert row["flops_per_token"] is None
        else:
            gpt = bench_pcagpt.training(TINY, model, 8, tmp_path).model
            assert row["flops_per_token"] == training_flops_per_token(gpt.config)
    assert len(systems["pcagpt-loop", "D"]["checkpoint_ms"]) == 1
    # A device's share of the table, the positions and their moments.
    whole, shared = (systems[name, "D"]["peak_bytes"] for name in ("pcagpt", "fsdp"))
    assert whole - shared > 0.8 * 3 * 4 * 112 * 32
    # Gradients of all that is trained: on CPUs the table's from input and head apart.
    sums = systems["data-parallel", "D"]["exchanged_bytes"]
    assert sums.keys() == {"all-reduce"}
    assert 0 < sums["all-reduce"] / 1.75 - 4 * stored_values() < 4 * 128 * 32
    assert "all-gather" in systems["fsdp", "D"]["exchanged_bytes"]
    others = "pcagpt-loop", "data-parallel", "fsdp"
    wanted = [
        "decode, batch 1: k8 / D",
        "pcagpt, batch 8: k8 / D",
        *(f"{m}, batch 8: {name} / pcagpt" for m in ("D", "k8") for name in others),
    ]
    assert sorted(found["ratios"]) == sorted(wanted)
    assert found["command"] == "python scripts/bench.py " + " ".join(asked[:-2])
    assert {"jax", "jaxlib", "python"} <= found["versions"].keys()
    shown = capsys.readouterr().out
    assert "torch is left out: --quick is without it" in shown
    assert "round 1 of 1: decode k8 at batch 1" in shown
    assert "k8, batch 8:" in shown and " ms a step of all threads together\n" in shown


def stored_values():
    """Of D at the tiny size, padding included."""
    config = GPTConfig(97, block_size=16, n_layer=1, n_head=2, n_embd=32)
    padding = config.padded_vocab_size - config.vocab_size
    return total_parameters(config) + padding * config.n_embd


def test_exchanged_bytes_are_those_that_a_ring_brings():
    program = """
  %a = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), channel_id=1
  %b = f32[8]{0} all-reduce-done(%a)
  ROOT %c = (bf16[2,3]{1,0}, f32[]) all-reduce(%y, %z), to_apply=%all-reduce.1
  %d = pred[5]{0} all-gather(%e), dimensions={0}
  %f = f32[4]{0} reduce-scatter(%g), dimensions={0}
  %h = bf16[16]{0} all-to-all(%i), dimensions={0}
  %j = s8[7]{0} collective-permute(%k), source_target_pairs={{0,1}}
"""
    assert bench_pcagpt.exchanged_bytes(program, 4) == {
        "all-reduce": 1.5 * (8 * 4 + 6 * 2 + 4),
        "all-gather": 0.75 * 5,
        "reduce-scatter": 3 * 16,
        "all-to-all": 0.75 * 32,
        "collective-permute": 7,
    }


# The training of ours, with a clock that stands still but for what is timed.


class Clock:
    """Each of the given calls takes a second."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, function):
        def slowed(*arguments):
            self.now += 1.0
            return function(*arguments)

        return slowed


def test_a_step_is_a_share_of_what_is_waited_for(quick, tmp_path, monkeypatch):
    bench_pcagpt.write_corpus(tmp_path, TINY)
    step = bench_pcagpt.Step(TINY, "D", 8, tmp_path)
    clock, compiled = Clock(monkeypatch), step.step
    monkeypatch.setattr(jax, "block_until_ready", clock.slow(jax.block_until_ready))
    done = []
    step.step = clock.slow(lambda *given: done.append(1) or compiled(*given))
    assert step.seconds_per_step(4) == (4 + 1) / 4
    assert len(done) == bench_pcagpt.WARM_STEPS + 4
    decoding = bench_pcagpt.Decoding(TINY, "D", 3, tmp_path)
    assert decoding.tokens_per_step == 3
    monkeypatch.setattr(decoding, "begin", lambda: None)
    assert decoding.seconds_per_step(99) == 1 / TINY.decoded_tokens
    assert next(decoding.drawn).shape == (3,)


def test_a_loop_s_step_has_its_share_of_a_checkpoint_s_stall(
    quick, tmp_path, monkeypatch
):
    bench_pcagpt.write_corpus(tmp_path, TINY)
    loop = bench_pcagpt.Loop(TINY, "D", 8, tmp_path)

    class Run:
        run_dir = tmp_path / "workdir" / "run"

        def save(self):
            clock.now += self.stalls.pop(0) if self.run_dir.exists() else 0.0

        def run(self, label):
            self.stalls = [300.0, 50.0, 100.0]  # The first is of the start.
            for _ in range(3):
                self.save()
            return {"tokens_per_second": loop.tokens_per_step / 2.0, "peak_bytes": 5}

    clock = Clock(monkeypatch)
    monkeypatch.setattr(bench_pcagpt, "training", lambda *_, **__: Run())
    assert loop.seconds_per_step(6) == 2.0 + 100.0 / 1000  # checkpoint.every
    assert (loop.peak_bytes, loop.details["checkpoint_ms"]) == (5, [100_000.0])
    assert not Run.run_dir.parent.exists()


# Systems with scripted seconds


class Scripted:
    """A system whose rounds take what a list says."""

    name, devices, peak_bytes, flops_per_token, details = "pcagpt", 1, 10, 30.0, {}
    rests = True
    seconds = {"D": [2.0, 4.0, 3.0], "k8": [1.0, 1.0, 2.0]}
    asked = []

    def __init__(self, size, model, batch, folder):
        self.model, self.batch, self.tokens_per_step = model, batch, 12
        self.left = list(self.seconds[model])

    def seconds_per_step(self, steps):
        self.asked.append((self.model, steps))
        found = self.left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(bench, "TRAINED", {"pcagpt": Scripted})
    monkeypatch.setattr(provenance, "peak_flops", lambda count: 1000.0 * count)
    return ["--quick", "--systems", "pcagpt"]


def test_systems_take_turns_and_the_median_counts(
    scripted, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *scripted, "--steps", "7", "--out", str(out)) == 0
    assert Scripted.asked == [("D", 7), ("k8", 7)] * 3
    of_d, of_k8 = json.loads(out.read_text())["rows"]
    assert of_d["rounds_ms"] == [2000.0, 4000.0, 3000.0]
    assert (of_d["ms_per_step"], of_d["tokens_per_second"]) == (3000.0, 4.0)
    assert of_d["utilisation"] == 30.0 * 4.0 / 1000.0
    assert of_k8["ms_per_step"] == 1000.0
    ratio = json.loads(out.read_text())["ratios"]["pcagpt, batch 8: k8 / D"]
    assert ratio == {"ratio": 2.0, "least": 1.5, "most": 4.0}
    shown = capsys.readouterr().out
    assert "2000.00 to 4000.00" in shown
    assert "pcagpt, batch 8: k8 / D: 2.000 (1.500 to 4.000)" in shown


def test_a_gpu_rests_before_the_turns_of_systems_that_get_it_hot(scripted, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for backend, rests, wanted in (
        ("cpu", True, 0),
        ("gpu", True, 2.5),
        ("gpu", False, 0),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(Scripted, "rests", rests)
        slept.clear()
        assert run(monkeypatch, *scripted, "--rounds", "2", "--rest", "2.5") == 0
        assert slept == 4 * [wanted]


def test_only_what_does_not_begin_a_turn_idle_rests():
    rests = {name: maker.rests for name, maker in bench.TRAINED.items()}
    begins_idle = {"pcagpt-loop"}
    assert rests == {name: name not in begins_idle for name in rests}
    assert not bench_pcagpt.Decoding.rests


def test_no_turn_is_timed_with_a_garbage_collection_that_is_due(scripted, monkeypatch):
    done = Scripted.asked
    monkeypatch.setattr(gc, "collect", lambda: done.append("collected"))
    assert run(monkeypatch, *scripted, "--steps", "7", "--rounds", "1") == 0
    assert done[:4] == ["collected", ("D", 7), "collected", ("k8", 7)]


def test_batches_are_measured_from_the_largest_on(scripted, monkeypatch, capsys):
    assert run(monkeypatch, *scripted, "--batches", "8,16,8", "--rounds", "1") == 0
    shown = capsys.readouterr().out
    assert shown.index("round 1 of 1: pcagpt k8 at batch 16") < shown.index(
        "round 1 of 1: pcagpt D at batch 8"
    )


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), Interrupted("saved")])
def test_an_interrupt_leaves_the_rounds_until_then(
    scripted, monkeypatch, tmp_path, capsys, interrupt
):
    monkeypatch.setitem(Scripted.seconds, "k8", [1.0, interrupt])
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *scripted, "--out", str(out)) == 1
    assert [len(r["rounds_ms"]) for r in json.loads(out.read_text())["rows"]] == [1, 1]
    told = capsys.readouterr()
    assert "pcagpt, batch 8: k8 / D: 2.000" in told.out
    assert told.err == "bench.py: interrupted: these are the rounds until then\n"


def test_what_does_not_fit_the_memory_is_a_line_and_the_rest_is_measured(
    scripted, monkeypatch, capsys
):
    seconds = Scripted.seconds_per_step

    def needing_memory(self, steps):
        if self.batch > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return seconds(self, steps)

    monkeypatch.setattr(Scripted, "seconds_per_step", needing_memory)
    assert run(monkeypatch, *scripted, "--batches", "8,64") == 1
    told = capsys.readouterr()
    assert "memory does not suffice for pcagpt at batch 64 side by side" in told.out
    assert "pcagpt, batch 8: k8 / D: 2.000" in told.out
    assert told.err == "bench.py: not all that was asked for was measured\n"


def test_no_empty_file_is_left_where_nothing_was_measured(
    scripted, monkeypatch, tmp_path
):
    monkeypatch.setitem(Scripted.seconds, "D", [KeyboardInterrupt()])
    assert run(monkeypatch, *scripted, "--out", str(tmp_path / "bench.json")) == 1
    assert list(tmp_path.iterdir()) == []


def test_ratios_are_of_tokens_per_second_and_device_at_one_batch():
    names = ("system", "model", "batch", "devices", "tokens_per_step", "rounds_ms")
    rows = [
        dict(zip(names, values, strict=True))
        for values in [
            ("pcagpt", "D", 32, 1, 32, [10.0]),
            ("pcagpt", "k128", 32, 1, 32, [8.0]),
            ("torch", "D", 32, 1, 32, [12.5]),
            ("torch", "D", 64, 1, 64, [1.0]),
            ("pcagpt-loop", "D", 32, 1, 32, [12.5]),
            ("fsdp", "D", 32, 2, 64, [12.5]),
        ]
    ]
    found = bench_report.ratios(rows)
    assert {name: ratio["ratio"] for name, ratio in found.items()} == {
        "pcagpt, batch 32: k128 / D": 1.25,
        "D, batch 32: pcagpt / torch": 1.25,
        "D, batch 32: pcagpt-loop / pcagpt": 0.8,
        "D, batch 32: fsdp / pcagpt": 0.8,
    }


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "pcagpt,nanogpt"], "no system is called nanogpt: choose of"),
        (["--systems", ""], "no system is called (nothing)"),
        (["--rounds", "0"], "whole numbers from 1 on"),
        (["--batches", "32,0"], "whole numbers from 1 on"),
        (["--steps", "5"], "--steps from 6 on"),
        (["--rest", "-1"], "--rest is a number of seconds from 0 to 3600"),
        (["--rest", "nan"], "--rest is a number of seconds from 0 to 3600"),
        (["--rest", "1e10"], "--rest is a number of seconds from 0 to 3600"),
        (["--batches", "many"], "--batches is many: give whole numbers"),
        (["--out", "nowhere/bench.json"], "--out nowhere/bench.json cannot be written"),
        (["--out", "."], "--out . cannot be written"),
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
        ("data-parallel", "there is one device"),
        ("fsdp", "there is one device"),
    ],
)
def test_systems_that_cannot_run_here_are_left_out_and_the_reason_is_told(
    monkeypatch, capsys, system, reason
):
    monkeypatch.setattr(bench_torch, "torch", None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert run(monkeypatch, "--systems", system) == 2
    told = capsys.readouterr()
    assert f"{system} is left out: {reason}" in told.out
    assert told.err == "bench.py: none of the systems asked for can run here\n"
