"""Going on from all the weights of a run, with a teacher or without."""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import (
    BANDS,
    assert_equal,
    changed,
    execute,
    losses,
    metrics,
    quick_compiles,
    saved_state,
    signal_at,
    start,
    status,
    training,
)

from pcagpt import config as knobs
from pcagpt import trees
from pcagpt.errors import Interrupted, UserError
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.plan import make_plan
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder

pytestmark = pytest.mark.usefixtures("quick")

RUNS = ("gpt_baseline", "gpt_pca_k8", "banded")


@pytest.fixture(scope="module")
def sources(finished_experiment, compiled, tmp_path_factory):
    """Folders of finished runs: D, A at rank 8, and one of three bands."""
    workdir = tmp_path_factory.mktemp("sources")
    finished = Path(finished_experiment.workdir)
    with quick_compiles(compiled):
        banded = execute(
            changed(
                finished_experiment,
                task="train",
                arm="random",
                workdir=str(workdir / "runs"),
                **BANDS,
            )
        )
    return {"banded": banded} | {name: finished / name for name in RUNS[:2]}


@pytest.fixture
def recover(tiny_config):
    """A function: the config that goes on from a run; all of the model is left open."""

    def config(source, **overrides):
        copy = knobs.base()
        for section in ("train", "data", "evaluate", "checkpoint", "telemetry"):
            copy[section] = tiny_config[section]
        copy.workdir, copy.mesh.data = tiny_config.workdir, 1
        copy.finetune.steps_share = 0.5
        copy.arm = "pca_finetune"
        copy.init.weights_from = str(source)
        return changed(copy, **overrides)

    return config


def variables(state):
    return trees.flatten(jax.tree.map(np.asarray, state.variables))


def refusal(config):
    """The one line with which a plan is not made or not carried out."""
    with pytest.raises(UserError) as caught:
        execute(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.workdir).exists()
    return str(caught.value)


def elsewhere(source, folder, **model):
    """A run's config and newest weights as another program might write them."""
    weights, constants, _ = checkpoint.load_weights(source)
    record = run_folder.read_config(source)
    kept = {name: record[name] for name in ("vocab_size", "tokenizer", "data")}
    run_folder.write_config(folder, kept | {"model": record["model"] | model})
    write_weights(folder, {"params": weights, "constants": constants})
    return folder


def write_weights(folder, weights):
    path = (folder / "ckpt" / "0").absolute()
    shutil.rmtree(path, ignore_errors=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            path, ocp.args.Composite(weights=ocp.args.StandardSave(weights))
        )


# Where it starts


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_the_token_order_and_the_loss_are_taken_over(
    name, sources, recover
):
    run = training(recover(sources[name]))
    state, _ = start(run)
    weights, constants, _ = checkpoint.load_weights(sources[name])
    wanted = trees.flatten({"params": weights, "constants": constants})
    assert_equal(variables(state), wanted)
    assert ("constants/embed/position_of_token" in wanted) == (name == "banded")
    loss = run.validate(state).metrics["loss"]
    assert loss == run_folder.read_result(sources[name])["val_loss"]


def test_the_token_order_is_the_run_s_own_whatever_the_corpus_counts(
    sources, recover, tmp_path
):
    source = elsewhere(sources["banded"], tmp_path / "renumbered")
    weights, constants, _ = checkpoint.load_weights(source)
    order = constants["embed"]["position_of_token"]
    constants["embed"]["position_of_token"] = order[::-1].copy()
    write_weights(source, {"params": weights, "constants": constants})
    state, _ = start(training(recover(source)))
    found = variables(state)["constants/embed/position_of_token"]
    np.testing.assert_array_equal(found, order[::-1])


def test_an_earlier_checkpoint_can_be_gone_on_from(sources, recover):
    state, _ = start(training(recover(sources["gpt_pca_k8"] / "ckpt" / "3")))
    wanted, _, _ = checkpoint.load_weights(sources["gpt_pca_k8"] / "ckpt" / "3")
    assert_equal(trees.flatten(state.params), trees.flatten(wanted))


def test_the_run_decides_the_model_and_finetune_the_budget(sources, recover):
    config = recover(sources["banded"], **{"model.dropout": 0.1, "train.steps": 20})
    (job,) = make_plan(config).jobs
    assert job.folder.name == "gpt_pca_finetune_from_" + sources["banded"].name
    assert job.config.model.band_sizes == BANDS["model.band_sizes"]
    assert job.config.model.band_ranks == BANDS["model.band_ranks"]
    assert (job.config.model.n_embd, job.config.model.n_layer) == (32, 1)
    assert (job.config.model.vocab_size, job.config.model.dropout) == (97, 0.1)
    assert (job.config.train.steps, job.config.train.warmup_steps) == (10, 1)
    assert job.config.train.learning_rate == pytest.approx(3e-4)
    (job,) = make_plan(recover(sources["gpt_baseline"])).jobs
    assert job.folder.name == "gpt_continued_from_gpt_baseline"
    assert job.config.train.steps == 3


def test_a_folder_of_weights_that_was_not_trained_is_trained_on(
    sources, recover, tmp_path
):
    source = elsewhere(sources["banded"], tmp_path / "best")
    config = recover(source)
    run_dir = execute(config)
    assert run_dir.name == "gpt_pca_finetune_from_best"
    result = run_folder.read_result(run_dir)
    assert (result["arm"], result["steps"]) == ("pca_finetune", 3)
    assert result["band_ranks"] == [0, 8, 4]
    assert result["val_loss"] < run_folder.read_result(sources["banded"])["val_loss"]
    shutil.move(source, tmp_path / "moved" / "best")
    assert status(recover(tmp_path / "moved" / "best")) == "done"


def test_weights_written_anew_are_another_run(sources, recover, tmp_path):
    source = elsewhere(sources["gpt_pca_k8"], tmp_path / "best")
    config = recover(source)
    execute(config)
    weights, _, _ = checkpoint.load_weights(source)
    write_weights(source, {"params": weights, "constants": {}})
    with pytest.raises(UserError, match=r"imported_sha256\.weights_from \(was"):
        status(config)


def test_a_plan_is_described_and_nothing_written(sources, recover):
    config = recover(sources["gpt_pca_k8"])
    plan = make_plan(config)
    experiment.check(plan, config)
    (line,) = experiment.describe(plan)
    wanted = "B gpt_pca_finetune_from_gpt_pca_k8 3 steps to do"
    assert " ".join(line.split()) == wanted
    assert not Path(config.workdir).exists()


def test_runs_older_than_a_knob_count_at_its_default(tiny_config):
    run_dir = execute(tiny_config)
    record = run_folder.read_config(run_dir)
    del record["init"]["weights_from"], record["distill"], record["train"]["beta1"]
    run_folder.write_config(run_dir, record)
    assert status(tiny_config) == "done"
    with pytest.raises(UserError, match=r"train.beta1 \(was 0.9, now 0.5\)"):
        status(changed(tiny_config, **{"train.beta1": 0.5}))


# With a teacher


@pytest.fixture
def distilled(sources, recover):
    """A banded model that is trained on towards D's predictions."""
    teacher = str(sources["gpt_baseline"])
    return recover(
        sources["banded"],
        **{"distill.teacher": teacher, "train.steps": 12, "train.learning_rate": 0.01},
    )


def logged(run_dir, split="train"):
    return [line for line in metrics(run_dir) if line["split"] == split]


def test_a_teacher_is_learnt_and_stays_as_it_is(distilled, sources):
    before = saved_state(sources["gpt_baseline"])
    run_dir = execute(distilled)
    first, *_, last = logged(run_dir)
    assert all(line["loss"] == line["kl"] for line in logged(run_dir))
    assert 0 < last["kl"] < first["kl"]
    assert last["cross_entropy"] > last["kl"]
    assert_equal(saved_state(sources["gpt_baseline"]), before)
    plain = execute(changed(distilled, overwrite=True, **{"distill.teacher": ""}))
    assert "kl" not in logged(plain)[0]


def test_a_teacher_is_neither_changed_by_a_step_nor_saved_with_the_run(distilled):
    run = training(distilled)
    state, shardings = start(run)
    teacher = run.place_teacher(state)
    before = jax.tree.map(np.array, teacher)
    step = run.compile_step(state, shardings, teacher)
    for number in range(2):
        state, _ = step(state, run.batch(number), teacher)
    jax.tree.map(np.testing.assert_array_equal, teacher, before)
    shutil.rmtree(distilled.workdir)
    names = saved_state(execute(distilled)).keys()
    plain = changed(distilled, overwrite=True, **{"distill.teacher": ""})
    assert names == saved_state(execute(plain)).keys()


def test_the_share_mixes_divergence_and_cross_entropy(distilled):
    config = changed(distilled, **{"distill.share": 0.5, "train.steps": 2})
    (line,) = logged(execute(config))
    mean = (line["kl"] + line["cross_entropy"]) / 2
    assert line["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_distilled_run_resumes_bit_identical(distilled, tmp_path):
    straight = changed(distilled, **{"model.dropout": 0.2, "train.accumulation": 2})
    stopped = changed(straight, workdir=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 1, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped at step 2 of 6, saved"):
            execute(stopped)
    assert status(stopped) == "resumes at step 2"
    found, wanted = execute(stopped), execute(straight)
    assert_equal(saved_state(found), saved_state(wanted))
    assert metrics(found) == metrics(wanted)


def test_devices_do_not_change_what_is_learnt(distilled):
    overrides = {"mesh.data": 2, "mesh.fsdp": 4, "evaluate.batch_size": 64}
    wanted = losses(distilled, 2)
    shutil.rmtree(distilled.workdir)
    assert losses(changed(distilled, **overrides), 2) == pytest.approx(wanted, rel=1e-5)


def test_another_teacher_or_share_is_another_run(distilled, sources):
    execute(distilled)
    for override, words in (
        ({"distill.share": 0.5}, r"distill.share \(was 1.0, now 0.5\)"),
        (
            {"distill.teacher": str(sources["gpt_pca_k8"])},
            r"imported_sha256.teacher \(was",
        ),
    ):
        with pytest.raises(UserError, match=words):
            status(changed(distilled, **override))
    plain = make_plan(changed(distilled, **{"distill.teacher": ""})).jobs[-1]
    assert plain.folder.name.startswith("gpt_pca_finetune_from_")  # Not in its way.
    assert plain.status() == "to do"


def test_what_a_distilled_run_needs_is_not_distilled(distilled):
    pca = changed(distilled, arm="pca", **{"init.weights_from": ""})
    pca = changed(pca, **{"model.n_embd_wte": 8, "distill.share": 0.5})
    baseline, _, target = make_plan(pca).jobs
    assert baseline.config.distill == knobs.base().distill
    assert target.config.distill == pca.distill


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"vocab_size": 100}, "has 100 tokens, this model 97: both must have the same"),
        ({"block_size": 8}, "reads 8 tokens at a time, this model 16: lower"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(model, words, distilled, tmp_path):
    copy = elsewhere(Path(distilled.distill.teacher), tmp_path / "teacher", **model)
    record = run_folder.read_config(copy)
    record["vocab_size"] = record["model"]["vocab_size"] or record["vocab_size"]
    run_folder.write_config(copy, record)
    message = refusal(changed(distilled, **{"distill.teacher": str(copy)}))
    assert words in message


def test_no_teacher_where_one_is_named_is_refused(distilled, tmp_path):
    teacher = str(tmp_path / "nothing")
    message = refusal(changed(distilled, **{"distill.teacher": teacher}))
    assert "nothing does not exist: give the folder of a run" in message


def test_an_experiment_has_no_teacher(tiny_config):
    config = changed(tiny_config, task="experiment", **{"distill.teacher": "x"})
    with pytest.raises(UserError, match="distill.teacher is set: the models of an exp"):
        knobs.validate(config)


# What does not fit


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"model.n_layer": 2}, "model.n_layer is 2, but .* was trained with 1"),
        ({"model.n_embd_wte": 4}, "model.n_embd_wte is 4, but .* trained with 8"),
        ({"model.band_sizes": (90, 7)}, "model.band_s"),
        ({"model.vocab_size": 120}, "model.vocab_size is 120, but .* trained with 97"),
        ({"init.blocks_from": "x"}, "init.blocks_from is set beside init.weights_from"),
        ({"init.import_wte_npy": "x"}, "init.import_wte_npy is set beside"),
        ({"init.import_wte_freeze": True}, "init.import_wte_freeze is set beside"),
        ({"arm": "random"}, "set for arm random: .*configs/recover.py"),
        ({"arm": "pca"}, "set for arm pca: "),
    ],
)
def test_what_contradicts_the_run_is_refused(override, words, sources, recover):
    message = refusal(recover(sources["gpt_pca_k8"], **override))
    assert re.search(words, message), message


def test_an_experiment_goes_on_from_no_run(sources, recover):
    with pytest.raises(UserError, match="init.weights_from is set for an experiment"):
        knobs.validate(recover(sources["gpt_pca_k8"], task="experiment"))


@pytest.mark.parametrize("asked", ["baseline", "continued", "pca_finetune"])
def test_the_run_decides_what_it_is_trained_on_as(asked, sources, recover):
    (job,) = make_plan(recover(sources["gpt_baseline"], arm=asked)).jobs
    assert job.config.arm == "continued"
    (job,) = make_plan(recover(sources["banded"], arm=asked)).jobs
    assert job.config.arm == "pca_finetune"
    teacher = {"distill.teacher": str(sources["gpt_baseline"])}
    (job,) = make_plan(recover(sources["banded"], arm=asked, **teacher)).jobs
    assert job.config.arm == "pca_distill"


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("", "does not exist: give the folder of a run"),
        ("ckpt", "holds no finished checkpoint"),
        ("config.json", "has no config.json: it is not a run's folder"),
        ("ckpt/0/weights", "cannot be read"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(
    lost, words, sources, recover, tmp_path
):
    source = elsewhere(sources["gpt_pca_k8"], tmp_path / "best")
    if lost == "config.json":
        (source / lost).unlink()
    else:
        shutil.rmtree(source / lost)
    assert words in refusal(recover(source))


def test_weights_of_another_model_than_the_config_says_are_refused(
    sources, recover, tmp_path
):
    for number, (model, words) in enumerate(
        [
            ({"n_layer": 2}, "lacks 'params/block_1/"),
            ({"bias": False}, "which this model does not have"),
            ({"n_embd_wte": 4}, "has shape (8, 32), this model needs (4, 32)"),
        ]
    ):
        source = elsewhere(sources["gpt_pca_k8"], tmp_path / str(number), **model)
        assert words in refusal(recover(source))


def test_tokens_of_another_tokenizer_are_refused(sources, recover, tmp_path):
    source = elsewhere(sources["gpt_pca_k8"], tmp_path / "best")
    known = {"tokenizer": "gpt2", "vocab_size": 5000}
    run_folder.write_config(source, run_folder.read_config(source) | known)
    config = recover(source)
    corpus = Path(shutil.copytree(config.data.source, tmp_path / "corpus"))
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    (corpus / "meta.json").write_text(json.dumps(meta))
    message = refusal(changed(config, **{"data.source": str(corpus)}))
    assert "in tokens of sotu4096" in message
    assert "knows those of gpt2" in message
