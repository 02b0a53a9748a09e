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
    last_run_dir,
    losses,
    metrics,
    quick_compiles,
    start,
    status,
    training,
)

from pcagpt import config as knobs
from pcagpt.compress import score as table_swap
from pcagpt.data.batches import TrainingBatches
from pcagpt.errors import UserError
from pcagpt.kernels import head
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.plan import Plan, make_plan
from pcagpt.run import calibrate as statistics
from pcagpt.run import checkpoint, evaluate
from pcagpt.run import folder as run_folder
from pcagpt.sharding import placement

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def run_dir(corpus_folder, compiled, tmp_path_factory):
    """A run of 6 steps, evaluated every 4, all its checkpoints kept."""
    config = shrink(knobs.base())
    config.update_from_flattened_dict(
        {"evaluate.every": 4, "checkpoint.every": 3, "checkpoint.keep_last": 9}
        | {"workdir": str(tmp_path_factory.mktemp("train") / "runs")}
        | {"data.source": str(corpus_folder)}
    )
    with quick_compiles(compiled):
        return execute(config)


# What is logged


def test_every_step_is_logged_with_loss_norm_rate_and_tokens(run_dir):
    lines = [line for line in metrics(run_dir) if line["split"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert lines[0]["learning_rate"] == pytest.approx(3e-4)
    assert lines[1]["learning_rate"] == pytest.approx(6e-4)
    assert lines[-1]["learning_rate"] == pytest.approx(6e-5)
    assert all(0 < line["gradient_norm"] < 10 for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(97), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05


def test_speed_is_logged_and_utilisation_only_where_the_peak_is_known(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    untimed = [line["step"] for line in lines if line["tokens_per_second"] is None]
    assert untimed == [1, 4, 5]  # those after an evaluation or a save
    assert all(line["flop_utilisation"] is None for line in lines)


def test_validation_is_logged_at_the_start_at_intervals_and_at_the_end(run_dir):
    lines = [line for line in metrics(run_dir) if line["split"] == "val"]
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert lines[0]["loss"] == pytest.approx(math.log(97), abs=0.05)
    result = run_folder.read_result(run_dir)
    assert lines[-1]["loss"] == result["val_loss"]
    assert result["best_val_loss"] == min(line["loss"] for line in lines)
    assert lines[-1]["perplexity"] == pytest.approx(math.exp(lines[-1]["loss"]))
    assert lines[-1]["word_perplexity"] is None  # the text is not known
    assert -1 < lines[-1]["ln_f_cosine"] < 1


def test_the_config_that_is_kept_is_the_whole_one(run_dir, tiny_config):
    kept = run_folder.read_config(run_dir)
    assert kept["vocab_size"] == 97
    assert kept["model"] == json.loads(json.dumps(tiny_config.model.to_dict()))
    assert kept["train"] == tiny_config.train.to_dict()


def test_checkpoints_are_saved_at_intervals_when_best_and_at_the_end(run_dir):
    assert checkpoint.steps(run_dir) == [0, 3, 4, 6]


def test_the_best_loss_is_the_lowest_not_the_last(tiny_config):
    tiny_config.train.update({"learning_rate": 0.3, "schedule": "constant"})
    tiny_config.evaluate.every = tiny_config.checkpoint.keep_last = 1
    run_dir = execute(tiny_config)
    losses = [line["loss"] for line in metrics(run_dir) if line["split"] == "val"]
    result = run_folder.read_result(run_dir)
    assert result["best_val_loss"] == min(losses) < losses[-1] == result["val_loss"]
    best = int(np.argmin(losses))
    assert checkpoint.steps(run_dir) == [best, 6]


def test_logging_every_n_steps_logs_these_only(tiny_config):
    tiny_config.telemetry.every = 4
    lines = metrics(execute(tiny_config))
    assert [line["step"] for line in lines if line["split"] == "train"] == [4]


def test_a_run_trains_on_the_batches_that_seed_and_step_decide(tiny_config):
    run = training(tiny_config)
    wanted = TrainingBatches(run.corpus.tokens("train"), 16, 8, tiny_config.seed)
    for step in (0, 3, 5):
        batch = np.asarray(run.batch(step))
        np.testing.assert_array_equal(batch[0], wanted.batch_at(step))


def test_nothing_is_written_before_a_run_begins(tiny_config):
    training(tiny_config)
    assert not Path(tiny_config.workdir).exists()


# When it gives up


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tiny_config,
):
    tiny_config.update_from_flattened_dict(
        {"train.learning_rate": 1e30, "train.gradient_clip": 0.0}
        | {"checkpoint.every": 5, "evaluate.every": 5}
    )
    with pytest.raises(UserError) as caught:
        execute(tiny_config)
    message = str(caught.value)
    assert "\n" not in message
    assert "the loss is not finite at step 2" in message
    assert "lower train.learning_rate" in message
    run_dir = last_run_dir(tiny_config)
    assert checkpoint.steps(run_dir) == [0]
    weights, _, _ = checkpoint.load_weights(run_dir)
    assert np.isfinite(weights["embed"]["band_0"]["wte"]).all()
    assert not (run_dir / "result.json").exists()
    assert max(line["step"] for line in metrics(run_dir)) == 1


def test_a_validation_loss_that_is_not_finite_is_no_result(tiny_config):
    tiny_config.update_from_flattened_dict(
        {"train.learning_rate": 1e30, "train.gradient_clip": 0.0, "train.steps": 1}
    )
    with pytest.raises(UserError, match="not finite at step 1 .validation loss nan"):
        execute(tiny_config)
    assert checkpoint.steps(last_run_dir(tiny_config)) == [0]
    assert status(tiny_config) == "to do"


# Kernels

TABLES = {
    "full": {},
    "bands": {"arm": "random", **BANDS},
}


@pytest.fixture
def stored_logits(monkeypatch):
    """The tiny full table is as others are: too wide for the kernels of the head."""
    monkeypatch.setattr(head, "MAX_RANK", 8)


@pytest.mark.usefixtures("stored_logits")
@pytest.mark.parametrize("table", TABLES)
def test_kernels_train_as_the_plain_form_does_on_one_device_and_on_eight(
    table, tiny_config
):
    fast = {"train.learning_rate": 1e-2, "train.accumulation": 2}
    plain = changed(tiny_config, **TABLES[table], **fast)
    on_one = changed(plain, **{"model.kernels": "pallas"})
    on_eight = changed(
        on_one, **{"mesh.data": 4, "mesh.fsdp": 2, "train.accumulation": 1}
    )
    wanted = losses(plain, 4)
    assert wanted[-1] < wanted[0] - 0.1
    np.testing.assert_allclose(losses(on_one, 4), wanted, rtol=1e-5)
    np.testing.assert_allclose(losses(on_eight, 4), wanted, rtol=1e-5)


EXCHANGE = re.compile(
    r"= (.*) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def exchanges(compiled):
    """(kind, shapes of its results, whether in a loop) of what a program exchanges."""
    found, is_in_loop = [], True
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            is_in_loop = not line.startswith("ENTRY")
        elif match := EXCHANGE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], shapes, is_in_loop))
    return found


def step_exchanges(config):
    """`exchanges` of a training step, and its state."""
    run = training(config)
    state, shardings = start(run)
    return exchanges(run.compile_step(state, shardings, None)), state


@pytest.mark.usefixtures("stored_logits")
@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("table", TABLES)
def test_devices_exchange_sums_and_what_of_the_model_is_split(
    table, kernels, tiny_config
):
    # Sizes of activations, 384 tokens and 48 on each device, are no parameter's.
    sizes = {"train.batch_size": 24, "model.kernels": kernels}
    dtype = {"model.compute_dtype": "bfloat16" if kernels == "pallas" else "float32"}
    config = changed(tiny_config, **TABLES[table], **sizes, **dtype)
    whole, _ = step_exchanges(changed(config, **{"mesh.data": 8}))
    assert {kind for kind, *_ in whole} == {"all-reduce"}
    in_parts = {"mesh.data": 1, "mesh.fsdp": 8}
    split, state = step_exchanges(changed(config, **in_parts))
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
    # Blocks' and positions' once, forward and backward together.
    others = Counter(leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    assert not others - gathered
    of_tables = gathered - others
    # Once for the lookup and once for the head; none for the gradients of both.
    for leaf in tables:
        seen = {leaf.shape, leaf.shape[::-1]}
        assert sum(of_tables.pop(shape, 0) for shape in seen) <= 2
    assert not of_tables


def test_a_step_is_compiled_to_sum_gradients_where_they_lie(tiny_config, monkeypatch):
    """XLA does otherwise on GPUs alone, so that here only the order can be seen."""
    compile_, given = jax.stages.Lowered.compile, []

    def compile_and_tell(lowered, compiler_options=None):
        given.append(compiler_options)
        return compile_(lowered, compiler_options)

    run = training(tiny_config)
    state, shardings = start(run)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_tell)
    run.compile_step(state, shardings, None)
    assert given == [{"xla_disable_hlo_passes": "all-reduce-contiguous"}]


@pytest.mark.parametrize(
    "measure", [evaluate.score_tokens, statistics._measure, table_swap._score]
)
def test_no_chunk_of_an_evaluation_sends_hidden_states_around(measure, tiny_config):
    in_parts = {"mesh.data": 1, "mesh.fsdp": 8, "train.batch_size": 24}
    run = training(changed(tiny_config, **in_parts))
    state, _ = start(run)
    tokens_BT = run.batch(0)[0, :, :-1]
    table_VD, decile_V = np.zeros((97, 32), np.float32), np.zeros(97, np.int32)
    arguments = {
        "score_tokens": (tokens_BT, tokens_BT),
        "_score": (table_VD, decile_V, tokens_BT, tokens_BT),
        "_measure": (tokens_BT, jax.random.key(0)),
    }[measure.__name__]
    function = functools.partial(measure, model=run.model, chunks=24)
    with jax.set_mesh(run.mesh):
        jitted = jax.jit(function, out_shardings=placement.replicated(run.mesh))
        compiled = jitted.lower(state.variables, *arguments).compile()
    assert "while(" in compiled.as_text()
    in_loop = {kind for kind, _, is_in_loop in exchanges(compiled) if is_in_loop}
    assert in_loop <= {"all-reduce"}  # Of the sums that are wanted.


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
        ({"model.vocab_size": 96}, "model.vocab_size is 96, the corpus has token ids"),
        ({"model.block_size": 6001}, "model.block_size=6001 needs 6002 tokens"),
        (
            {"model.band_sizes": (50, 48), "model.band_ranks": (4, 4)},
            "model.band_sizes add up to 98",
        ),
        ({"init.import_wte_freeze": True}, "nothing is imported"),
    ],
)
def test_what_does_not_fit_the_corpus_or_devices_is_refused_before_all(
    overrides, words, tiny_config
):
    with pytest.raises(UserError) as caught:
        execute(
            changed(tiny_config, arm="random", **{"model.n_embd_wte": 8} | overrides)
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(tiny_config.workdir).exists()


def test_a_model_of_more_tokens_than_the_corpus_goes_through_the_factorization(
    tiny_config,
):
    """The rows of tokens that the corpus lacks are no padding."""
    tiny_config.update_from_flattened_dict({"model.vocab_size": 100, "train.steps": 1})
    a = changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8})
    *prerequisites, job = make_plan(a).jobs
    experiment.execute(Plan(tuple(prerequisites)), a, "a command")
    table = np.load(job.config.init.import_wte_npy)
    assert table.shape == (100, 8)
    assert training(a).model.config.vocab_size == 100


def test_a_checkpoint_knows_its_config_and_best_loss(tiny_config):
    run_dir = execute(tiny_config)
    meta = json.loads((run_dir / "ckpt" / "6" / "meta" / "metadata").read_text())
    assert meta["config"] == json.loads((run_dir / "config.json").read_text())
    best = run_folder.read_result(run_dir)["best_val_loss"]
    assert meta["history"]["best_val_loss"] == best
