"""Training all the weights of a run further, with a teacher or without."""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import (
    BANDS,
    assert_equal,
    changed,
    execute,
    job,
    losses,
    metrics,
    quick_compiles,
    saved_state,
    setup,
    signal_at,
    start,
)

from pcagpt import trees
from pcagpt.config import Settings, base, validate
from pcagpt.config.schema import DistillSettings
from pcagpt.errors import Interrupted, UserError
from pcagpt.json_files import write_json
from pcagpt.pipeline.plan import make_plan
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run import checkpoint, folder
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")


def write_run(run_dir, record, weights):
    """A config.json and weights as another program might write them."""
    kept = ("model", "vocab_size", "tokenizer", "data")
    folder.write_record(run_dir, {name: record[name] for name in kept})
    checkpoint.save_weights(run_dir, weights)
    return run_dir


@pytest.fixture(scope="module")
def sources(finished_experiment, compiled, tmp_path_factory):
    """Folders of runs: D, A at rank 8, and weights of three bands in random order."""
    finished, banded = Path(finished_experiment.workdir), tmp_path_factory.mktemp("r")
    config = changed(finished_experiment, task="train", arm="random", **BANDS)
    with quick_compiles(compiled):
        state, _ = start(setup(config), banded / "not there")
    # Larger weights are worse than D, and so have something to learn from it.
    weights = jax.tree.map(lambda leaf: 3 * np.asarray(leaf), state.variables)
    order = np.random.default_rng(0).permutation(97).astype(np.int32)
    weights["constants"] = {"embed": {"position_of_token": order}}
    known = {"vocab_size": 97, "tokenizer": None}
    record = Settings.of(config).to_dict() | known
    return {
        "gpt_baseline": finished / "gpt_baseline",
        "gpt_pca_k8": finished / "gpt_pca_k8",
        "banded": write_run(banded / "banded", record, weights),
    }


@pytest.fixture
def recover(tiny_config):
    """A function: the config that trains a run further; the model is left open."""

    def config(source, **overrides):
        copy = base()
        for section in ("train", "data", "evaluate", "checkpoint", "telemetry"):
            copy[section] = tiny_config[section]
        copy.workdir, copy.mesh.data = tiny_config.workdir, 1
        copy.finetune.steps_share = 0.5
        copy.arm = "pca_finetune"
        copy.init.weights_from = str(source)
        return changed(copy, **overrides)

    return config


def refusal(config):
    """The one line with which a plan is not made or not carried out."""
    with pytest.raises(UserError) as caught:
        execute(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.workdir).exists()
    return str(caught.value)


def elsewhere(source, run_dir, **model):
    """A copy of a run's weights, with some model knobs in its record changed."""
    run = Run.open(source)
    record = run.record | {"model": run.record["model"] | model}
    return write_run(run_dir, record, run.weights)


# Where it starts


@pytest.mark.parametrize("name", ["gpt_baseline", "gpt_pca_k8/ckpt/3", "banded"])
def test_all_weights_the_token_order_and_the_loss_are_those_of_the_source_run(
    name, sources, recover
):
    source, *below = name.split("/")
    path = sources[source].joinpath(*below)
    made = setup(recover(path))
    state, _ = start(made, Path(made.settings.workdir) / "run")
    found = trees.flatten(jax.tree.map(np.asarray, state.variables))
    # The banded run has an order of its own, not that of the corpus's counts.
    assert_equal(found, trees.flatten(Run.open(path).weights))
    assert ("constants/embed/position_of_token" in found) == (source == "banded")
    if name == "gpt_baseline":
        loss = made.validation(state.variables).metrics["loss"]
        assert loss == folder.read_result(path)["val_loss"]


def test_the_source_run_sets_the_model_and_finetune_sets_the_budget(sources, recover):
    config = recover(sources["banded"], **{"model.dropout": 0.1, "train.steps": 20})
    further = job(config)
    assert further.folder.name == "gpt_pca_finetune_from_banded"
    assert further.status().words == "to do"
    model, train = further.settings.model, further.settings.train
    assert model.band_sizes == BANDS["model.band_sizes"]
    assert model.band_ranks == BANDS["model.band_ranks"]
    assert (model.n_embd, model.n_layer, model.vocab_size) == (32, 1, 97)
    assert model.dropout == 0.1
    assert (train.steps, train.warmup_steps) == (10, 1)
    assert train.learning_rate == pytest.approx(3e-4)
    further = job(recover(sources["gpt_baseline"]))
    assert further.folder.name == "gpt_continued_from_gpt_baseline"
    assert further.settings.train.steps == 3
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize("asked", ["baseline", "continued", "pca_finetune"])
def test_the_source_run_and_the_teacher_set_the_arm(asked, sources, recover):
    def arm(source, **overrides):
        return job(recover(sources[source], arm=asked, **overrides)).settings.arm

    assert arm("gpt_baseline") == "continued"
    assert arm("banded") == "pca_finetune"
    teacher = {"distill.teacher": str(sources["gpt_baseline"])}
    assert arm("banded", **teacher) == "pca_distill"


def test_weights_made_elsewhere_are_trained_and_identified_by_their_hash(
    sources, recover, tmp_path
):
    source = elsewhere(sources["banded"], tmp_path / "best")
    run_dir = execute(recover(source, **{"train.learning_rate": 0.01}))
    assert run_dir.name == "gpt_pca_finetune_from_best"
    result = folder.read_result(run_dir)
    assert (result["arm"], result["steps"]) == ("pca_finetune", 3)
    assert result["band_ranks"] == [0, 8, 4]
    assert result["val_loss"] < metrics(run_dir)[0]["loss"]
    (tmp_path / "moved").mkdir()
    moved = source.rename(tmp_path / "moved" / "best")
    again = recover(moved, **{"train.learning_rate": 0.01})
    assert job(again).status().words == "done"
    # The same numbers, saved again, are the same start; others are not.
    weights = Run.open(moved).weights
    shutil.rmtree(moved / "ckpt")
    checkpoint.save_weights(moved, weights)
    assert job(again).status().words == "done"
    weights["params"]["wpe"] = weights["params"]["wpe"] + 1
    shutil.rmtree(moved / "ckpt")
    checkpoint.save_weights(moved, weights)
    with pytest.raises(
        UserError,
        match=r"is another model than the one that .* "
        r"started from: imported_sha256\.weights_from \(was",
    ):
        job(again).status()


def test_another_start_of_the_same_name_is_named_with_the_one_of_the_run(
    sources, recover, tmp_path
):
    source = elsewhere(sources["banded"], tmp_path / "best")
    execute(recover(source))
    (tmp_path / "other").mkdir()
    other = elsewhere(sources["banded"], tmp_path / "other" / "best")
    weights = Run.open(other).weights
    weights["params"]["wpe"] = weights["params"]["wpe"] + 1
    shutil.rmtree(other / "ckpt")
    checkpoint.save_weights(other, weights)
    with pytest.raises(UserError) as caught:
        job(recover(other)).status()
    assert str(caught.value).startswith(f"{other} is another model than the one that ")
    assert f" started from (that one is {source}): imported_sha256" in str(caught.value)


def test_a_start_that_is_removed_while_it_is_checked_is_named(
    sources, recover, tmp_path, monkeypatch
):
    source = elsewhere(sources["banded"], tmp_path / "best")
    check = TrainJob.check

    def remove(self, missing):
        shutil.rmtree(source)
        return check(self, missing)

    monkeypatch.setattr(TrainJob, "check", remove)
    assert refusal(recover(source)).startswith(
        f"{source} was removed while this command ran: restore it, or run the same"
    )


def test_a_start_that_was_moved_aside_is_named(sources, recover, tmp_path, capsys):
    source = elsewhere(sources["banded"], tmp_path / "best")
    config = recover(source)
    execute(config)
    folder.move_aside(source)
    (kept,) = tmp_path.glob("best.replaced-*")
    elsewhere(sources["banded"], source)
    weights = Run.open(source).weights
    weights["params"]["wpe"] = weights["params"]["wpe"] + 1
    shutil.rmtree(source / "ckpt")
    checkpoint.save_weights(source, weights)
    named = rf"started from \(that one is {kept}\): imported_sha256"
    with pytest.raises(UserError, match=named):
        job(config).status()


# With a teacher


@pytest.fixture
def distilled(sources, recover):
    """A banded model that learns from D's predictions and from the text."""
    return recover(
        sources["banded"],
        **{"distill.teacher": str(sources["gpt_baseline"]), "distill.share": 0.5},
        **{"train.steps": 12, "train.learning_rate": 0.01},
    )


def test_a_distilled_run_learns_from_its_teacher_and_resumes_bit_identical(
    distilled, tmp_path
):
    run_dir = execute(distilled)
    lines = [line for line in metrics(run_dir) if line["split"] == "train"]
    for line in lines:
        mean = (line["kl"] + line["cross_entropy"]) / 2
        assert line["loss"] == pytest.approx(mean, rel=1e-6)
    assert 0 < lines[-1]["kl"] < lines[0]["kl"]
    stopped = changed(distilled, workdir=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 1, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped at step 2 of 6, saved"):
            execute(stopped)
    assert job(stopped).status().words == "resumes at step 2"
    found = execute(stopped)
    assert_equal(saved_state(found), saved_state(run_dir))
    assert metrics(found) == metrics(run_dir)


@pytest.mark.slow
def test_devices_do_not_change_what_is_learnt_from_a_teacher(distilled):
    wanted = losses(distilled, 2)
    shutil.rmtree(distilled.workdir)
    on_eight = changed(distilled, **{"mesh.data": 2, "mesh.fsdp": 4})
    assert losses(on_eight, 2) == pytest.approx(wanted, rel=1e-5)


def test_another_teacher_or_share_is_another_run(distilled, sources):
    run = job(distilled)
    folder.write_record(run.folder, run.record())
    write_json(run.folder / "result.json", {"status": "done"})
    checkpoint.save_weights(
        run.folder, {"params": {"wpe": np.zeros(1)}, "constants": {}}
    )
    assert run.status().words == "done"
    other = str(sources["gpt_pca_k8"])
    for override, words in (
        ({"distill.share": 1.0}, r"distill.share \(was 0.5, now 1.0\)"),
        ({"distill.teacher": other}, r"imported_sha256.teacher \(was"),
    ):
        with pytest.raises(UserError, match=words):
            job(changed(distilled, **override)).status()
    plain = job(changed(distilled, **{"distill.teacher": ""}))
    assert plain.folder.name.startswith("gpt_pca_finetune_from_")
    assert plain.status().words == "to do"


def test_the_prerequisites_of_a_distilled_run_are_not_distilled(distilled):
    pca = {"model.n_embd_wte": 8, "init.weights_from": ""}
    settings = Settings.of(changed(distilled, arm="pca", **pca))
    baseline, _, target = make_plan(settings).jobs
    assert baseline.settings.distill == DistillSettings()
    assert target.settings.distill == settings.distill


def test_a_teacher_that_does_not_fit_is_refused(distilled, sources, tmp_path):
    for number, (model, words) in enumerate(
        [
            ({"vocab_size": 100}, "but this model has 97: both must have the same"),
            ({"block_size": 8}, "8 tokens at a time, but this model reads 16: lower"),
            (None, "does not exist: give the folder of a run"),
        ]
    ):
        copy = tmp_path / str(number)
        if model:
            elsewhere(sources["gpt_baseline"], copy, **model)
            record = folder.read_record(copy)
            known = record["model"]["vocab_size"] or record["vocab_size"]
            folder.write_record(copy, record | {"vocab_size": known})
        message = refusal(changed(distilled, **{"distill.teacher": str(copy)}))
        assert words in message


def test_an_experiment_starts_from_no_run_and_has_no_teacher(tiny_config):
    for knob in ("distill.teacher", "init.weights_from"):
        config = changed(tiny_config, task="experiment", **{knob: "x"})
        with pytest.raises(UserError, match=rf"{knob} is set"):
            validate(Settings.of(config))


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
def test_settings_that_contradict_the_run_are_refused(
    override, words, sources, recover
):
    message = refusal(recover(sources["gpt_pca_k8"], **override))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("", "does not exist: give the folder of a run"),
        ("ckpt", "holds no finished checkpoint"),
        ("config.json", "has no config.json: it is not a run's folder"),
        ("ckpt/0/weights", "can be read"),
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
    message = refusal(recover(source))
    assert message.startswith("init.weights_from: ")
    assert words in message
    assert message.endswith("or correct the path") == (lost == "")


@pytest.mark.parametrize("position", [-7, 0, 97])
def test_an_order_that_gives_two_tokens_one_row_is_refused(position, sources, tmp_path):
    run = Run.open(sources["banded"])
    order = run.weights["constants"]["embed"]["position_of_token"]
    order[np.flatnonzero(order != position)[0]] = position
    source = write_run(tmp_path / "wrong", run.record, run.weights)
    with pytest.raises(UserError, match="position_of_token is no permutation"):
        _ = Run.open(source).weights


def test_weights_of_another_model_than_the_config_says_are_refused(
    sources, recover, tmp_path
):
    for number, (model, words) in enumerate(
        [
            ({"n_layer": 2}, "lacks 'params/block_1/"),
            ({"bias": False}, "which this model does not have"),
            ({"n_embd_wte": 4}, "has shape (8, 32), but this model needs (4, 32)"),
        ]
    ):
        source = elsewhere(sources["gpt_pca_k8"], tmp_path / str(number), **model)
        assert words in refusal(recover(source))


def test_tokens_of_another_tokenizer_are_refused(sources, recover, tmp_path):
    source = elsewhere(sources["gpt_pca_k8"], tmp_path / "best")
    known = {"tokenizer": "gpt2", "vocab_size": 5000}
    folder.write_record(source, folder.read_record(source) | known)
    config = recover(source)
    corpus = Path(shutil.copytree(config.data.source, tmp_path / "corpus"))
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    (corpus / "meta.json").write_text(json.dumps(meta))
    message = refusal(changed(config, **{"data.source": str(corpus)}))
    assert "has tokens of sotu4096" in message
    assert "knows those of gpt2" in message
