"""A Hugging Face folder of a GPT-2 serves every command as a run.

`test_hugging_face_parity.py` compares the numbers with those of transformers.
"""

import json
import os
import shutil
from pathlib import Path

import gpt2_folders
import numpy as np
import pytest
from command_line import CONFIGS, call, refusal, tiny
from gpt2_folders import HEAD, TABLE, tensors, write
from runs import assert_equal, snapshot
from safetensors.numpy import load_file, save_file
from tokenizer_folders import SIZE, TEXT, byte_level

import pcagpt
from pcagpt import trees
from pcagpt.config import command_line
from pcagpt.errors import UserError
from pcagpt.json_files import read_json, write_json
from pcagpt.pipeline.plan import make_plan
from pcagpt.run import checkpoint, digests, fingerprint, foreign, hugging_face
from pcagpt.run.folder import read_record, write_record
from pcagpt.run.trained import Run
from pcagpt.unfilled import Place, refuse_unfilled

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(tmp_path):
    """A folder that a test may spoil."""
    return write(tmp_path / "theirs")


def weights(folder):
    return trees.flatten(checkpoint.load_weights(folder)["params"])


# What is read.


def test_a_folder_is_a_run_with_its_sizes_and_one_checkpoint(folder):
    run = Run.open(folder)
    model = run.settings.model
    assert (run.folder, run.step, checkpoint.steps(folder)) == (folder, 0, [0])
    assert (model.block_size, model.n_embd, model.n_layer, model.n_head) == (
        16,
        16,
        2,
        2,
    )
    assert run.table_shape == (97, 16)
    np.testing.assert_array_equal(run.table(), tensors()[TABLE])
    run.check_unchanged()


def test_matrices_keep_their_layout_and_the_table_gets_padding(folder):
    found, given = weights(folder), tensors()
    assert found["embed/band_0/wte"].shape == (128, 16)
    assert not found["embed/band_0/wte"][97:].any()
    for ours, theirs in {
        "block_1/attn/qkv/kernel": "h.1.attn.c_attn.weight",
        "block_0/mlp/proj/bias": "h.0.mlp.c_proj.bias",
        "ln_f/scale": "ln_f.weight",
        "wpe": "wpe.weight",
    }.items():
        np.testing.assert_array_equal(found[ours], given[f"transformer.{theirs}"])


def test_shards_a_base_model_and_stored_masks_are_the_same_model(folder, tmp_path):
    masked = tensors() | {
        "transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32),
        "transformer.h.1.attn.masked_bias": np.float32(-1e4),
        HEAD: tensors()[TABLE],
        "wte.weight": tensors()[TABLE],
    }
    same = [
        gpt2_folders.write_shards(tmp_path / "shards"),
        write(tmp_path / "base", prefix="", architectures=["GPT2Model"]),
        write(tmp_path / "masked", masked),
        write(tmp_path / "unnamed", architectures=None),
    ]
    for other in same:
        assert_equal(weights(other), weights(folder))
        assert fingerprint.of(other) == fingerprint.of(folder)


def test_a_model_saved_under_distributed_data_parallel_is_the_same(folder, tmp_path):
    other = write(tmp_path / "parallel", prefix="module.transformer.")
    assert_equal(weights(other), weights(folder))


def test_the_index_of_shards_is_a_file_of_the_model(tmp_path):
    shards = gpt2_folders.write_shards(tmp_path / "shards")
    files = {file.name for file in shards.iterdir()}
    assert {path.name for path in foreign.weight_files(shards)} == files
    before = digests.stamps(shards)
    with (shards / "model.safetensors.index.json").open("a") as file:
        file.write("\n")
    assert digests.stamps(shards) != before


def test_a_folder_of_the_cache_stands_for_its_only_snapshot(tmp_path):
    cached = tmp_path / "models--owner--theirs"
    (cached / "snapshots").mkdir(parents=True)
    asked = {"model_path": cached, "model": {"n_layer": 2}}

    def line():
        return refusal(*tiny("evaluate.py", "", **asked), unchanged=[cached])

    assert "models--owner--theirs/snapshots is empty: download the model" in line()
    newer = write(cached / "snapshots/b")
    run = Run.open(cached)
    assert run.folder == newer
    assert_equal(weights(cached), weights(newer))
    older = write(cached / "snapshots/a", seed=1)
    assert f"{cached} has 2 snapshots: name one, such as {older}" in line()
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("b")
    assert f"{cached} has 2 snapshots: name one, such as {newer}" in line()
    (cached / "refs/main").write_bytes(b"\xff")
    assert f"{cached} has 2 snapshots: name one, such as {older}" in line()


def test_a_folder_of_the_cache_is_known_by_any_path(tmp_path, monkeypatch):
    cached = tmp_path / "models--owner--theirs"
    (cached / "snapshots").mkdir(parents=True)
    known = weights(write(cached / "snapshots/a"))
    (tmp_path / "link").symlink_to(cached)
    shutil.copytree(cached, tmp_path / "other")
    (tmp_path / "models--linked").symlink_to("other")
    for one in ("link", "models--linked", "models--owner--theirs/snapshots/"):
        assert_equal(weights(tmp_path / one), known)
    monkeypatch.chdir(cached)
    assert_equal(weights(Path(".")), known)
    (tmp_path / "loop").symlink_to("loop")
    assert hugging_face.snapshot_in(tmp_path / "loop") == tmp_path / "loop"


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_floats_are_read_as_float32(dtype, tmp_path):
    found = weights(write(tmp_path / "small", dtype=dtype))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    rounded = tensors()["transformer.wpe.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found["wpe"], rounded)


def test_a_file_whose_end_was_never_written_is_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for share in (0.5, 0.8):
        filled = content[: int(share * len(content))]
        path.write_bytes(filled.ljust(len(content), b"\0"))
        with pytest.raises(UserError, match="of zeros, in which transf.* download"):
            Run.open(folder)


def test_zeros_that_are_meant_are_read(tmp_path):
    zeros = {name: 0 * one for name, one in tensors().items() if one.ndim == 1}
    zeros["transformer.h.1.mlp.c_proj.weight"] = np.zeros((64, 16), np.float32)
    padded = tensors()
    padded[TABLE][60:] = 0
    Run.open(write(tmp_path / "theirs", padded | zeros))


def test_a_table_that_is_half_written_is_no_padded_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1" * 5_000_000 + b"\0" * 3_000_000)
    refuse_unfilled(path, {"table": Place((59, 100_000), 0, 5_900_000)})
    with pytest.raises(UserError, match="in which table is"):
        refuse_unfilled(path, {"table": Place((80, 100_000), 0, 8_000_000)})


ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}


def test_sizes_may_have_the_other_names_that_transformers_reads(folder):
    wanted = Run.open(folder).record["model"]
    config = read_json(folder / "config.json", "")
    renamed = {ALIASES.get(name, name): value for name, value in config.items()}
    write_json(folder / "config.json", renamed)
    assert Run.open(folder).record["model"] == wanted
    for name, alias in ALIASES.items():
        write_json(folder / "config.json", config | {alias: config[name] + 1})
        with pytest.raises(UserError, match=f"{name} is .*, but {alias}, another name"):
            Run.open(folder)


def test_other_scales_of_the_attention_go_into_the_query(folder, tmp_path):
    given = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    plain, other = weights(folder), weights(write(tmp_path / "other", **given))
    query, rest = np.s_[..., :16], np.s_[..., 16:]
    for kind in ("kernel", "bias"):
        name = f"block_1/attn/qkv/{kind}"
        np.testing.assert_allclose(other[name][query], plain[name][query] * 8**0.5 / 2)
        np.testing.assert_array_equal(other[name][rest], plain[name][rest])


@pytest.mark.parametrize("name", ["ckpt", "ckpt/500", "model.safetensors"])
def test_a_folder_may_have_names_of_ours(name, tmp_path):
    folder = write(tmp_path / name)
    for inside in ("optimizer", "meta", "weights"):
        (folder / inside).mkdir()
    for path in (folder, folder / "model.safetensors", folder / "config.json"):
        run = Run.open(path)
        assert (run.folder, run.step) == (folder, 0)
        np.testing.assert_array_equal(run.table(), tensors()[TABLE])


def test_another_model_has_another_fingerprint_and_a_change_is_noticed(folder):
    run = Run.open(folder)
    before = run.fingerprint
    write(folder, tensors(seed=1))
    assert fingerprint.of(folder) != before
    with pytest.raises(UserError, match="replaced or changed while this command"):
        run.check_unchanged()


def test_a_model_that_was_replaced_before_its_weights_were_read_is_refused(
    folder, tmp_path
):
    """Nothing but its files tells such a model from another one of equal shape."""
    run, other = Run.open(folder), Run.open(folder)
    (folder / "notes.txt").write_text("of a person")
    other.check_unchanged()
    folder.rename(tmp_path / "old")
    write(folder, tensors(seed=1))
    with pytest.raises(UserError, match="replaced or changed while this command"):
        _ = run.weights


def test_a_model_without_a_run_id_that_was_replaced_before_it_was_read_is_refused(
    folder, tmp_path
):
    for seed in (0, 1):
        made = tmp_path / str(seed)
        other = write(tmp_path / f"from{seed}", tensors(seed=seed))
        checkpoint.save_weights(made, checkpoint.load_weights(other))
        record = read_record(other)
        write_record(made, {n: record[n] for n in ("model", "vocab_size", "tokenizer")})
    run = Run.open(tmp_path / "0")
    (tmp_path / "0").rename(tmp_path / "old")
    (tmp_path / "1").rename(tmp_path / "0")
    with pytest.raises(UserError, match="replaced or changed while this command"):
        _ = run.weights


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_a_model_that_is_replaced_while_it_is_read_ends_no_command_with_a_traceback(
    error, folder, tmp_path, monkeypatch
):
    run, new = Run.open(folder), write(tmp_path / "new", tensors(seed=1))
    read = hugging_face.read_weights

    def replace_and_fail(place):
        if not new.exists():
            return read(place)
        folder.rename(tmp_path / "old")
        new.rename(folder)
        raise error("of the other model's files")

    monkeypatch.setattr(hugging_face, "read_weights", replace_and_fail)
    with pytest.raises(UserError, match="replaced or changed while this command"):
        _ = run.weights
    assert Run.open(folder).weights


def test_a_file_that_is_cut_off_while_it_is_read_does_not_end_the_process(folder):
    file = folder / "model.safetensors"
    with (
        pytest.raises(UserError, match="model.safetensors cannot be read"),
        hugging_face.opened(file) as opened,
    ):
        assert str(file) not in Path("/proc/self/maps").read_text()
        os.truncate(file, file.stat().st_size // 2)
        for name in opened.keys():  # noqa: SIM118  # It is no dict.
            opened.get_tensor(name)


def test_an_error_of_a_file_that_is_just_written_anew_says_nothing_of_damage(
    folder, monkeypatch
):
    run = Run.open(folder)

    def write_and_fail(place):
        write(folder, tensors(seed=1))
        raise ValueError

    monkeypatch.setattr(hugging_face, "read_weights", write_and_fail)
    with pytest.raises(UserError, match="replaced or changed while this command"):
        _ = run.weights


# What it serves.


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, where everything is written by default."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def done(*arguments):
    outcome = call(*arguments)
    assert outcome.code == 0, outcome
    return outcome


def test_evaluations_and_statistics_are_in_the_workdir(folder, place, corpus_folder):
    before = snapshot(folder)
    done(*tiny("evaluate.py", corpus_folder, model_path=folder, model={"n_layer": 2}))
    asked = {"model_path": folder, "ranks": 4, "factorize": {"method": "kl"}}
    done(*tiny("factorize.py", corpus_folder, **asked, model={"n_layer": 2}))
    assert snapshot(folder) == before
    (results,) = (place / "checkpoints/measured").iterdir()
    assert results.name == f"theirs-{fingerprint.of(folder)[:8]}"
    assert len(list(results.glob("evaluation_*_val_step0.json"))) == 1
    assert len(list(results.glob("statistics_step0_*.npz"))) == 1
    assert (place / "checkpoints/pca_factorized/wte_pca_k4.npy").exists()


def test_two_models_of_one_name_have_two_results(
    folder, place, corpus_folder, tmp_path
):
    other = write(tmp_path / "elsewhere" / folder.name, tensors(seed=1))
    for path in (folder, other):
        done(*tiny("evaluate.py", corpus_folder, model_path=path, model={"n_layer": 2}))
    assert len(list((place / "checkpoints/measured").iterdir())) == 2


def test_compress_and_further_training_take_the_folder(folder, place, corpus_folder):
    before, sizes = snapshot(folder), {"n_layer": 2}
    asked = {"model_path": folder, "ranks": 4, "compress": {"methods": "svd,coded"}}
    options = "--config.compress.bits=8", "--config.compress.bands=1"
    done(*tiny("compress.py", corpus_folder, **asked, model=sizes), *options)
    made = place / "checkpoints/compressed/best_k4"
    done(*tiny("evaluate.py", corpus_folder, model_path=made, model=sizes))
    (beside,) = made.glob("evaluation_*_val_step0.json")
    assert np.isfinite(json.loads(beside.read_text())["loss"])
    for start in (folder, made):
        asked = {"init": {"weights_from": start}, "distill": {"teacher": folder}}
        done(*tiny("recover.py", corpus_folder, **asked, model=sizes))
    assert snapshot(folder) == before


def test_all_arms_start_from_the_model_of_model_path(folder, place, corpus_folder):
    before, knobs = snapshot(folder), {"model_path": folder}
    for name, arm, letter in (
        ("pca_k128.py", "pca", "A"),
        ("pca_finetune_k128.py", "pca_finetune", "B"),
        ("pca_finetune_k128.py", "pca_distill", "Bd"),
        ("random_k128.py", "random", "C"),
        ("baseline.py", "continued", "D+"),
    ):
        rank = {} if arm == "continued" else {"n_embd_wte": 4}
        asked = knobs | {"model": {"n_layer": 2} | rank, "arm": arm}
        lines = done(*tiny(name, corpus_folder, **asked)).out.splitlines()
        assert any(line.startswith(f"{letter} gpt_") for line in lines)
        assert not any(line.startswith("D gpt_baseline") for line in lines)
    assert snapshot(folder) == before
    finetuned = read_record(place / "checkpoints/gpt_pca_finetune_k4")
    assert finetuned["imported_sha256"]["blocks_from"] == fingerprint.of(folder)
    # Without sizes of one's own, those of the model hold.
    words = [f"--config.{k}={v}" for k, v in knobs.items()]
    config = f"--config={CONFIGS / 'pca_k128.py'}"
    rank = "--config.model.n_embd_wte=17"
    line = refusal(config, *words, rank, unchanged=[folder, place])
    assert "17: a rank is at most the model's width, model.n_embd = 16" in line
    data = f"--config.data.source={corpus_folder}"
    words = ["pcagpt", config, *words, data, rank.replace("17", "8")]
    model = make_plan(command_line.parse(words)[0]).jobs[-1].settings.model
    assert (model.n_layer, model.n_embd, model.n_embd_wte) == (2, 16, 8)


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("baseline.py", {}, "the baseline model starts at random: train a model"),
        (
            "recover.py",
            {"init": {"weights_from": "x"}},
            "already names the run to start",
        ),
        ("experiment.py", {"ranks": 4}, "an experiment trains its own D"),
    ],
)
def test_a_model_path_that_no_arm_reads_is_refused(
    name, knobs, words, folder, place, corpus_folder
):
    asked = tiny(name, corpus_folder, model_path=folder, **knobs)
    assert words in refusal(*asked, unchanged=[folder, place])


def test_all_arms_start_from_a_folder_that_is_named_or_is_the_baseline(
    folder, place, corpus_folder
):
    sizes = {"n_layer": 2, "n_embd_wte": 4}
    shutil.copytree(folder, place / "checkpoints/gpt_baseline")
    before = snapshot(place / "checkpoints/gpt_baseline")
    for name in ("pca_k128.py", "pca_finetune_k128.py", "random_k128.py"):
        done(*tiny(name, corpus_folder, model=sizes))
    assert snapshot(place / "checkpoints/gpt_baseline") == before
    factors = place / "checkpoints/pca_factorized"
    init = {
        "import_wte_npy": factors / "wte_pca_k4.npy",
        "import_scale_matrices_npz": factors / "scale_mats_pca_k4.npz",
        "blocks_from": folder,
    }
    asked = {"workdir": "named", "init": init, "model": sizes}
    done(*tiny("pca_finetune_k128.py", corpus_folder, **asked))
    first, second = (
        json.loads((place / run / "gpt_pca_finetune_k4/result.json").read_text())
        for run in ("checkpoints", "named")
    )
    assert first["val_loss"] == second["val_loss"]


# What is refused.


def remove(name):
    return lambda folder: (folder / name).unlink()


def with_config(**fields):
    return lambda folder: gpt2_folders.write_config(folder, **fields)


def with_tensor(name, array):
    return lambda folder: write(folder, tensors() | {name: np.float32(array)})


def infinite(folder):
    arrays = tensors()
    arrays["transformer.h.0.mlp.c_fc.weight"][3, 5] = 1e5
    with np.errstate(over="ignore"):
        write(folder, arrays, dtype="float16")


def lost_shard(folder):
    (folder / "model.safetensors").unlink()
    gpt2_folders.write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def nan_in_two_tables(folder):
    table = tensors()[TABLE] * np.float32("nan")
    write(folder, tensors() | {TABLE: table, HEAD: table, "wte.weight": table})


def two_shards(folder):
    """The index names one shard of a tensor, but another one has it, too."""
    gpt2_folders.write_shards(folder)
    (folder / "model.safetensors").unlink()
    for number, path in enumerate(folder.glob("model-*")):
        both = {"transformer.h.0.ln_1.bias": np.full(16, number, np.float32)}
        save_file(load_file(path) | both, path)


def shard_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {TABLE: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lacking(folder):
    arrays = tensors()
    del arrays["transformer.h.1.ln_2.bias"]
    write(folder, arrays)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (folder / "model.safetensors").write_text(text)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SPOILT = {
    "no_weights": (remove("model.safetensors"), "no model.safetensors: download it"),
    "no_config": (remove("config.json"), "has weights, but no config.json"),
    "damaged_config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is damaged",
    ),
    "lost_shard": (lost_shard, "has no model-00002-of-00002.safetensors, which its"),
    "shard_elsewhere": (shard_elsewhere, "has no ../model.safetensors, which its"),
    "pickled": (
        pickled,
        "pytorch_model.bin is not read, because a pickle can run code",
    ),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "has an adapter_config.json: transformers adds this adapter",
    ),
    "other_weights": (
        with_config(transformers_weights="tuned.safetensors"),
        "transformers_weights is 'tuned.safetensors', a file that transformers reads",
    ),
    "cut": (cut, "model.safetensors cannot be read"),
    "pointer": (pointer, "get the file that it stands for with git lfs pull"),
    "lacking": (lacking, "has no tensor h.1.ln_2.bias, which its config.json"),
    "unknown": (with_tensor("score.weight", [[1]]), "has a tensor score.weight"),
    "infinite": (infinite, "block_0/mlp/fc/kernel holds inf at (3, 5)"),
    "nan": (nan_in_two_tables, "wte holds nan at (0, 0)"),
    "padded": (
        lambda folder: write(folder, tensors(vocab_size=128)),
        "wte.weight is (128, 16), but its config.json asks for (97, 16): its "
        "vocabulary is padded or cut; set vocab_size to 128",
    ),
    "narrow": (with_config(n_positions=8), "wpe.weight is (16, 16), but its config"),
    "whole_numbers": (
        lambda folder: write(folder, dtype="int32"),
        "has the type I32: it must be one of F64, F32, F16, BF16",
    ),
    "two_tables": (
        with_tensor(HEAD, np.ones((97, 16))),
        "lm_head.weight is another table than wte.weight, although tie_word_embeddings",
    ),
    "two_spellings": (
        with_tensor("wte.weight", np.ones((97, 16))),
        "is the second wte.weight of the model, with other values: remove the wrong",
    ),
    "whole_beside_shards": (
        gpt2_folders.write_shards,
        "theirs has model.safetensors, which would be read, and model-0000",
    ),
    "two_shards": (
        two_shards,
        "theirs: model-00001-of-00002.safetensors and model-00002-of-00002.safetensors "
        "both hold transformer.h.0.ln_1.bias, as parts of two downloads do",
    ),
    "untied": (
        with_config(tie_word_embeddings=False),
        "holds a GPT2LMHeadModel: only `compress` takes it; `export` takes",
    ),
    "another_architecture": (
        with_config(
            model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=16
        ),
        "holds a LlamaForCausalLM",
    ),
    "another_head": (
        with_config(architectures=["GPT2ForSequenceClassification"]),
        "holds a GPT2ForSequenceClassification, which pcagpt does not read",
    ),
    "another_type": (
        with_config(model_type="bert", architectures=None, hidden_size=16),
        "holds a bert",
    ),
    "another_gelu": (with_config(activation_function="relu"), "_function is 'relu'"),
    "another_epsilon": (with_config(layer_norm_epsilon=1e-6), "epsilon is 1e-06"),
    "cross_attention": (with_config(add_cross_attention=True), "attention is True"),
    "not_causal": (with_config(is_causal=False), "is_causal is False, with which"),
    "two_parts": (with_config(is_encoder_decoder=True), "encoder_decoder is True"),
    "window": (with_config(sliding_window=4), "sliding_window is 4"),
    "chunks": (with_config(attention_chunk_size=4), "chunk_size is 4"),
    "layers": (with_config(layer_types=["moe"] * 2), "layer_types is ['moe'"),
    "one_cache": (with_config(kv_sharing_modes=["reuse"] * 2), "_modes is ['reuse'"),
    "uneven": (with_config(per_layer_config={"1": {"n_head": 1}}), "_config is {'1'"),
    "fused": (with_config(fusion_config={"patch": {}}), "fusion_config is {'patch'"),
    "quantized": (with_config(quantization_config={"bits": 4}), "_config is {'bits'"),
    "wide": (with_config(n_inner=32), "n_inner is 32: it must be 4 * n_embd"),
    "heads": (with_config(n_head=3), "n_head is 3, which does not divide n_embd, 16"),
    "too_deep": (with_config(n_layer=10**9), "whole number from 1 to 10000"),
    "text_for_a_size": (with_config(n_layer="2"), "n_layer is '2'"),
    "number_for_a_switch": (with_config(scale_attn_weights=1), "_weights is 1"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_folder_that_is_not_a_whole_gpt2_is_refused(
    spoilt, folder, place, corpus_folder
):
    spoil, words = SPOILT[spoilt]
    spoil(folder)
    kept = [folder, place]
    evaluate = tiny(
        "evaluate.py", corpus_folder, model_path=folder, model={"n_layer": 2}
    )
    assert words in refusal(*evaluate, unchanged=kept)
    start = {"init": {"weights_from": folder}, "model": {"n_layer": 2}}
    assert words in refusal(*tiny("recover.py", corpus_folder, **start), unchanged=kept)


@pytest.mark.parametrize(
    ("beside", "named", "read"),
    [
        ({}, "model.safetensors", None),
        ({"ckpt.pt": b"other"}, "config.json", None),
        ({"ckpt.pt": b"other"}, "ckpt.pt", "model.safetensors"),
        (
            {"model.safetensors.index.json": b"{}"},
            "model.safetensors.index.json",
            "model.safetensors",
        ),
        ({"table.pcat": b"other"}, "table.pcat", "model.safetensors"),
        (
            {"others.safetensors": b"other"},
            "model.safetensors",
            "others.safetensors",
        ),
        ({"others.safetensors": b"", "table.pcat": b""}, "table.pcat", None),
    ],
    ids=str,
)
def test_a_file_that_is_named_is_read_or_refused(
    beside, named, read, folder, place, corpus_folder
):
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    if not read:
        assert foreign.place_of(folder / named) == folder
        return
    line = f"{folder / named} is not read where it is, because {folder / read} is read"
    with pytest.raises(UserError, match=line):
        pcagpt.load(folder / named)
    commands = [
        (f"--config={CONFIGS / name}.py", f"--config.model_path={folder / named}")
        for name in ("evaluate", "sample", "factorize", "compress", "export")
    ]
    start = {"init": {"weights_from": folder / named}, "model": {"n_layer": 2}}
    for arguments in (*commands, tiny("recover.py", corpus_folder, **start)):
        assert line in refusal(*arguments, unchanged=[folder, place])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_named_pipe_in_the_folder_is_not_waited_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=folder.name):
        Run.open(folder)
    with (
        pytest.raises(UserError, match="is a named pipe"),
        hugging_face.reading(folder / name),
    ):
        raise AssertionError


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_the_name_of_a_model_on_a_hub_is_refused_with_what_to_give(name, place):
    for config in ("evaluate.py", "factorize.py", "sample.py", "compress.py"):
        line = refusal(
            *tiny(config, place, model_path=name)[:1],
            f"--config.model_path={name}",
            unchanged=[place],
        )
        assert f"{name} does not exist" in line
        assert "pcagpt reads folders and downloads no models" in line
        assert f"hf download {name} --local-dir gpt2" in line
    line = refusal(*tiny("evaluate.py", place, model_path="/gpt2"), unchanged=[place])
    assert "downloads" not in line


def test_a_folder_says_nothing_of_its_corpus_and_keeps_its_sizes(folder, place):
    asked = {"model_path": folder, "model": {"n_layer": 2}}
    line = refusal(*tiny("evaluate.py", "", **asked), unchanged=[place, folder])
    assert "does not say what it was trained on: name a corpus" in line
    asked["model"] = {"n_layer": 3}
    line = refusal(*tiny("evaluate.py", "", **asked), unchanged=[place, folder])
    assert "model.n_layer is 3" in line


def test_code_in_the_folder_is_not_run(folder, place, corpus_folder):
    ran = place / "RAN"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    gpt2_folders.write_config(folder, auto_map={"AutoModel": "modeling_own.Own"})
    done(*tiny("evaluate.py", corpus_folder, model_path=folder, model={"n_layer": 2}))
    assert not ran.exists()


# A tokenizer that a person names.


@pytest.fixture
def named(tmp_path):
    """(a model without a tokenizer, the file of its tokenizer, a folder of text)."""
    byte_level(tmp_path)
    for split, count in (("train", 60), ("val", 9)):
        (tmp_path / f"{split}.txt").write_text(TEXT * count)
    model = write(tmp_path / "theirs", vocab_size=SIZE + 4)
    return model, tmp_path / "whole/tokenizer.json", tmp_path


def test_a_compressed_model_keeps_the_tokenizer_that_was_named(named, place):
    model, file, text = named
    sizes = {"n_layer": 2}
    asked = {"model_path": model, "ranks": 4, "compress": {"methods": "svd,coded"}}
    options = "--config.compress.bits=8", "--config.compress.bands=1"
    words = *tiny("compress.py", text, **asked, model=sizes), *options
    words = *words, f"--config.data.tokenizer={file}"
    done(*words)
    for name in ("best_k4", "best_coded_k4"):
        made = place / "checkpoints/compressed" / name
        assert pcagpt.load(made).loss("The people") > 0
        done(f"--config={CONFIGS / 'export.py'}", f"--config.model_path={made}")
        exported = place / f"checkpoints/exported/{name}_hf"
        assert (exported / "tokenizer.json").read_bytes() == file.read_bytes()
        assert "knows no tokenizer" not in (exported / "README.md").read_text()
    # An older version recorded none: the same command renews the model.
    told = read_record(made)
    write_record(made, told | {"tokenizer": None, "tokenizer_sha256": None})
    shutil.rmtree(made / "ckpt/0/meta")
    done(*words)
    assert read_record(made)["tokenizer"] == str(file)


@pytest.mark.parametrize("data", ["folder", "texts"])
def test_a_saved_model_keeps_the_tokenizer_that_was_named(named, tmp_path, data):
    model, file, text = named
    data = {"folder": text, "texts": {"train": TEXT * 60, "val": TEXT * 9}}[data]
    how = {"max_bytes": 9000, "methods": "svd", "data": data, "max_tokens": 160}
    opened = pcagpt.load(model, tokenizer=str(file))
    by_model = pcagpt.compress(opened, **how).save(tmp_path / "by_model")
    by_path = pcagpt.compress(model, tokenizer=str(file), **how)
    for small in (by_model, by_path.save(tmp_path / "by_path")):
        assert pcagpt.load(small).loss("The people") > 0
