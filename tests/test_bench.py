"""The benchmark at a tiny size: what it prints and writes, not how fast it is."""

import gc
import json
import sys
import time

import jax
import pytest
from command_line import ROOT

from pcagpt.errors import Interrupted
from pcagpt.run import provenance

sys.path.insert(0, str(ROOT / "scripts"))
import bench
import bench_pcagpt

sys.path.remove(str(ROOT / "scripts"))

BANDS = (5, 0), (30, 16), (62, 4)
TINY = bench_pcagpt.Size(97, 16, 1, 2, 32, 8, 8, 2000, 4, 2, BANDS)


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch):
    monkeypatch.setattr(bench_pcagpt, "QUICK", TINY)


def run(monkeypatch, *arguments):
    """The exit code of `scripts/bench.py ARGUMENT...`."""
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", *arguments])
    return bench.main()


@pytest.mark.slow
def test_every_system_gets_a_row_with_all_that_it_depends_on(
    quick, tmp_path, monkeypatch, capsys
):
    saves, train = [], bench_pcagpt.train

    def counted(run):
        result, waited = train(run)
        saves.append(len(waited))
        return result, waited

    monkeypatch.setattr(bench_pcagpt, "train", counted)
    monkeypatch.setattr(bench, "bench_torch", None)
    out = tmp_path / "bench.json"
    asked = ["--quick", "--steps", "6", "--rounds", "1", "--profile", "--out", str(out)]
    assert run(monkeypatch, *asked) == 0
    found = json.loads(out.read_text())
    rows = {(row["system"], row["model"]): row for row in found["rows"]}
    trained = ("pcagpt", "pcagpt-loop", "data-parallel", "fsdp")
    assert rows.keys() == {
        (s, m) for s in (*trained, "decode") for m in ("D", "k8")
    } | {("pcagpt", "bands"), ("decode", "packed")}
    for (system, model), row in rows.items():
        assert row["devices"] == (8 if system in ("data-parallel", "fsdp") else 1)
        assert row["batch"] == (1 if system == "decode" else 8)
        tokens = row["devices"] * (1 if system == "decode" else 8 * TINY.block_size)
        seconds = row["ms_per_step"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert row["steps"] == (TINY.decoded_tokens if system == "decode" else 6)
        assert row["peak_bytes"] > (2 if system == "decode" else 4) * 97 * 8
        flops = bench_pcagpt.flops_per_token(TINY, model)
        assert row["flops_per_token"] == (None if system == "decode" else flops)
    assert rows["pcagpt", "D"]["temporary_bytes"] > 0
    assert rows["pcagpt", "bands"]["seconds_until_compiled"] > 0
    assert saves == [2, 2]  # Half way and at the end.
    assert len(rows["pcagpt-loop", "D"]["checkpoint_ms"]) == 1
    # A device's share of the table, the positions and their moments.
    whole, shared = (rows[name, "D"]["peak_bytes"] for name in ("pcagpt", "fsdp"))
    assert whole - shared > 0.8 * 3 * 4 * 112 * 32
    assert rows["data-parallel", "D"]["exchanged_bytes"].keys() == {"all-reduce"}
    assert "all-gather" in rows["fsdp", "D"]["exchanged_bytes"]
    assert len(found["ratios"]) == 4 + 2 * 3  # of D; three variants of two models
    assert found["command"] == "python scripts/bench.py " + " ".join(asked[:-2])
    assert {"jax", "jaxlib", "python"} <= found["versions"].keys()
    shown = capsys.readouterr().out
    assert "torch is left out: PyTorch is not installed" in shown
    assert " ms per step, summed over all threads\n" in shown


def test_pytorch_takes_turns_on_a_cpu(quick, tmp_path, monkeypatch, capsys):
    bench_torch = pytest.importorskip("bench_torch", reason="needs PyTorch")
    monkeypatch.setattr(bench_torch, "has_compiler", lambda: False)
    trained = ("pcagpt", "torch", "transformers")
    decoding = ("decode", "decode-torch", "decode-transformers")
    asked = ["--quick", "--systems", ",".join(trained + decoding), "--steps", "6"]
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *asked, "--rounds", "1", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    rows = {(row["system"], row["model"]): row for row in found["rows"]}
    of_both = {(s, m) for s in trained + decoding for m in ("D", "k8")}
    assert rows.keys() == of_both | {("pcagpt", "bands"), ("decode", "packed")}
    for system in decoding:
        assert rows[system, "k8"]["steps"] == TINY.decoded_tokens
        assert rows[system, "k8"]["tokens_per_step"] == 1
    assert rows["torch", "D"]["compiled"] is False
    assert rows["torch", "D"]["threads"] >= 1
    assert {
        f"{model}, batch {batch}: {ours} / {peer}"
        for (ours, *peers), batch in ((trained, 8), (decoding, 1))
        for peer in peers
        for model in ("D", "k8")
    } < set(found["ratios"])


@pytest.mark.parametrize("model", ["D", "k8"])
def test_pytorch_decodes_the_likeliest_tokens(model, tmp_path):
    bench_torch = pytest.importorskip("bench_torch", reason="needs PyTorch")
    plain, peer = (
        system(TINY, model, 2, tmp_path)
        for system in (bench_torch.PlainDecoding, bench_torch.TransformersDecoding)
    )
    for system, logits_of in (
        (plain, lambda tokens: plain.module.logits(plain.module.hidden(tokens))),
        (peer, lambda tokens: peer.module(tokens).logits),
    ):
        found, known = system.decode(5), TINY.prompt_tokens
        assert found.shape == (2, known + 5)
        likeliest = logits_of(found[:, :-1]).argmax(dim=-1)[:, known - 1 :]
        assert (found[:, known:] == likeliest).all()


def test_exchanged_bytes_are_those_of_a_ring():
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


def test_a_step_is_timed_until_its_result_is_there(quick, tmp_path, monkeypatch):
    bench_pcagpt.write_corpus(tmp_path, TINY)
    step = bench_pcagpt.Step(TINY, "D", 8, tmp_path)
    clock, calls, compiled, wait = [0.0], [], step.step, jax.block_until_ready

    def one_second(function):
        def slowed(*arguments):
            clock[0] += 1.0
            return function(*arguments)

        return slowed

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(jax, "block_until_ready", one_second(wait))
    step.step = one_second(lambda *given: calls.append(1) or compiled(*given))
    assert step.seconds_per_step(4) == (4 + 1) / 4
    assert len(calls) == bench_pcagpt.WARM_STEPS + 4


def test_a_step_of_the_loop_includes_its_share_of_a_save(tmp_path, monkeypatch):
    loop = bench_pcagpt.Loop(TINY, "D", 8, tmp_path)
    result = {"tokens_per_second": loop.tokens_per_step / 2.0, "peak_bytes": 5}
    monkeypatch.setattr(bench_pcagpt, "setup", lambda *_, **knobs: knobs)
    monkeypatch.setattr(bench_pcagpt, "train", lambda knobs: (result, [50.0, 100.0]))
    assert loop.seconds_per_step(6) == 2.0 + 100.0 / 1000  # checkpoint.every
    assert (loop.peak_bytes, loop.details["checkpoint_ms"]) == (5, [100_000.0])


class Scripted:
    """A system that takes the seconds in a list."""

    name, devices, peak_bytes, flops_per_token, details = "pcagpt", 1, 10, 30.0, {}
    rests = True
    seconds = {"D": [2.0, 4.0, 3.0], "k8": [1.0, 1.0, 2.0]}
    done = []

    def __init__(self, size, model, batch, folder):
        self.model, self.batch, self.tokens_per_step = model, batch, 12
        self.left = list(self.seconds[model])

    def seconds_per_step(self, steps):
        self.done.append((self.model, self.batch, steps))
        found = self.left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(Scripted, "done", [])
    monkeypatch.setattr(gc, "collect", lambda: None)  # It takes long beside JAX.
    monkeypatch.setattr(bench, "TRAINED", {"pcagpt": Scripted})
    monkeypatch.setattr(bench_pcagpt, "THIRD", {})
    monkeypatch.setattr(bench_pcagpt, "write_corpus", lambda *_: None)
    monkeypatch.setattr(provenance, "peak_flops", lambda count: 1000.0 * count)
    return ["--quick", "--systems", "pcagpt"]


def test_systems_take_turns_and_the_median_counts(
    scripted, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *scripted, "--steps", "7", "--out", str(out)) == 0
    assert Scripted.done == [("D", 8, 7), ("k8", 8, 7)] * 3
    written = json.loads(out.read_text())
    of_d, of_k8 = written["rows"]
    assert of_d["rounds_ms"] == [2000.0, 4000.0, 3000.0]
    assert (of_d["ms_per_step"], of_d["tokens_per_second"]) == (3000.0, 4.0)
    assert of_d["utilisation"] == 30.0 * 4.0 / 1000.0
    assert of_k8["ms_per_step"] == 1000.0
    ratio = written["ratios"]["pcagpt, batch 8: k8 / D"]
    assert ratio == {"ratio": 2.0, "least": 1.5, "most": 4.0}
    shown = capsys.readouterr().out
    assert "2000.00 to 4000.00" in shown
    assert "round 2 of pcagpt D, batch 8: +33.3% from the median\n" in shown
    assert "round 3 of pcagpt D" not in shown
    assert "pcagpt, batch 8: k8 / D: 2.000 (1.500 to 4.000)" in shown


def test_a_gpu_rests_and_garbage_is_collected_before_a_turn(scripted, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: Scripted.done.append(f"rest {s}"))
    monkeypatch.setattr(gc, "collect", lambda: Scripted.done.append("collect"))
    asked = [*scripted, "--rounds", "1", "--steps", "7", "--rest", "2.5"]
    turn = ["collect", ("D", 8, 7), "collect", ("k8", 8, 7)]
    resting = ["rest 2.5", *turn[:2], "rest 2.5", *turn[2:]]
    for backend, rests, wanted in (
        ("cpu", True, turn),
        ("gpu", True, resting),
        ("gpu", False, turn),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(Scripted, "rests", rests)
        Scripted.done.clear()
        assert run(monkeypatch, *asked) == 0
        assert Scripted.done[: len(wanted)] == wanted


def test_the_largest_batch_is_measured_first(scripted, monkeypatch):
    assert run(monkeypatch, *scripted, "--batches", "8,16,8", "--rounds", "1") == 0
    assert [batch for _, batch, _ in Scripted.done] == [16, 16, 8, 8]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), Interrupted("saved")])
def test_an_interrupt_keeps_the_rounds_so_far(
    scripted, monkeypatch, tmp_path, capsys, interrupt
):
    monkeypatch.setitem(Scripted.seconds, "k8", [1.0, interrupt])
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *scripted, "--out", str(out)) == 1
    assert [len(r["rounds_ms"]) for r in json.loads(out.read_text())["rows"]] == [1, 1]
    shown = capsys.readouterr()
    assert "pcagpt, batch 8: k8 / D: 2.000" in shown.out
    assert shown.err == "bench.py: interrupted: only the rounds so far were measured\n"


def test_a_group_that_does_not_fit_in_memory_is_reported_and_the_rest_is_measured(
    scripted, monkeypatch, capsys
):
    seconds = Scripted.seconds_per_step

    def needs_memory(self, steps):
        if self.batch > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return seconds(self, steps)

    monkeypatch.setattr(Scripted, "seconds_per_step", needs_memory)
    assert run(monkeypatch, *scripted, "--batches", "8,64") == 1
    shown = capsys.readouterr()
    assert "out of memory: pcagpt, batch 64: give fewer --systems" in shown.out
    assert "pcagpt, batch 8: k8 / D: 2.000" in shown.out
    assert shown.err == "bench.py: some systems did not fit in memory\n"


def test_ratios_are_of_tokens_per_second_and_device_at_one_batch():
    names = ("system", "model", "batch", "devices", "tokens_per_step", "rounds_ms")
    values = [
        ("pcagpt", "D", 32, 1, 32, [10.0]),
        ("pcagpt", "k128", 32, 1, 32, [8.0]),
        ("torch", "D", 32, 1, 32, [12.5]),
        ("torch", "D", 64, 1, 64, [1.0]),
        ("pcagpt-loop", "D", 32, 1, 32, [12.5]),
        ("fsdp", "D", 32, 2, 64, [12.5]),
    ]
    found = bench.ratios([dict(zip(names, row, strict=True)) for row in values])
    assert {name: ratio["ratio"] for name, ratio in found.items()} == {
        "pcagpt, batch 32: k128 / D": 1.25,
        "D, batch 32: pcagpt / torch": 1.25,
        "D, batch 32: pcagpt-loop / pcagpt": 0.8,
        "D, batch 32: fsdp / pcagpt": 0.8,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "pcagpt,nanogpt"], "--systems has 'nanogpt': choose from"),
        (["--systems", ""], "--systems has ''"),
        (["--rounds", "0"], "--rounds and --batches must be at least 1"),
        (["--batches", "32,0"], "--rounds and --batches must be at least 1"),
        (["--quick", "--batches", "118"], "--batches must be at most 117"),
        (["--batches", "many"], "--batches is many: give whole numbers"),
        (["--steps", "5"], "--steps must be at least 6"),
        (["--rest", "nan"], "--rest must be between 0 and 3600"),
        (["--out", "nowhere/bench.json"], "a file cannot be written there"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(
    monkeypatch, capsys, arguments, message
):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "reason"),
    [("torch", "PyTorch is not installed"), ("fsdp", "it needs several devices")],
)
def test_a_system_that_cannot_run_here_is_left_out_with_the_reason(
    monkeypatch, capsys, system, reason
):
    monkeypatch.setattr(bench, "bench_torch", None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert run(monkeypatch, "--systems", system) == 2
    shown = capsys.readouterr()
    assert f"{system} is left out: {reason}" in shown.out
    assert shown.err == "bench.py: none of these systems can run here\n"
