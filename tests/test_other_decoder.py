"""Models of other architectures, as far as no PyTorch is needed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIGS, refusal
from safetensors.numpy import save_file

from pcagpt.errors import UserError
from pcagpt.run import foreign, other_decoder
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
    run = Run.open(llama, any_architecture=True)
    assert run.architecture == "LlamaForCausalLM"
    assert (run.step, run.record["vocab_size"]) == (foreign.STEP, 97)


def test_a_config_that_vanishes_meanwhile_is_one_line(llama):
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match="llama lost its config.json: restore it"):
        other_decoder.record_of(llama)


def test_other_weights_give_another_fingerprint(llama):
    first = Run.open(llama, any_architecture=True).fingerprint
    table = np.zeros((97, 24), np.float32)
    save_file({"model.embed_tokens.weight": table}, llama / "model.safetensors")
    assert Run.open(llama, any_architecture=True).fingerprint != first


@pytest.mark.parametrize(
    ("config", "knobs"),
    [
        ("evaluate.py", {}),
        ("factorize.py", {"ranks": 4, "factorize.method": "context"}),
        ("export.py", {}),
        ("pca_finetune_k128.py", {"model.n_embd_wte": 4}),
        ("pca_k128.py", {"model.n_embd_wte": 4}),
    ],
)
@pytest.mark.parametrize("words", [[], ["--print_config"]])
def test_a_task_that_cannot_compute_the_model_says_so_before_it_tokenizes(
    config, knobs, words, llama, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for split in ("train", "val"):
        Path(f"text/{split}.txt").write_text("one two three\n" * 40)
    knobs = {"model_path": llama, "workdir": tmp_path / "runs"} | knobs
    knobs |= {} if config == "export.py" else {"data.source": "text"}
    words = [*words, *(f"--config.{name}={value}" for name, value in knobs.items())]
    line = refusal(f"--config={CONFIGS / config}", *words, unchanged=[llama])
    assert "holds a LlamaForCausalLM" in line
    assert line.rstrip().endswith(
        "llama holds a LlamaForCausalLM: only `compress` takes it; `export` takes the "
        "compressed tables that `compress` wrote"
    )
    assert not list(tmp_path.rglob("*.bin"))


def test_its_size_gives_it_no_tokenizer(tmp_path):
    folder = tmp_path / "olmo"
    folder.mkdir()
    table = np.zeros((50304, 2), np.float32)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    sizes = {"vocab_size": 50304, "hidden_size": 2, "model_type": "olmo"}
    (folder / "config.json").write_text(json.dumps(sizes))
    assert Run.open(folder, any_architecture=True).record["tokenizer"] is None


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_compress_says_which_package_is_missing(
    package, llama, corpus_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("decoder", "open_decoder"):
        name = f"pcagpt.compression.{module}"
        monkeypatch.delitem(sys.modules, name, raising=False)
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


def test_a_model_that_predicts_no_tokens_is_refused(llama, corpus_folder, tmp_path):
    named = {"architectures": ["LlamaForSequenceClassification"]}
    (llama / "config.json").write_text(json.dumps(LLAMA | named))
    knobs = {"data.source": corpus_folder, "ranks": 4}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert "holds a LlamaForSequenceClassification, which predicts no tokens" in line


@pytest.mark.parametrize("place", [None, "text_config"])
@pytest.mark.parametrize("name", ["is_encoder_decoder", "add_cross_attention"])
def test_a_decoder_that_reads_an_encoder_is_refused(
    name, place, llama, corpus_folder, tmp_path
):
    config = LLAMA | {name: True}
    config = LLAMA | {place: config} if place else config
    (llama / "config.json").write_text(json.dumps(config))
    knobs = {"data.source": corpus_folder, "ranks": 4}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert f"{name} in config.json says that each token also reads" in line


def test_sizes_of_its_own_are_not_set_by_knobs(llama, corpus_folder, tmp_path):
    knobs = {"data.source": corpus_folder, "ranks": 4, "model.n_layer": 2}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert "holds a LlamaForCausalLM with settings of its own: leave it out" in line


def test_an_adapter_that_transformers_would_add_is_refused(llama):
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers adds this adapter"):
        Run.open(llama, any_architecture=True)


@pytest.mark.parametrize("field", ["architectures", "text_config"])
def test_odd_fields_of_a_config_are_no_traceback(field, llama):
    (llama / "config.json").write_text(json.dumps(LLAMA | {field: 7}))
    assert Run.open(llama, any_architecture=True).record["vocab_size"] == 97


def test_a_table_may_be_narrower_than_the_layers(llama):
    config = LLAMA | {"hidden_size": 48, "word_embed_proj_dim": 24}
    (llama / "config.json").write_text(json.dumps(config))
    assert other_decoder.record_of(llama)["model"]["n_embd"] == 24


def test_a_folder_without_weights_is_refused(llama, corpus_folder, tmp_path):
    (llama / "model.safetensors").unlink()
    knobs = {"data.source": corpus_folder, "ranks": 4}
    line = ask("compress.py", llama, tmp_path / "runs", **knobs)
    assert "has a config.json, but no model.safetensors" in line
