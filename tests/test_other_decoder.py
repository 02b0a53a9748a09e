"""Models of other architectures, as far as no PyTorch is needed."""

import json
import sys

import numpy as np
import pytest
from command_line import CONFIGS, refusal
from safetensors.numpy import save_file

from pcagpt.run import foreign
from pcagpt.run.trained import Run

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
}


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    table = np.random.default_rng(0).normal(size=(97, 24)).astype(np.float32)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def ask(config, folder, workdir, **knobs):
    words = {"model_path": folder, "workdir": workdir} | knobs
    overrides = [f"--config.{name}={value}" for name, value in words.items()]
    line = refusal(f"--config={CONFIGS / config}", *overrides, unchanged=[folder])
    assert not (workdir / "compressed").exists()
    return line


def test_a_decoder_is_a_run_with_a_vocabulary_and_an_architecture(llama):
    run = Run.open(llama)
    assert run.architecture == "LlamaForCausalLM"
    assert (run.step, run.record["vocab_size"]) == (foreign.STEP, 97)


def test_other_weights_give_another_fingerprint(llama):
    first = Run.open(llama).fingerprint
    table = np.zeros((97, 24), np.float32)
    save_file({"model.embed_tokens.weight": table}, llama / "model.safetensors")
    assert Run.open(llama).fingerprint != first


@pytest.mark.parametrize(
    ("config", "knobs"), [("evaluate.py", {}), ("factorize.py", {"ranks": 4})]
)
def test_a_task_that_cannot_compute_the_model_names_the_one_that_can(
    config, knobs, llama, corpus_folder, tmp_path
):
    knobs = knobs | {"data.source": corpus_folder}
    line = ask(config, llama, tmp_path / "runs", **knobs)
    assert "holds a LlamaForCausalLM" in line
    assert "only --config=configs/compress.py takes one" in line


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_compress_says_which_package_is_missing(
    package, llama, corpus_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pcagpt.compress.decoder", raising=False)
    knobs = {"data.source": corpus_folder, "ranks": 4, "mesh.data": 1}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert f"needs the package {package}: pip install 'pcagpt[hf]'" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size of a language model"),
        ({"vocab_size": "many"}, "config.json has no vocab_size of a language model"),
    ],
)
def test_a_config_without_sizes_is_refused(
    changes, words, llama, corpus_folder, tmp_path
):
    (llama / "config.json").write_text(json.dumps(LLAMA | changes))
    knobs = {"data.source": corpus_folder, "ranks": 4}
    assert words in ask("compress.py", llama, tmp_path / "runs", **knobs)


def test_sizes_of_its_own_are_not_set_by_knobs(llama, corpus_folder, tmp_path):
    knobs = {"data.source": corpus_folder, "ranks": 4, "model.n_layer": 2}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert "holds a LlamaForCausalLM with sizes of its own: leave it out" in line


@pytest.mark.parametrize("field", ["architectures", "text_config"])
def test_odd_fields_of_a_config_are_no_traceback(field, llama):
    (llama / "config.json").write_text(json.dumps(LLAMA | {field: 7}))
    assert Run.open(llama).record["vocab_size"] == 97


def test_a_folder_without_weights_is_refused(llama, corpus_folder, tmp_path):
    (llama / "model.safetensors").unlink()
    knobs = {"data.source": corpus_folder, "ranks": 4}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert "has a config.json, but no model.safetensors" in line
