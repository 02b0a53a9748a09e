"""A training run: what it measures, when it saves, and when it gives up."""

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import shrink
from runs import (
    BANDS,
    changed,
    execute,
    job,
    losses,
    metrics,
    quick_compiles,
    setup,
    start,
)

from pcagpt.compression import score
from pcagpt.config import Settings, base
from pcagpt.data.batches import TrainingBatches
from pcagpt.errors import UserError
from pcagpt.kernels.triton import low_rank_head
from pcagpt.pipeline import execute as pipeline
from pcagpt.pipeline import train_job
from pcagpt.pipeline.plan import Plan, make_plan
from pcagpt.run import calibrate, checkpoint, evaluator, folder
from pcagpt.sharding import placement
from pcagpt.training import loop
from pcagpt.training.meter import Meter, NotFinite

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def run_dir(corpus_folder, compiled, tmp_path_factory):
    """A run of 6 steps, evaluated every 3 and saved every 4."""
    config = shrink(base())
    config.update_from_flattened_dict(
        {"checkpoint.every": 4, "checkpoint.keep_last": 9}
        | {"workdir": str(tmp_path_factory.mktemp("train") / "runs")}
        | {"data.source": str(corpus_folder)}
    )
    with quick_compiles(compiled):
        return execute(config)


# What is logged and saved


def logged(run_dir, split):
    """The lines of metrics.jsonl of a split, with timings."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["split"] == split]


def test_every_step_is_logged_with_loss_norm_rate_tokens_and_speed(run_dir):
    lines = logged(run_dir, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert lines[0]["learning_rate"] == pytest.approx(3e-4)
    assert lines[1]["learning_rate"] == pytest.approx(6e-4)
    assert lines[-1]["learning_rate"] == pytest.approx(6e-5)
    assert all(0 < line["gradient_norm"] < 10 for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(97), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    untimed = [line["step"] for line in lines if line["tokens_per_second"] is None]
    assert untimed == [1, 4, 5]  # the first, and those after a save or evaluation
    # The peak of a CPU is not known.
    assert all(line["flop_utilisation"] is None for line in lines)


def test_validation_is_logged_at_the_start_at_intervals_and_at_the_end(run_dir):
    lines = logged(run_dir, "val")
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert lines[0]["loss"] == pytest.approx(math.log(97), abs=0.05)
    result = folder.read_result(run_dir)
    assert lines[-1]["loss"] == result["val_loss"]
    assert result["best_val_loss"] == min(line["loss"] for line in lines)
    assert lines[-1]["perplexity"] == pytest.approx(math.exp(lines[-1]["loss"]))
    assert lines[-1]["word_perplexity"] is None  # the text is not known
    assert -1 < lines[-1]["ln_f_cosine"] < 1


def test_config_json_holds_all_settings_and_each_checkpoint_a_copy(run_dir):
    record = folder.read_record(run_dir)
    assert record["vocab_size"] == 97
    assert record["train"]["steps"] == 6
    assert record.keys() >= Settings().to_dict().keys()
    meta = json.loads((run_dir / "ckpt" / "6" / "meta" / "metadata").read_text())
    assert meta["config"] == record
    best = folder.read_result(run_dir)["best_val_loss"]
    assert meta["history"]["best_val_loss"] == best


def test_checkpoints_are_saved_at_the_multiples_and_at_the_end_only(run_dir):
    """Not at step 0, and not at step 3, where an evaluation improved."""
    assert checkpoint.steps(run_dir) == [4, 6]


def test_the_best_of_the_saved_states_is_kept(tiny_config):
    tiny_config.train.update({"learning_rate": 0.3, "schedule": "constant"})
    tiny_config.evaluate.every = tiny_config.checkpoint.every = 1
    tiny_config.checkpoint.keep_last, tiny_config.telemetry.every = 1, 4
    run_dir = execute(tiny_config)
    losses = [line["loss"] for line in logged(run_dir, "val")]
    result = folder.read_result(run_dir)
    assert result["best_val_loss"] == min(losses) < losses[-1] == result["val_loss"]
    best_saved = 1 + int(np.argmin(losses[1:]))
    assert checkpoint.steps(run_dir) == [best_saved, 6]
    assert [line["step"] for line in logged(run_dir, "train")] == [4]


def test_the_seed_and_the_step_decide_a_batch_and_nothing_is_written(tiny_config):
    made = setup(changed(tiny_config, **{"train.accumulation": 2}))
    wanted = TrainingBatches(made.corpus.tokens("train"), 16, 8, tiny_config.seed)
    for step in (0, 3):
        batch_ABT = np.asarray(made.batch(step))
        assert batch_ABT.shape == (2, 4, 17)
        np.testing.assert_array_equal(batch_ABT.reshape(8, 17), wanted.batch_at(step))
    assert not Path(tiny_config.workdir).exists()


# When it gives up


@pytest.mark.parametrize(
    ("evaluate_every", "seen"),
    [(5, r"step 2 \(loss"), (1, r"step 1 \(validation loss nan")],
)
def test_a_loss_that_is_not_finite_stops_the_run_without_a_result(
    evaluate_every, seen, tiny_config
):
    tiny_config.update_from_flattened_dict(
        {"train.learning_rate": 1e30, "train.gradient_clip": 0.0}
        | {"checkpoint.every": 5, "evaluate.every": evaluate_every}
    )
    with pytest.raises(UserError, match="the loss is not finite at " + seen) as caught:
        execute(tiny_config)
    assert "\n" not in str(caught.value)
    assert "lower train.learning_rate and give --config.overwrite" in str(caught.value)
    run_dir = job(tiny_config).folder
    assert checkpoint.steps(run_dir) == []
    assert not (run_dir / "result.json").exists()
    assert max(line["step"] for line in metrics(run_dir)) == 1
    assert job(tiny_config).status().words == "to do"


def test_a_loss_that_is_not_finite_at_the_start_blames_no_learning_rate(
    tiny_config, monkeypatch
):
    def train(*_):
        raise NotFinite(0, "validation loss nan", is_of_start=True)

    monkeypatch.setattr(train_job, "train", train)
    with pytest.raises(UserError, match="replace the weights or tables that") as caught:
        execute(tiny_config)
    assert "learning_rate" not in str(caught.value)


@pytest.mark.parametrize(("step", "is_of_start"), [(1, True), (2, False)])
def test_the_metrics_of_an_update_are_of_the_weights_before_it(step, is_of_start):
    sizes = {"tokens_per_step": 1, "flops_per_token": 1.0, "peak_flops": None}
    meter = Meter(None, None, None, every=1, **sizes)
    meter.hold(step, {"loss": np.nan, "gradient_norm": 1.0})
    with pytest.raises(NotFinite) as caught:
        meter.flush()
    assert caught.value.is_of_start == is_of_start


# Kernels and devices

TABLES = {
    "full": {},
    "bands": {"arm": "random", **BANDS},
}


@pytest.fixture
def stored_logits(monkeypatch):
    """Makes the tiny full table too wide for the kernels of the head, as others are."""
    monkeypatch.setattr(low_rank_head, "MAX_RANK", 8)


ON_ONE = {"train.accumulation": 2}
ON_EIGHT = {"mesh.data": 4, "mesh.fsdp": 2}


@pytest.mark.usefixtures("stored_logits")
@pytest.mark.parametrize(
    ("table", "devices"),
    [
        ("full", ON_EIGHT),
        pytest.param("bands", ON_EIGHT, marks=pytest.mark.slow),
        pytest.param("full", ON_ONE, marks=pytest.mark.slow),
        pytest.param("bands", ON_ONE, marks=pytest.mark.slow),
    ],
)
def test_kernels_train_like_the_plain_form(table, devices, tiny_config):
    fast = {"train.learning_rate": 1e-2, **TABLES[table]}
    wanted = losses(changed(tiny_config, **fast), 4)
    assert wanted[-1] < wanted[0] - 0.1
    kernels = {"model.kernels": "triton"} | devices
    found = losses(changed(tiny_config, **fast, **kernels), 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


EXCHANGE = re.compile(
    r"= (.*) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def exchanges(compiled):
    """(kind, shapes of its results, whether in a loop) of a program's exchanges."""
    found, is_in_loop = [], True
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            is_in_loop = not line.startswith("ENTRY")
        elif match := EXCHANGE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], shapes, is_in_loop))
    return found


def compiled_step(config):
    """The compiled training step and its first state."""
    made = setup(config)
    state, shardings = start(made, job(config).folder)
    return loop.compile_step(made, state, shardings, None), state


@pytest.mark.usefixtures("stored_logits")
@pytest.mark.parametrize(
    ("table", "kernels"),
    [
        ("full", "triton"),
        ("bands", "xla"),
        pytest.param("bands", "triton", marks=pytest.mark.slow),
    ],
)
def test_devices_exchange_only_sums_and_split_parameters(table, kernels, tiny_config):
    # No parameter has a size of the activations: 384 tokens, 48 on each device.
    sizes = {"train.batch_size": 24, "model.kernels": kernels}
    dtype = {"model.compute_dtype": "bfloat16" if kernels == "triton" else "float32"}
    config = changed(tiny_config, **TABLES[table], **sizes, **dtype)
    step, _ = compiled_step(changed(config, **{"mesh.data": 8}))
    whole = exchanges(step)
    assert {kind for kind, *_ in whole} == {"all-reduce"}
    step, state = compiled_step(changed(config, **{"mesh.data": 1, "mesh.fsdp": 8}))
    split = exchanges(step)
    assert {kind for kind, *_ in split} <= {
        "all-reduce",
        "reduce-scatter",
        "all-gather",
    }
    for _, _, is_in_loop in whole + split:
        assert not is_in_loop  # Not for every chunk of the loss.
    gathered = Counter(
        tuple(map(int, shape.split(",")))
        for kind, shapes, _ in split
        for shape in shapes
        if "gather" in kind
    )
    params = dict(state.params)
    tables = jax.tree.leaves(params.pop("embed"))
    # Matrices of blocks and positions: once, for forward and backward together.
    others = Counter(leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    assert not others - gathered
    of_tables = gathered - others
    # Tables: once for the lookup and once for the head, never for their gradients.
    for leaf in tables:
        seen = {leaf.shape, leaf.shape[::-1]}
        assert sum(of_tables.pop(shape, 0) for shape in seen) <= 2
    assert not of_tables


def test_the_compiler_gets_the_options_of_the_step(tiny_config, monkeypatch):
    """Only GPUs have these passes of the compiler, so this test sees only options."""
    made = setup(tiny_config)
    state, shardings = start(made, job(tiny_config).folder)
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda _, compiler_options: compiler_options
    )
    given = loop.compile_step(made, state, shardings, None)
    assert given == {
        "xla_disable_hlo_passes": "all-reduce-contiguous",
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_experimental_enable_fusion_autotuner": False,
    }


@pytest.mark.parametrize(
    "measure", [evaluator.score_tokens, calibrate._measure, score._score]
)
def test_an_evaluation_exchanges_no_hidden_states_in_its_chunks(measure, tiny_config):
    in_parts = {"mesh.data": 1, "mesh.fsdp": 8, "train.batch_size": 24}
    config = changed(tiny_config, **in_parts)
    made = setup(config)
    state, _ = start(made, job(config).folder)
    tokens_BT = made.batch(0)[0, :, :-1]
    table_VD, decile_V = np.zeros((97, 32), np.float32), np.zeros(97, np.int32)
    arguments = {
        "score_tokens": (tokens_BT, tokens_BT),
        "_score": (table_VD, decile_V, tokens_BT, tokens_BT),
        "_measure": (tokens_BT, jax.random.key(0)),
    }[measure.__name__]
    function = functools.partial(measure, model=made.model, chunks=24)
    with jax.set_mesh(made.mesh):
        jitted = jax.jit(function, out_shardings=placement.replicated(made.mesh))
        compiled = jitted.lower(state.variables, *arguments).compile()
    assert "while(" in compiled.as_text()
    in_loop = {kind for kind, _, is_in_loop in exchanges(compiled) if is_in_loop}
    assert in_loop <= {"all-reduce"}  # of the sums that are wanted


# What does not fit


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.batch_size": 6, "mesh.data": 4}, "train.batch_size / train.accumul"),
        ({"train.accumulation": 4, "mesh.data": 4}, "= 2 cannot be split over 4"),
        ({"evaluate.batch_size": 9, "mesh.data": 2}, "evaluate.batch_size = 9"),
        ({"mesh.data": 9}, "does not fit the 8 devices"),
        (
            {"mesh.data": 1, "mesh.fsdp": 3, "train.batch_size": 12}
            | {"evaluate.batch_size": 12},
            "mesh.fsdp = 3 does not divide model.n_embd",
        ),
        ({"mesh.data": -1, "mesh.fsdp": 3}, "does not fit the 8 devices"),
        ({"model.vocab_size": 96}, "is 96, but the corpus has token ids"),
        ({"model.block_size": 6001}, "model.block_size=6001 needs 6002 tokens"),
        (
            {"model.band_sizes": (50, 48), "model.band_ranks": (4, 4)},
            "model.band_sizes add up to 98",
        ),
        ({"init.import_wte_freeze": True}, "nothing is imported"),
    ],
)
def test_settings_that_do_not_fit_corpus_or_devices_are_refused_before_any_file(
    overrides, words, tiny_config
):
    with pytest.raises(UserError) as caught:
        execute(
            changed(tiny_config, arm="random", **{"model.n_embd_wte": 8} | overrides)
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(tiny_config.workdir).exists()


def test_a_model_with_more_tokens_than_the_corpus_is_factorized_in_full(tiny_config):
    """The rows of tokens that the corpus lacks are not padding."""
    tiny_config.update_from_flattened_dict({"model.vocab_size": 100, "train.steps": 1})
    a = Settings.of(changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8}))
    *prerequisites, run = make_plan(a).jobs
    pipeline.execute(Plan(a, tuple(prerequisites)), "a command")
    table = np.load(run.settings.init.import_wte_npy)
    assert table.shape == (100, 8)
    assert run.record()["model"]["vocab_size"] == 100
