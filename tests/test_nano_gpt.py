"""nanoGPT's ckpt.pt serves as a run. Needs torch, except where it must be missing."""

import json
import mmap
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import gpt2_folders
import numpy as np
import pytest
from command_line import CONFIGS, call, refusal, tiny
from gpt2_folders import SIZES
from runs import assert_equal, snapshot

import pcagpt
from pcagpt import trees
from pcagpt.errors import UserError
from pcagpt.run import checkpoint, nano_gpt
from pcagpt.run.own_tokens import OwnTokens
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")
SMALL = {"n_layer": 2}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install 'pcagpt[hf]'")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, where everything is written by default."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def arguments(**changes):
    sizes = {n: SIZES[n] for n in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return sizes | {"block_size": 16, "bias": True, "dropout": 0.0} | changes


def state(torch, bias=True, prefix="", **sizes):
    """The state of a nanoGPT model: weights are [out, in], the head is stored."""
    found = {}
    for name, array in gpt2_folders.tensors(**sizes).items():
        if bias or not name.endswith("bias"):
            is_linear = ".attn." in name or ".mlp." in name
            found[prefix + name] = torch.tensor(array.T if is_linear else array)
    found[f"{prefix}lm_head.weight"] = found[f"{prefix}transformer.wte.weight"]
    return found


def write(torch, folder, model=None, **changes):
    """Writes a ckpt.pt as train.py does."""
    folder.mkdir()
    stored = {
        "model": model or state(torch),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "model_args": arguments(),
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4},
    }
    torch.save(stored | changes, folder / "ckpt.pt")
    return folder


def weights(folder):
    return trees.flatten(checkpoint.load_weights(folder)["params"])


def test_the_weights_are_those_of_the_same_model_in_a_hugging_face_folder(
    torch, tmp_path
):
    theirs = weights(gpt2_folders.write(tmp_path / "theirs"))
    folder = write(torch, tmp_path / "out")
    assert_equal(weights(folder), theirs)
    assert_equal(weights(folder / "ckpt.pt"), theirs)
    compiled = state(torch, prefix="_orig_mod.")
    compiled["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    assert_equal(weights(write(torch, tmp_path / "compiled", compiled)), theirs)
    for prefix in ("module.", "_orig_mod.module.", "module._orig_mod."):
        saved = write(torch, tmp_path / prefix, state(torch, prefix=prefix))
        assert_equal(weights(saved), theirs)
    kept = {name: torch.nn.Parameter(one) for name, one in state(torch).items()}
    assert_equal(weights(write(torch, tmp_path / "kept", kept)), theirs)
    run = Run.open(folder / "ckpt.pt")
    model = run.settings.model
    assert (run.folder, run.step, model.gelu) == (folder, 0, "exact")
    assert (model.block_size, model.n_layer, model.n_head) == (16, 2, 2)


def test_a_model_without_biases_and_its_padded_vocabulary_are_kept(torch, tmp_path):
    model = state(torch, bias=False, vocab_size=128)
    changed = arguments(vocab_size=128, bias=False)
    folder = write(torch, tmp_path / "out", model, model_args=changed)
    assert Run.open(folder).table_shape == (128, 16)
    assert not [name for name in weights(folder) if name.endswith("bias")]


def test_commands_write_nothing_beside_the_checkpoint(
    torch, tmp_path, place, corpus_folder
):
    folder = write(torch, tmp_path / "out")
    before = snapshot(folder)
    asked = {"model_path": folder / "ckpt.pt", "model": SMALL}
    outcome = call(*tiny("evaluate.py", corpus_folder, **asked))
    assert outcome.code == 0, outcome
    assert np.isfinite(json.loads(outcome.out)["loss"])
    assert call(*tiny("factorize.py", corpus_folder, **asked, ranks=4)).code == 0
    start = {"init": {"weights_from": folder}, "model": SMALL}
    assert call(*tiny("recover.py", corpus_folder, **start)).code == 0
    assert snapshot(folder) == before


@pytest.mark.parametrize("config", ["pca_k128.py", "pca_finetune_k128.py"])
def test_an_arm_takes_a_checkpoint_by_its_file(
    config, torch, tmp_path, place, corpus_folder
):
    folder = write(torch, tmp_path / "out")
    small = {"model": SMALL | {"n_embd_wte": 4, "block_size": 16}}
    for path in (folder / "ckpt.pt", folder):  # The same run: it is done then.
        asked = tiny(config, corpus_folder, **small, model_path=path)
        outcome = call(*asked)
        assert outcome.code == 0, outcome
    assert "steps  done" in outcome.out


def test_factors_of_an_earlier_checkpoint_are_named(
    torch, tmp_path, place, corpus_folder
):
    """nanoGPT replaces its file at each evaluation."""
    asked = {"model_path": tmp_path / "out" / "ckpt.pt", "model": SMALL, "ranks": 4}
    folder = write(torch, tmp_path / "out")
    words = tiny("factorize.py", corpus_folder, **asked)
    assert call(*words).code == 0
    later = {name: one + 1 for name, one in state(torch).items()}
    shutil.rmtree(folder)
    write(torch, folder, later)
    line = refusal(*words, unchanged=[folder, place])
    assert "holds another factorization" in line


def test_a_compressed_model_keeps_the_characters_of_the_corpus(
    torch, tmp_path, place, corpus_folder
):
    model, data = write(torch, tmp_path / "out"), tmp_path / "data"
    shutil.copytree(corpus_folder, data)
    (data / "meta.json").unlink()
    texts = {number: chr(33 + number) for number in range(97)}
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 97, "itos": texts}))
    asked = {"model_path": model / "ckpt.pt", "ranks": 4, "model": SMALL}
    asked["compress"] = {"methods": "svd", "bits": 8, "bands": 1}
    outcome = call(*tiny("compress.py", data, **asked))
    assert outcome.code == 0, outcome
    small = place / "checkpoints/compressed/best_k4"
    named = f"--config.model_path={small}"
    words = "--config.sample.prompt=abc", "--config.sample.tokens=5"
    outcome = call(f"--config={CONFIGS / 'sample.py'}", named, *words)
    assert outcome.code == 0 and outcome.out.startswith("abc"), outcome
    assert set("".join(pcagpt.load(small).generate("abc", max_tokens=5))) <= {
        *texts.values()
    }
    assert call(f"--config={CONFIGS / 'export.py'}", named).code == 0
    made = place / "checkpoints/exported/best_k4_hf"
    assert Run.open(made).record["characters"] == tuple(texts.values())


def test_only_a_model_of_another_program_has_the_characters_of_any_corpus(tmp_path):
    told = {"characters": ["a", "b"], "tokenizer_sha256": "c"}
    corpus = types.SimpleNamespace(is_assumed=False, tokenizer=None, **told)
    assert OwnTokens(tmp_path, {"vocab_size": 2}).told_by(corpus, "auto") == told
    # A run of bare ids: nothing says that it has this corpus's.
    run = OwnTokens(tmp_path, {"vocab_size": 2, "data": {}})
    assert run.told_by(corpus, "auto") == {}


def untied(torch):
    return {"model": state(torch) | {"lm_head.weight": torch.zeros(97, 16)}}


def lacking(torch):
    model = state(torch)
    del model["transformer.h.1.mlp.c_fc.bias"]
    return {"model": model}


def infinite(torch):
    model = state(torch)
    model["transformer.wpe.weight"][3, 2] = torch.inf
    return {"model": model}


def with_table(made):
    """Spoils the token table; `made` is what is there instead, or makes it."""

    def spoil(torch):
        model, name = state(torch), "transformer.wte.weight"
        model[name] = made(model[name]) if callable(made) else made
        return {"model": model}

    return spoil


def quantized(table):
    import torch

    with pytest.warns(UserWarning, match="deprecated"):
        return torch.quantize_per_tensor(table, 0.1, 0, torch.qint8)


SPOILT = {
    "untied": (untied, "lm_head.weight is another table than wte.weight"),
    "lacking": (lacking, "has no tensor h.1.mlp.c_fc.bias"),
    "infinite": (infinite, "wpe holds inf at (3, 2)"),
    "nan": (
        lambda torch: {"model": {n: t * torch.nan for n, t in state(torch).items()}},
        "wte holds nan at (0, 0)",
    ),
    "unknown": (
        lambda torch: {"model": state(torch) | {"lora.weight": torch.ones(2)}},
        "has an unknown tensor lora.weight",
    ),
    "one_wrapped": (
        lambda torch: {"model": state(torch) | {"module.ln_f.bias": torch.ones(16)}},
        "has an unknown tensor module.ln_f.bias",
    ),
    "number_as_name": (
        lambda torch: {"model": state(torch) | {7: torch.ones(2)}},
        "7 is no name of a tensor",
    ),
    "two_spellings": (
        lambda torch: {
            "model": state(torch) | {"_orig_mod.lm_head.weight": torch.zeros(97, 16)}
        },
        "_orig_mod.lm_head.weight is the second lm_head.weight of the model, with",
    ),
    "text": (with_table("a table"), "wte.weight is no tensor of real numbers"),
    "sparse": (
        with_table(lambda table: table.to_sparse()),
        "wte.weight is no tensor of real numbers",
    ),
    "meta": (
        with_table(lambda table: table.to("meta")),
        "wte.weight is no tensor of real numbers",
    ),
    "complex": (
        with_table(lambda table: table + 1j),
        "wte.weight is no tensor of real numbers",
    ),
    "quantized": (
        with_table(quantized),
        "wte.weight is no tensor of real numbers",
    ),
    "text_as_head": (
        lambda torch: {"model": state(torch) | {"lm_head.weight": "a table"}},
        "lm_head.weight is no tensor of real numbers",
    ),
    "narrow": (
        lambda _: {"model_args": arguments(block_size=8)},
        "wpe.weight is (16, 16), but its model_args ask for (8, 16)",
    ),
    "no_sizes": (lambda _: {"model_args": {}}, "model_args is damaged ('vocab_size'"),
    "no_layer": (lambda _: {"model_args": arguments(n_layer=0)}, "has n_layer = 0"),
    "odd_heads": (
        lambda _: {"model_args": arguments(n_head=3)},
        "n_head = 3, which does not divide n_embd = 16",
    ),
    "too_deep": (lambda _: {"model_args": arguments(n_layer=10**9)}, "1 to 10000"),
    "lightning": (lambda _: {"model_args": None}, "'model_args' is None"),
    "window": (
        lambda torch: {
            "model": state(torch)
            | {"transformer.h.1.attn.bias": torch.ones(1, 1, 16, 16).tril().triu(-4)}
        },
        "the mask transformer.h.1.attn.bias is not causal attention's",
    ),
    "all_seen": (
        lambda torch: {
            "model": state(torch)
            | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool)}
        },
        "the mask transformer.h.0.attn.bias is not causal attention's",
    ),
    "fork": (
        lambda _: {"model_args": arguments(activation="relu", causal=False)},
        "model_args has activation = relu, which nanoGPT does not have",
    ),
    "code": (
        lambda _: {"config": np.random.default_rng},
        "more than tensors and plain values (numpy.random",
    ),
    "path": (lambda _: {"config": Path("a")}, "(pathlib.PosixPath): save it again"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_another_or_a_damaged_checkpoint_is_refused(
    spoilt, torch, tmp_path, place, corpus_folder
):
    spoil, words = SPOILT[spoilt]
    folder = write(torch, tmp_path / "out", **spoil(torch))
    asked = {"model_path": folder, "model": SMALL}
    line = refusal(
        *tiny("evaluate.py", corpus_folder, **asked), unchanged=[folder, place]
    )
    assert words in line


def test_a_file_that_is_no_checkpoint_is_refused(torch, tmp_path, place):
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\x04no checkpoint")
    asked = {"model_path": tmp_path / "ckpt.pt"}
    line = refusal(*tiny("evaluate.py", "", **asked), unchanged=[tmp_path])
    assert "ckpt.pt" in line


def test_one_flipped_bit_in_a_tensor_is_refused(torch, tmp_path):
    folder = write(torch, tmp_path / "out")
    file, table = folder / "ckpt.pt", gpt2_folders.tensors()[gpt2_folders.TABLE]
    content = bytearray(file.read_bytes())
    content[content.index(table.tobytes()) + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read \(Bad CRC-32.*: restore it"):
        Run.open(folder)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_a_number_of_numpy_beside_the_weights_does_no_harm(kind, torch, tmp_path):
    folder = write(torch, tmp_path / "out", best_val_loss=kind(2))
    assert Run.open(folder).table_shape == (97, 16)


def test_a_checkpoint_is_not_mapped_into_memory(torch, tmp_path):
    """The process would end if nanoGPT wrote it anew meanwhile."""
    file = write(torch, tmp_path / "out") / "ckpt.pt"
    _, tensors = nano_gpt._read(file.parent)
    assert tensors and str(file) not in Path("/proc/self/maps").read_text()


def test_a_tensor_that_is_stored_as_its_negative_is_read(torch, tmp_path):
    tensors, name = state(torch), "transformer.wpe.weight"
    plain = write(torch, tmp_path / "plain")
    tensors[name] = torch._neg_view(-tensors[name])  # As `imag` makes of conjugates.
    negative = write(torch, tmp_path / "negative", tensors)
    assert_equal(weights(negative), weights(plain))


def test_a_checkpoint_that_was_written_without_sums_is_read(torch, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        folder = write(torch, tmp_path / "out")
    finally:
        torch.serialization.set_crc32_options(True)
    assert Run.open(folder).table_shape == (97, 16)


def test_without_torch_the_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "ckpt.pt").write_bytes(b"")
    asked = {"model_path": tmp_path}
    line = refusal(*tiny("evaluate.py", "", **asked), unchanged=[tmp_path])
    assert "ckpt.pt can only be read with PyTorch: pip install 'pcagpt[hf]'" in line


def optimizer(torch, count=2, size=99):
    return {"state": {n: {"exp_avg": torch.ones(size)} for n in range(count)}}


def test_what_is_no_weight_is_left_in_the_file(torch, tmp_path):
    """The state of the optimizer takes twice the memory of the model."""
    state_of_64_mb = optimizer(torch, count=64, size=250_000)
    folder = write(torch, tmp_path / "out", optimizer=state_of_64_mb)
    before = resident_bytes()
    stored = nano_gpt._load(folder / "ckpt.pt")
    assert resident_bytes() < before + 16_000_000
    assert not any(
        one["exp_avg"].any() for one in stored["optimizer"]["state"].values()
    )
    model = stored["model"].values()
    places = {tensor.untyped_storage().data_ptr() for tensor in model}
    assert len(places) == len(model) - 1  # The head is the table.


def resident_bytes():
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * mmap.PAGESIZE if pages.exists() else 0


def test_versions_of_torch_that_cannot_leave_values_out_read_the_same(
    torch, tmp_path, monkeypatch
):
    folder = write(torch, tmp_path / "out", optimizer=optimizer(torch))
    known = weights(folder)
    monkeypatch.delattr(torch.serialization, "skip_data")
    assert_equal(weights(folder), known)
    assert nano_gpt._load(folder / "ckpt.pt")["optimizer"]["state"][0]["exp_avg"].all()


def test_a_file_that_changes_between_two_looks_is_read_whole(
    torch, tmp_path, monkeypatch
):
    folder = write(torch, tmp_path / "out")
    known, look = weights(folder), nano_gpt._with_storages

    def other(file, wanted):
        return look(file, wanted)[0], {len(wanted)}

    monkeypatch.setattr(nano_gpt, "_with_storages", other)
    assert_equal(weights(folder), known)


def swapped(name, content):
    if name.endswith("byteorder"):
        return {b"little": b"big", b"big": b"little"}[content]
    is_tensor = "/data/" in name
    return np.frombuffer(content, "u4").byteswap().tobytes() if is_tensor else content


REWRITTEN = {
    "sorted": (sorted, zipfile.ZIP_STORED),
    "reversed": (lambda names: names[::-1], zipfile.ZIP_STORED),
    "deflated": (list, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("is_swapped", [False, True], ids=["same", "swapped"])
@pytest.mark.parametrize("way", REWRITTEN)
def test_a_checkpoint_that_was_packed_again_has_the_same_weights(
    way, is_swapped, torch, tmp_path
):
    """In another order, with other distances, packed, or with the other byte order."""
    model, noise = state(torch), np.random.default_rng(0).normal(size=(40, 9000))
    model |= {name: one + 1 for name, one in model.items() if "ln_" in name}
    noisy = dict(enumerate({"exp_avg": torch.tensor(one)} for one in noise))
    folder = write(torch, tmp_path / "out", model, optimizer={"state": noisy})
    sizes = [one.numel() for one in model.values()]
    assert len({*sizes}) < len(sizes) - 5  # One may be taken for another.
    known, path = weights(folder), folder / "ckpt.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    order, kind = REWRITTEN[way]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name in order(list(records)):
            content = records[name]
            archive.writestr(name, swapped(name, content) if is_swapped else content)
    assert_equal(weights(folder), known)


def test_storages_without_bytes_do_not_shift_the_others(torch, tmp_path):
    none, model = torch.zeros(0), state(torch)
    changed = {"optimizer": [none, none, torch.ones(9)], "model": model, "last": none}
    known = weights(write(torch, tmp_path / "known"))
    folder = write(torch, tmp_path / "out")
    stored = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save(
        changed | {k: v for k, v in stored.items() if k not in changed},
        folder / "ckpt.pt",
    )
    assert_equal(weights(folder), known)
    assert not nano_gpt._load(folder / "ckpt.pt")["optimizer"][2].any()


@pytest.mark.parametrize("size", [97, 98])
def test_a_meta_file_of_more_tokens_than_the_table_has_rows_is_refused(
    size, torch, tmp_path
):
    folder = write(torch, tmp_path / "out")
    meta = {"vocab_size": size, "itos": {n: chr(200 + n) for n in range(size)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    if size == 97:
        assert len(Run.open(folder).record["characters"]) == 97
        return
    with pytest.raises(
        UserError, match="its meta file has 98 tokens, but its table 97"
    ):
        Run.open(folder)
