"""The dequantized values of a GGUF file are a model that `compress` takes."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra hf: torch, transformers, gguf")
pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("gguf", reason="needs the extra hf")

import gguf_files
import tokenizer_folders
import tokenizers
import torch
import transformers
from command_line import CONFIGS, THEIR_SIZES, call, refusal, tiny
from runs import snapshot
from test_export import run_export, write_run
from tokenizer_folders import HARD_TEXT, TEXT
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from pcagpt.compression import open_decoder
from pcagpt.compression.decoder import Decoder
from pcagpt.data import (
    file_tokenizer,
    gguf_header,
    gguf_tokenizer,
    hugging_face_tokenizer,
    tokenizer_files,
    vocabulary,
)
from pcagpt.errors import UserError
from pcagpt.run import fingerprint, foreign
from pcagpt.run.trained import Run


@pytest.fixture(scope="module")
def byte_level(shared):
    return shared("byte_level", tokenizer_folders.byte_level) / "whole/tokenizer.json"


@pytest.fixture
def file(byte_level, tmp_path):
    """A GGUF file, beside another one."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    gguf_files.write(folder / "small.gguf", byte_level)
    shutil.copy(folder / "small.gguf", folder / "other.gguf")
    return folder / "small.gguf"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a text."""
    (tmp_path / "place/text").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"place/text/{split}.txt").write_text(TEXT * 40)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def asked(model, **knobs):
    compress = {"methods": "svd,coded", "bands": 1, "bits": 8}
    compress["calibration_tokens"] = 256
    knobs = {"compress": compress, "model": THEIR_SIZES, "ranks": 16} | knobs
    return tiny("compress.py", "text", model_path=model, **knobs)


def test_a_file_is_a_run_with_its_dequantized_table(file, byte_level, tmp_path):
    arrays = gguf_files.write(tmp_path / "same.gguf", byte_level)
    run = Run.open(file, any_architecture=True)
    table = arrays["token_embd.weight"]
    assert (run.folder, run.architecture) == (file, "llama in GGUF")
    assert (run.record["vocab_size"], run.step) == (len(table), 0)
    assert set(run.record["stored_as"]) == {"Q8_0", "F32"}
    run.check_unchanged()
    np.testing.assert_array_equal(Decoder(file, 16).table_VD, table)
    folder = tmp_path / "alone"
    folder.mkdir()
    alone = shutil.copy(file, folder / "small.gguf")
    for path in (folder, alone):
        assert Run.open(path, any_architecture=True).folder == alone
    assert fingerprint.of(folder) == fingerprint.of(file)
    gguf_files.write(alone, byte_level, quantized=False)
    assert fingerprint.of(folder) != fingerprint.of(file)


def test_a_config_beside_the_only_file_is_not_a_model(file, byte_level, tmp_path):
    """Its folder is the model as soon as it has weights, be they pickles."""
    folder = file.parent
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has 2 GGUF files: name one, such as"):
        Run.open(folder, any_architecture=True)
    (folder / "other.gguf").unlink()
    run = Run.open(folder, any_architecture=True)
    assert (run.folder, run.architecture) == (file, "llama in GGUF")
    arrays = gguf_files.write(tmp_path / "same.gguf", byte_level)
    found = Decoder(run.folder, 16).table_VD
    np.testing.assert_array_equal(found, arrays["token_embd.weight"])
    for name in ("model.safetensors", "pytorch_model-00001-of-00002.bin"):
        (folder / name).write_bytes(b"weights")
        assert foreign.place_of(folder) == folder
        (folder / name).unlink()


def test_its_tokenizer_gives_the_same_ids_and_is_known_by_its_fields(
    file, byte_level, tmp_path
):
    ours, theirs = (vocabulary.load(str(path)) for path in (file, byte_level))
    for text in (TEXT, HARD_TEXT, "one<|endoftext|>two"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.n_vocab, ours.eot_token) == (theirs.n_vocab, theirs.eot_token)
    run = Run.open(file, any_architecture=True)
    assert run.record["tokenizer"] == str(file)
    kept = run.record["generation"]["generation_config.json"]
    assert kept == {"eos_token_id": ours.eot_token}
    gguf_files.write(tmp_path / "finer.gguf", byte_level, quantized=False)
    described = vocabulary.describe(str(tmp_path / "finer.gguf"))
    assert described == vocabulary.describe(str(file))
    assert described.vocab_size == ours.n_vocab
    # transformers prefers what lies beside the file.
    other = Tokenizer.from_file(str(byte_level))
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "beside").mkdir()
    other.save(str(tmp_path / "beside/tokenizer.json"))
    again = vocabulary.load(str(shutil.copy(file, tmp_path / "beside")))
    assert again.encode(HARD_TEXT) == ours.encode(HARD_TEXT)


def with_own_merge_lost(byte_level, path):
    """A tokenizer.json in which merges no longer make one token; also its text."""
    content = json.loads(byte_level.read_text())
    *_, lost = content["model"]["merges"]
    content["model"]["merges"].remove(lost)
    path.write_text(json.dumps(content))
    return path, "".join(lost).replace("Ġ", " ")


# How llama.cpp cuts a text for Llama 3.
OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_its_text_is_cut_as_it_names_it(byte_level, tmp_path):
    own, text = with_own_merge_lost(byte_level, tmp_path / "tokenizer.json")
    of_gpt2 = Tokenizer.from_file(str(own))
    of_llama = Tokenizer.from_file(str(own))
    split = pre_tokenizers.Split(tokenizers.Regex(OF_LLAMA_3), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_llama.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    of_llama.model.ignore_merges = True
    cuts = {"gpt-2": of_gpt2, "olmo": of_gpt2, "llama-bpe": of_llama}
    for pre, wanted in cuts.items():
        path = tmp_path / f"{pre}.gguf"
        gguf_files.write(path, own, says={"pre": pre, "add_space_prefix": False})
        found = vocabulary.load(str(path))
        for one in (TEXT, HARD_TEXT, text, "17901790\n\n"):
            assert found.encode(one) == wanted.encode(one).ids, (pre, one)
            assert found.decode(found.encode(one)) == one
        # Tokens that were made before would be taken for these.
        fields = gguf_header.tokenizer_fields(path)
        is_same = vocabulary.describe(str(path)).sha256 == fields.sha256
        assert is_same == (wanted is of_gpt2)
    for one in (text, "17901790"):
        assert of_gpt2.encode(one).ids != of_llama.encode(one).ids


def test_a_name_of_gpt_2s_cut_is_obeyed_whatever_transformers_makes_of_it(
    byte_level, tmp_path, monkeypatch
):
    """Older versions cut as the architecture does."""
    other, wanted = (Tokenizer.from_file(str(byte_level)) for _ in range(2))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    monkeypatch.setattr(gguf_tokenizer, "_made", lambda _: other)
    gguf_files.write(tmp_path / "own.gguf", byte_level)
    found = vocabulary.load(str(tmp_path / "own.gguf"))
    assert found.encode(HARD_TEXT) == wanted.encode(HARD_TEXT).ids


@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_space_before_a_text_is_put_or_not_as_it_says(prefix, tmp_path):
    tokenizer_folders.byte_fallback(tmp_path)
    theirs = tmp_path / "tokenizer.json"
    path = tmp_path / "own.gguf"
    gguf_files.write_sentencepiece(path, theirs, {"add_space_prefix": prefix})
    wanted, found = Tokenizer.from_file(str(theirs)), vocabulary.load(str(path))
    texts = ["the people", TEXT, "日本  the\n\n the "]
    if prefix is False:
        wanted.normalizer = normalizers.Replace(" ", "▁")
        texts += [" the", "  the"]
    for text in texts:
        assert found.encode(text) == wanted.encode(text).ids
        assert found.decode(found.encode(text)) == text
    fields = gguf_header.tokenizer_fields(path)
    is_same = vocabulary.describe(str(path)).sha256 == fields.sha256
    assert is_same == (prefix is not False)


def test_a_space_that_gemma_would_not_put_is_refused(tmp_path):
    tokenizer_folders.byte_fallback(tmp_path)
    path = tmp_path / "own.gguf"
    for prefix in (None, False, True):
        says = {"add_space_prefix": prefix}
        gguf_files.write_sentencepiece(
            path, tmp_path / "tokenizer.json", says, architecture="gemma2"
        )
        if not prefix:
            assert len(vocabulary.load(str(path)).encode("the")) == 2  # "th", "e"
            # It is as transformers makes it, as in earlier versions.
            own = gguf_header.tokenizer_fields(path).sha256
            assert vocabulary.describe(str(path)).sha256 == own
    with pytest.raises(UserError, match=r"add_space_prefix is True\): name the"):
        vocabulary.load(str(path))


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The tokenizer.json of a tokenizer of the package."""
    folder = tmp_path_factory.mktemp("packaged")
    hugging_face_tokenizer.write(folder, "sotu4096", 16)
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("extra", "is_same"),
    [
        ({}, True),
        ({"lacks": "tokenizer.ggml.token_type"}, True),
        ({"types": {"<|endoftext|>": 4}}, True),
        ({"says": {"add_bos_token": True, "add_space_prefix": False}}, True),
        ({"types": {"ing": 4}}, False),
        ({"types": {"ing": 3}}, False),
        ({"types": {"ing": 2}}, False),
        ({"says": {"pre": "olmo"}}, False),
        ({"says": {"add_space_prefix": True}}, False),
        ({"says": {"remove_extra_whitespaces": True}}, False),
        ({"says": {"normalizer.lowercase": True}}, False),
    ],
)
def test_only_a_file_that_makes_its_tokens_has_the_name_of_a_packaged_tokenizer(
    extra, is_same, packaged, tmp_path
):
    path = tmp_path / "own.gguf"
    gguf_files.write(path, packaged, **extra)
    assert vocabulary.name_of(str(path)) == ("sotu4096" if is_same else str(path))


@pytest.mark.parametrize("types", [3, True, "list"])
def test_types_of_tokens_that_are_no_list_are_not_gpt_2s(types, packaged, tmp_path):
    gguf_files.write(tmp_path / "own.gguf", packaged)
    fields = gguf_header.tokenizer_fields(tmp_path / "own.gguf")
    assert gguf_tokenizer.is_gpt2s_kind(fields)
    others = fields.others | {"token_type": types}
    assert not gguf_tokenizer.is_gpt2s_kind(fields._replace(others=others))


def test_a_token_of_ones_own_is_found_before_a_text_is_cut(packaged, tmp_path):
    gguf_files.write(tmp_path / "own.gguf", packaged, types={"ing": 4})
    found = vocabulary.load(str(tmp_path / "own.gguf"))
    theirs = Tokenizer.from_file(str(packaged))
    own = theirs.token_to_id("ing")
    wanted = theirs.encode(" be").ids + [own] + theirs.encode("s").ids
    assert found.encode(" beings") == wanted != theirs.encode(" beings").ids


def test_an_export_has_the_tokenizer_but_not_the_model_of_a_file(file, tmp_path):
    import transformers

    ours = vocabulary.load(str(file))
    run = write_run(tmp_path / "run", vocab_size=ours.n_vocab)
    named = f"--config.data.tokenizer={file}"
    made = run_export(run, tmp_path / "work", "hf", named)
    assert not list(made.glob("*.gguf"))
    found = vocabulary.load(Run.open(made).record["tokenizer"])
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    assert (found.n_vocab, found.eot_token) == (ours.n_vocab, ours.eot_token)
    assert theirs.eos_token_id == ours.eot_token
    for text in (TEXT, HARD_TEXT, "one<|endoftext|>two"):
        assert found.encode(text) == theirs.encode(text) == ours.encode(text)
        assert found.decode(ours.encode(text)) == text


def test_a_sweep_writes_tables_and_says_what_d_is(file, place):
    before = snapshot(file.parent)
    outcome = call(*asked(file))
    assert outcome.code == 0, outcome
    line = f"{file}: its values, dequantized from Q8_0, F32, are D"
    assert line in outcome.out
    folder = place / "checkpoints/compressed"
    sweep = json.loads((folder / "sweep.json").read_text())
    assert sweep["protocol"]["tokenizer"] == str(file)
    assert all(np.isfinite(row["added_loss"]) for row in sweep["rows"])
    report = (folder / "report.md").read_text()
    assert "D is what the file holds after dequantization (from Q8_0, F32)" in report
    assert (folder / "best_k16/factors").is_dir()
    texts = [sample["texts"] for sample in sweep["samples"]]
    assert [list(of) for of in texts] == 3 * [["D", "best_coded_k16", "best_k16"]]
    assert all(any(of.values()) for of in texts)
    (results,) = (place / "checkpoints/measured").iterdir()
    assert results.name.startswith("small.gguf-")
    assert snapshot(file.parent) == before
    table = folder / "best_k16"  # No command takes it.
    for config in ("sample.py", "export.py"):
        words = f"--config={CONFIGS / config}", f"--config.model_path={table}"
        line = refusal(*words, unchanged=[folder])
        assert "GGUF" in line and "configs/export.py" not in line


def test_a_file_with_an_output_table_is_untied(byte_level, place):
    gguf_files.write(place / "untied.gguf", byte_level, is_tied=False)
    outcome = call(*asked("untied.gguf"))
    assert outcome.code == 0, outcome
    for side in ("input", "output"):
        assert (place / f"checkpoints/compressed/{side}/sweep.json").exists()


# What is refused.


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"pre": "seed-coder"}, "*pre is seed-coder"),
        ({"pre": "default"}, "*pre is default"),
        ({"pre": None}, "*pre is None"),
        ({"model": "t5"}, "*model is t5"),
        ({"model": "bert"}, "*model is bert"),
        ({"model": None}, "*model is None"),
        ({"add_space_prefix": True}, "*add_space_prefix is True"),
        ({"remove_extra_whitespaces": True}, "it has *remove_extra_whitespaces"),
        ({"precompiled_charsmap": [1, 2]}, "it has *precompiled_charsmap"),
        ({"normalizer.lowercase": True}, "it has *normalizer.lowercase"),
    ],
)
def test_a_tokenizer_that_transformers_would_make_another_one_is_refused(
    says, reason, byte_level, tmp_path
):
    path = tmp_path / "odd.gguf"
    off = {"remove_extra_whitespaces": False, "add_bos_token": True}
    gguf_files.write(path, byte_level, says=off)
    vocabulary.load(str(path))
    gguf_files.write(path, byte_level, says=off | says)
    with pytest.raises(UserError) as raised:
        vocabulary.load(str(path))
    reason = reason.replace("*", gguf_header.TOKENIZER)
    assert str(raised.value) == (
        f"transformers does not make the tokenizer of {path} ({reason}): name the "
        "tokenizer.json of its model as --config.data.tokenizer"
    )


def test_a_model_with_such_a_tokenizer_is_measured_with_one_that_is_named(
    byte_level, place
):
    gguf_files.write(place / "odd.gguf", byte_level, says={"pre": "seed-coder"})
    run = Run.open(place / "odd.gguf", any_architecture=True)
    assert run.record["tokenizer"] is None
    line = refusal(*asked("odd.gguf"), unchanged=[place])
    assert (
        "odd.gguf (tokenizer.ggml.pre is seed-coder): name the tokenizer.json" in line
    )
    outcome = call(*asked("odd.gguf", data={"tokenizer": byte_level}))
    assert outcome.code == 0, outcome


def test_a_cut_that_an_older_transformers_does_not_know_is_refused(
    byte_level, tmp_path, monkeypatch
):
    mapping = pytest.importorskip("transformers.integrations.gguf").__name__
    module = importlib.import_module(f"{mapping}.gguf_tokenizer_mapping")
    path = tmp_path / "own.gguf"
    gguf_files.write(path, byte_level, says={"pre": "llama-bpe"})
    vocabulary.load(str(path))
    monkeypatch.delattr(module, "GGUF_PRE_TOKENIZER_SPLITS")
    with pytest.raises(UserError, match=r"pre is llama-bpe\): name the"):
        vocabulary.load(str(path))


def test_several_files_in_a_folder_are_refused_with_a_name(file, place):
    line = refusal(*asked(file.parent), unchanged=[file.parent, place])
    assert f"has 2 GGUF files: name one, such as {file.parent}/other.gguf" in line


def test_a_part_of_a_model_is_refused(byte_level, tmp_path, place):
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in ("a.gguf", "a-00001-of-00002.gguf"):
        path = folder / part
        gguf_files.write(path, byte_level, split_count=2)
        for named in (folder, path) if "-" in part else (path,):
            line = refusal(*asked(named), unchanged=[folder, place])
            assert f"{path} is one of several parts of a model: merge them" in line


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {"scaled": True},
            "scales its positions (llama.rope.scaling.type), which tran",
        ),
        (
            {"llama_rope_scale__linear": 4},
            "scales its positions (llama.rope.scale_linear), which tran",
        ),
        *(
            (
                {"lacks": f"llama.attention.{name}"},
                f"does not state llama.attention.{name},",
            )
            for name in ("head_count_kv", "layer_norm_rms_epsilon")
        ),
        (
            {"llama_final__logit__softcapping": 30},
            "has llama.final_logit_softcapping 30, which transformers does not read",
        ),
        (
            {"rope_freqs.weight": np.ones(4, np.float32)},
            "has tensors that transformers",
        ),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "has tensors that transform"),
        (
            {"llama_feed__forward__length": 72},
            "model.layers.0.mlp.down_proj.weight is (32, 64), but the model that "
            "transformers makes of it has (32, 72): give the folder with its model.saf",
        ),
    ],
)
def test_a_file_that_transformers_reads_in_part_is_refused(
    extra, words, byte_level, tmp_path, place
):
    gguf_files.write(tmp_path / "odd.gguf", byte_level, **extra)
    line = refusal(*asked(tmp_path / "odd.gguf"), unchanged=[place])
    assert f"{tmp_path}/odd.gguf" in line and words in line


OF_ALL = {
    "vocab_size": 300,
    "embedding_length": 32,
    "context_length": 64,
    "feed_forward_length": 48,
}
OF_ALL |= {"attention.head_count": 4, "attention.head_count_kv": 4}
WIDE_HEADS = {"attention.key_length": 16, "attention.value_length": 16}


@pytest.mark.parametrize(
    ("kind", "sizes", "fields", "words"),
    [
        (
            "qwen3",
            {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 16},
            WIDE_HEADS | {"attention.layer_norm_rms_epsilon": 1e-6},
            ": model.layers.0.self_attn.k_norm.weight is (16,), but {} has (128,)",
        ),
        (
            "gpt2",
            {"n_embd": 32, "n_head": 4, "n_positions": 64},
            {"feed_forward_length": 128, "attention.layer_norm_epsilon": 1e-5},
            ": transformer.wpe.weight is (64, 32), but {} has (1024, 32)",
        ),
        (
            "starcoder2",
            {"hidden_size": 32, "num_attention_heads": 4, "use_bias": False},
            {"attention.layer_norm_epsilon": 1e-5},
            " has no tensor model.layers.0.mlp.c_fc.bias, which {} has",
        ),
    ],
)
def test_a_header_that_transformers_reads_in_part_is_not_called_damage(
    kind, sizes, fields, words, tmp_path
):
    """Another download would not help."""
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "intermediate_size": 48} | sizes
    sizes |= {"num_key_value_heads": 4, "tie_word_embeddings": True}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "starcoder2":  # Only the tokens tell their number.
        sizes["vocab_size"] = transformers.Starcoder2Config().vocab_size
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    path = tmp_path / "whole.gguf"
    gguf_files.write_module(path, kind, model, OF_ALL | fields)
    with pytest.raises(UserError) as raised:
        open_decoder.open_model(path)
    words = words.format("the model that transformers makes of it")
    remedy = "give the folder with its model.safetensors"
    assert str(raised.value) == f"{path}{words}: {remedy}"


def test_an_architecture_that_transformers_does_not_read_is_named_with_a_remedy(
    tmp_path,
):
    path = tmp_path / "other.gguf"
    gguf_files.write_module(path, "unheard", torch.nn.Module(), OF_ALL)
    with pytest.raises(UserError, match="unheard.*: give the folder with its model.sa"):
        open_decoder.open_model(path)


def test_a_factor_of_1_scales_no_positions(byte_level, tmp_path):
    path = tmp_path / "plain.gguf"
    gguf_files.write(path, byte_level, llama_rope_scaling_factor=1)
    assert len(Decoder(path, 16).table_VD)


GEMMA = {
    "attention.key_length": 256,
    "attention.sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
PHI = {"attention.sliding_window": 0, "rope.dimension_count": 96}


@pytest.mark.parametrize(
    ("kind", "stated", "sizes", "found"),
    [
        ("gemma2", GEMMA, {}, None),
        ("gemma2", {"attention.layer_norm_rms_epsilon": 1e-6}, {}, None),
        ("lfm2", {"attention.layer_norm_rms_epsilon": 1e-6}, {}, "attention.layer_nor"),
        ("qwen2", {"attention.head_count": 7}, {}, None),  # It is read.
        ("gemma2", {"attn_logit_softcapping": 2.0}, {}, "attn_logit_softcapping 2.0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, {}, "final_logit_softcapping 0.0"),
        ("gemma2", {"logit_scale": 2.0}, {}, "logit_scale 2.0"),
        ("gemma2", {}, {"num_hidden_layers": 46}, "scale"),
        ("gemma2", {}, {"head_dim": 128}, "scale"),
        ("gemma3_text", {}, {"num_hidden_layers": 62}, "scale"),
        ("gemma3_text", {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}, {}, None),
        ("gemma3_text", {"rope.freq_base_swa": 1e6}, {}, "rope.freq_base_swa"),
        ("gpt2", {"attention.layer_norm_epsilon": 1e-5}, {}, None),
        ("nemotron", {"attention.layer_norm_epsilon": 1e-6}, {}, "attention.layer_nor"),
        ("phi3", PHI, {}, None),
        ("phi3", {"attention.sliding_window": 2047}, {}, "attention.sliding_window"),
        ("phi3", {"rope.dimension_count": 72}, {}, "rope.dimension_count 72"),
        ("mamba", {"ssm.dt_b_c_rms": False}, {}, None),
        ("mamba", {"ssm.dt_b_c_rms": True}, {}, "ssm.dt_b_c_rms True"),
        ("llama", {"expert_gating_func": 0}, {}, None),
        ("stablelm", {"use_parallel_residual": True}, {}, None),
        ("starcoder2", {"rope.freq_base": 1e4}, {}, None),
        ("starcoder2", {"rope.freq_base": 1e5}, {}, "rope.freq_base 100000.0"),
    ],
)
def test_a_field_that_a_model_of_transformers_does_not_obey_is_found(
    kind, stated, sizes, found
):
    config = transformers.AutoConfig.for_model(kind, **sizes)
    fields = {f"x.{name}": value for name, value in stated.items()}
    wrong = open_decoder._unheeded(config, {"general.architecture": "x"} | fields)
    assert found in wrong if found else wrong is None


@pytest.mark.parametrize("config", ["evaluate.py", "factorize.py", "export.py"])
def test_other_commands_say_that_only_compress_takes_it(config, file, place):
    knobs = {"evaluate.py": ["--config.data.source=text"]}.get(config, [])
    words = f"--config={CONFIGS / config}", f"--config.model_path={file}", *knobs
    line = refusal(*words, unchanged=[file.parent, place])
    assert line.endswith("holds a llama in GGUF: only `compress` takes it\n")


@pytest.mark.parametrize("kept", [0, 100, -2000])
def test_a_file_that_is_not_whole_is_refused(kept, file, place):
    file.write_bytes(file.read_bytes()[:kept])
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert f"{file} is damaged" in line


def test_a_file_with_an_absurd_value_is_refused(file, byte_level, tmp_path, place):
    arrays = gguf_files.write(tmp_path / "same.gguf", byte_level)
    norm = arrays["output_norm.weight"].tobytes()
    absurd = norm[:-4] + np.float32(-4e37).tobytes()
    file.write_bytes(file.read_bytes().replace(norm, absurd))
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert f"{file} is damaged: model.norm.weight holds -3.99" in line


def test_a_file_whose_second_half_was_never_written_is_refused(file, place):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert "like a download that was not finished" in line


def test_a_file_beside_the_control_file_of_its_download_is_refused(file, place):
    control = file.with_name(f"{file.name}.aria2")
    control.touch()
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert f"not finished, because {control.name} is beside it" in line


def test_a_lack_of_memory_is_no_damage(file, tmp_path, monkeypatch):
    def exhausted(_):
        raise MemoryError

    copy = shutil.copyfile(file, tmp_path / "copy.gguf")
    monkeypatch.setattr("gguf.GGUFReader", exhausted)
    with pytest.raises(MemoryError):
        gguf_header.header(copy)
    with pytest.raises(MemoryError), file_tokenizer.naming(file):
        raise MemoryError


def test_without_the_package_the_line_says_what_to_install(file, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert "package `gguf`: pip install 'pcagpt[hf]'" in line


def test_a_tokenizer_that_transformers_cannot_make_must_be_named(
    file, byte_level, place, monkeypatch
):
    fields = gguf_header.tokenizer_fields(file)
    monkeypatch.setattr(
        gguf_header,
        "tokenizer_fields",
        lambda _: fields._replace(tokens=fields.tokens[:1]),
    )
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    assert Run.open(file, any_architecture=True).record["tokenizer"] is None
    line = refusal(*asked(file), unchanged=[file.parent, place])
    assert "transformers does not make the tokenizer of" in line and "gpt2" not in line
    outcome = call(*asked(file, data={"tokenizer": byte_level}))
    assert outcome.code == 0, outcome


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoTokenizer"])
def test_an_error_of_transformers_names_the_file_itself(name, file, monkeypatch):
    def refuse(folder, gguf_file, **_):
        raise OSError(f"{folder}/{gguf_file} is odd")

    monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    is_model = name == "AutoModelForCausalLM"
    open_it = open_decoder.open_model if is_model else tokenizer_files.load
    with pytest.raises(UserError) as raised:
        open_it(file)
    assert f"{file} is odd" in str(raised.value)
