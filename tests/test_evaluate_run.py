"""Evaluating a trained run on any split of any corpus its tokens fit."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import changed, snapshot

from pcagpt.errors import UserError
from pcagpt.pipeline.evaluate_task import evaluate_run

pytestmark = pytest.mark.usefixtures("quick")

RUNS = ("gpt_baseline", "gpt_pca_k8", "gpt_pca_finetune_k8")


@pytest.fixture
def asked(finished_experiment, tmp_path):
    """A function: the config that evaluates a copy of a finished run."""

    def ask(run, below="", **overrides):
        copy = tmp_path / "runs" / run
        if not copy.exists():
            shutil.copytree(Path(finished_experiment.workdir) / run, copy)
        config = changed(
            finished_experiment,
            task="evaluate",
            workdir=str(tmp_path / "runs"),
            model_path=str(copy / below),
            **{"data.source": ""},
        )
        return changed(config, **overrides)

    return ask


def write_corpus(folder, tokens, vocab_size):
    """A folder of token files with one split only."""
    folder.mkdir()
    tokens.astype(np.uint16).tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return str(folder)


@pytest.mark.parametrize("run", RUNS)
def test_on_the_validation_split_it_is_the_loss_of_the_run_s_result(
    run, asked, finished_experiment
):
    found = evaluate_run(asked(run))
    result = Path(finished_experiment.workdir) / run / "result.json"
    wanted = json.loads(result.read_text())
    assert found["loss"] == wanted["val_loss"]
    for name in ("perplexity", "ln_f_cosine", "ln_f_cosine_p05", "ln_f_cosine_d"):
        assert found[name] == wanted[name]
    same = found["protocol"].keys() & wanted["protocol"].keys()
    assert {"split", "window", "stride", "windows", "tokenizer"} <= same
    assert all(found["protocol"][name] == wanted["protocol"][name] for name in same)
    assert found["tokens_predicted"] == wanted["protocol"]["tokens_predicted"]


def test_batch_and_devices_do_not_change_the_loss(asked):
    wanted = evaluate_run(asked("gpt_pca_k8"))["loss"]
    other = {"evaluate.batch_size": 32, "mesh.data": 2, "mesh.fsdp": 2}
    found = evaluate_run(asked("gpt_pca_k8", **other))["loss"]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_test_split_is_another_text(asked):
    found = evaluate_run(asked("gpt_baseline", split="test"))
    assert found["protocol"]["split"] == "test"
    assert found["tokens_predicted"] == 900
    assert found["loss"] != evaluate_run(asked("gpt_baseline"))["loss"]


def test_an_earlier_checkpoint_is_evaluated(asked, finished_experiment):
    found = evaluate_run(asked("gpt_baseline", "ckpt/3"))
    assert found["step"] == 3
    metrics = Path(finished_experiment.workdir) / "gpt_baseline" / "metrics.jsonl"
    lines = map(json.loads, metrics.read_text().splitlines())
    (logged,) = (x for x in lines if (x["step"], x["split"]) == (3, "val"))
    assert found["loss"] == logged["loss"]


def test_a_step_0_model_knows_next_to_nothing(asked):
    found = evaluate_run(asked("gpt_baseline", "ckpt/0"))
    assert found["loss"] == pytest.approx(math.log(97), abs=0.05)


def test_another_corpus_of_known_tokens_is_evaluated(asked, tmp_path):
    source = write_corpus(tmp_path / "other", np.arange(400) % 50, vocab_size=50)
    found = evaluate_run(asked("gpt_baseline", **{"data.source": source}))
    assert found["protocol"]["corpus"] == "other"
    assert found["tokens_predicted"] == 399
    assert math.isfinite(found["loss"])


def test_a_corpus_of_more_tokens_than_the_model_knows_is_refused(asked, tmp_path):
    source = write_corpus(tmp_path / "wide", np.arange(400) % 98, vocab_size=98)
    config = asked("gpt_baseline", **{"data.source": source})
    before = snapshot(tmp_path / "runs")
    with pytest.raises(
        UserError, match="ids up to 97, the model .* 97 tokens"
    ) as error:
        evaluate_run(config)
    assert "\n" not in str(error.value)
    assert snapshot(tmp_path / "runs") == before


def test_tokens_of_another_tokenizer_are_refused(asked, tmp_path):
    config = asked("gpt_baseline")
    path = Path(config.model_path) / "config.json"
    trained = json.loads(path.read_text()) | {"tokenizer": "gpt2", "vocab_size": 5000}
    path.write_text(json.dumps(trained))
    source = Path(write_corpus(tmp_path / "sotu", np.arange(90), vocab_size=4096))
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    (source / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="in tokens of sotu4096, .* those of gpt2"):
        evaluate_run(changed(config, **{"data.source": str(source)}))


def test_the_result_is_written_beside_the_run_by_corpus_split_and_step(asked, tmp_path):
    source = write_corpus(tmp_path / "other", np.arange(400) % 50, vocab_size=50)
    results = [
        evaluate_run(asked("gpt_baseline")),
        evaluate_run(asked("gpt_baseline", "ckpt/3", split="test")),
        evaluate_run(asked("gpt_baseline", **{"data.source": source})),
    ]
    written = sorted((tmp_path / "runs" / "gpt_baseline").glob("evaluation_*.json"))
    name = results[0]["protocol"]["corpus"]
    assert [path.name for path in written] == sorted(
        [
            f"evaluation_{name}_val_step6.json",
            f"evaluation_{name}_test_step3.json",
            "evaluation_other_val_step6.json",
        ]
    )
    found = [json.loads(path.read_text()) for path in written]
    assert sorted(x["loss"] for x in found) == sorted(x["loss"] for x in results)
    assert all(x["run"] == "gpt_baseline" for x in found)


def test_a_missing_split_names_those_there_are(asked, tmp_path):
    source = write_corpus(tmp_path / "other", np.arange(400) % 50, vocab_size=50)
    config = asked("gpt_baseline", split="test", **{"data.source": source})
    with pytest.raises(UserError, match="no 'test' split .*present: val"):
        evaluate_run(config)


def test_a_model_of_more_tokens_than_its_corpus_can_be_given_them(
    asked, finished_experiment, tmp_path
):
    """model.vocab_size, not the training corpus, says what a model knows."""
    config = asked("gpt_baseline")
    path = Path(config.model_path) / "config.json"
    trained = json.loads(path.read_text())
    trained["model"]["vocab_size"] = trained["vocab_size"] = 120
    path.write_text(json.dumps(trained))
    source = write_corpus(tmp_path / "wide", np.arange(400) % 110, vocab_size=110)
    found = evaluate_run(changed(config, **{"data.source": source}))
    assert math.isfinite(found["loss"])


@pytest.mark.parametrize(
    "override",
    [{"model.n_layer": 2}, {"model.band_sizes": (90, 7)}, {"model.dropout": 0.5}],
)
def test_a_model_knob_that_contradicts_the_run_is_refused(override, asked, tmp_path):
    config = asked("gpt_pca_k8", **override)
    before = snapshot(tmp_path / "runs")
    with pytest.raises(UserError, match=f"{next(iter(override))} is .* trained with"):
        evaluate_run(config)
    assert snapshot(tmp_path / "runs") == before


def test_the_compute_dtype_is_that_of_the_command(asked):
    exact = evaluate_run(asked("gpt_baseline"))["loss"]
    rounded = evaluate_run(asked("gpt_baseline", **{"model.compute_dtype": "bfloat16"}))
    assert 0 < abs(rounded["loss"] - exact) < 0.01
