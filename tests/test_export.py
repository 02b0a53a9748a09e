"""The task 'export': other programs, and pcagpt itself, read the same model."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_line import CONFIGS, ROOT, call, refusal, tiny
from gpt2_folders import write as write_gpt2
from runs import gpt_config, snapshot
from safetensors.numpy import load_file
from tokenizer_folders import word_level

from pcagpt import coding, trees
from pcagpt.compression.codes import KINDS
from pcagpt.config import Settings
from pcagpt.config.schema import ModelSettings
from pcagpt.data import vocabulary
from pcagpt.errors import UserError
from pcagpt.export import formats
from pcagpt.export.measured import measured
from pcagpt.export.model_card import model_card
from pcagpt.export.source import open_source
from pcagpt.factorization import Factorizer, Weighting, factor_files
from pcagpt.file_hashes import sha256_of_file
from pcagpt.json_files import write_json
from pcagpt.model import GPT
from pcagpt.run import checkpoint, fingerprint, hugging_face_files
from pcagpt.run.folder import read_record, write_record
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")
V = 97
SIZES = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
HOW = (
    ": its README.md says how to load it; pcagpt knows no tokenizer for it: "
    "--config.data.tokenizer=FILE names one"
)
MODELS = {
    "full": {},
    "one rank": {"n_embd_wte": 4},
    "equal scales": {"n_embd_wte": 4, "n_embd_wte_scale_tying": False},
    "bands": {"band_sizes": (10, 40, 47), "band_ranks": (0, 8, 4)},
    "packed": {
        "band_sizes": (30, 67),
        "band_ranks": (0, 0),
        "band_blocks": (1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0),
    },
    "no bias, exact gelu": {"bias": False, "gelu": "exact"},
}


def write_run(folder, *, seed=0, record=None, vocab_size=V, **model):
    """A run of random weights, made elsewhere; all scale matrices are equal."""
    config = gpt_config(vocab_size=vocab_size, **SIZES, **model)
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "position_of_token" in name:
            return random.permutation(vocab_size).astype(np.int32)
        if np.issubdtype(leaf.dtype, np.integer):
            high = np.iinfo(leaf.dtype).max
            return random.integers(0, high, leaf.shape).astype(leaf.dtype)
        centre, spread = (1, 0.1) if "'scale'" in name else (0, 0.2)
        spread = 0.01 if "columns" in name else spread
        return random.normal(centre, spread, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(
        GPT(config).init, jax.random.key(0), np.zeros((1, 1), np.int32)
    )
    variables = {"constants": {}} | jax.tree_util.tree_map_with_path(fill, shapes)
    for band in variables["params"].get("embed", {}).values():
        if "scale_down" in band:
            band["scale_down"] = band["scale_up"].copy()
    checkpoint.save_weights(folder, variables)
    stored = {
        "model": SIZES | model,
        "vocab_size": vocab_size,
        "data": {"source": "here"},
    }
    write_record(folder, stored | (record or {}))
    return folder


def run_export(model, workdir, form="hf", *words):
    asked = f"--config.model_path={model}", f"--config.workdir={workdir}"
    outcome = call(
        f"--config={CONFIGS / 'export.py'}", *asked, f"--config.format={form}", *words
    )
    assert outcome.code == 0, outcome
    return workdir / "exported" / f"{model.name}_{form}"


def logits_of(folder):
    model, variables = Run.open(folder).load(ModelSettings(compute_dtype="float32"))
    tokens_BT = np.random.default_rng(5).integers(0, V, (3, 16))
    return np.asarray(model.apply(variables, tokens_BT))


def loss_of(folder, workdir, corpus_folder):
    asked = {"model_path": folder, "workdir": workdir, "model": {"n_layer": 2}}
    outcome = call(*tiny("evaluate.py", corpus_folder, **asked))
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)["loss"]


def write_coded(folder, seed=0):
    """A run with a coded table, as compress writes it."""
    table = np.random.default_rng(seed).normal(0, 0.2, (V, 16)).astype(np.float32)
    coded = coding.at_step(coding.prepare(table, Weighting()), 0.05).table
    write_run(folder, record={"compressed": {"method": "coded"}})
    weights = checkpoint.load_weights(folder)
    padding = ((0, 128 - V), (0, 0))
    weights["params"]["embed"]["band_0"]["wte"] = np.pad(coded.dense(), padding)
    shutil.rmtree(folder / "ckpt")
    checkpoint.save_weights(folder, weights)
    coding.write(folder / "table.pcat", coded, coding.Description("coded"))
    return folder


SMALL = ("one rank", "equal scales", "untied", "bands", "packed", "coded")


@pytest.fixture(params=MODELS)
def run(request, tmp_path):
    return write_run(tmp_path / "run", **MODELS[request.param])


def test_an_exported_model_is_read_back_as_the_same_model(run, tmp_path, corpus_folder):
    made = run_export(run, tmp_path / "work")
    assert not list(made.parent.glob(".*"))
    assert len({path.stat().st_mode for path in made.iterdir()}) == 1
    wanted, found = logits_of(run), logits_of(made)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    losses = [loss_of(one, tmp_path / "work", corpus_folder) for one in (run, made)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    again = run_export(made, tmp_path / "again")
    assert fingerprint.of(again) == fingerprint.of(made)


def test_a_parameter_that_gpt2_does_not_have_is_not_dropped(tmp_path):
    weights = trees.flatten(Run.open(write_run(tmp_path / "run")).weights["params"])
    assert hugging_face_files.tensors(weights)
    with pytest.raises(ValueError, match="block_0/attn/q_norm"):
        hugging_face_files.tensors(weights | {"block_0/attn/q_norm": np.ones(2)})
    del weights["block_1/attn/qkv/kernel"]
    with pytest.raises(ValueError, match="block_1/attn/qkv/kernel"):
        hugging_face_files.tensors(weights)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
def test_a_tensor_is_written_with_its_own_shape(shape, tmp_path):
    array = np.arange(np.prod(shape)).reshape(shape[::-1]).T  # no rows in memory
    hugging_face_files.write_tensors(tmp_path / "w.safetensors", {"w": array})
    found = load_file(tmp_path / "w.safetensors")["w"]
    np.testing.assert_array_equal(found, array, strict=True)


def test_a_knob_that_gpt2_does_not_have_is_not_dropped(monkeypatch):
    monkeypatch.setattr(hugging_face_files, "_KNOWN_KNOBS", ("n_layer",))
    with pytest.raises(UserError, match=r"model\.gelu is exact"):
        hugging_face_files.config(ModelSettings(gelu="exact"), V, {})


def write_small(name, folder):
    """(a run with a compressed table, the form that keeps it small)."""
    if name == "coded":
        return write_coded(folder), "coded"
    write = write_untied if name == "untied" else write_run
    return write(folder, **MODELS.get(name, {})), "hf-factored"


@pytest.mark.parametrize("name", SMALL)
def test_an_export_with_a_small_table_is_read_back_as_the_same_run(
    name, tmp_path, corpus_folder
):
    run, form = write_small(name, tmp_path / "run")
    made = run_export(run, tmp_path, form)
    np.testing.assert_array_equal(logits_of(run), logits_of(made))
    losses = [loss_of(one, tmp_path / "work", corpus_folder) for one in (run, made)]
    assert losses[0] == losses[1]
    full = run_export(write_run(tmp_path / "full"), tmp_path)
    assert weight_bytes(made) < weight_bytes(full)


def weight_bytes(folder):
    paths = [*folder.glob("*.safetensors"), *folder.glob("table.pcat")]
    return sum(path.stat().st_size for path in paths)


def test_an_export_with_other_characters_is_another_export(tmp_path):
    texts = [chr(200 + number) for number in range(V)]
    for number, own in enumerate((texts, texts[::-1])):
        record = {"characters": own}
        write_run(tmp_path / str(number) / "run", record=record)
    run_export(tmp_path / "0/run", tmp_path)
    words = f"--config.model_path={tmp_path / '1/run'}", f"--config.workdir={tmp_path}"
    line = refusal(f"--config={CONFIGS / 'export.py'}", *words, unchanged=[tmp_path])
    assert "run_hf holds something else" in line


def test_changed_factors_of_an_export_are_refused(tmp_path):
    for model in ({"n_embd_wte": 4}, {}, MODELS["bands"]):
        run = write_run(tmp_path / str(len(model)), **model)
        made = run_export(run, tmp_path, "npz")
        path = next(made.glob("wte*.npy"))
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            factor_files.read_table(path)


def test_an_export_whose_record_lists_no_files_is_refused(tmp_path):
    made = run_export(write_run(tmp_path / "run"), tmp_path)
    (made / "pcagpt.json").write_text("{}")
    with pytest.raises(UserError, match="pcagpt.json is damaged .'files' is missing"):
        Run.open(made)


@pytest.mark.parametrize("name", ["bands", "coded", "full"])
@pytest.mark.parametrize("damage", ["config.json", "weights", "pcagpt.json"])
def test_a_changed_export_is_refused(name, damage, tmp_path):
    run, form = write_small(name, tmp_path / "run")
    if name == "full":
        form = "hf"
        if damage == "pcagpt.json":  # Without it, the folder is as any other.
            return
    made = run_export(run, tmp_path, form)
    (weights,) = made.glob("*.safetensors")
    path = weights if damage == "weights" else made / damage
    if damage == "pcagpt.json":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    ask = f"--config.model_path={made}", "--config.sample.tokens=1"
    line = refusal(f"--config={CONFIGS / 'sample.py'}", *ask, unchanged=[tmp_path])
    assert path.name in line
    assert ("delete pcagpt.json" in line) == (form == "hf")


@pytest.mark.parametrize("holds", ["nothing", "an export"])
def test_an_export_goes_to_the_folder_that_a_link_names(holds, tmp_path):
    run = write_run(tmp_path / "run", n_embd_wte=4)
    place, disk = tmp_path / "exported/run_hf", tmp_path / "disk/here"
    if holds == "an export":
        run_export(run, tmp_path).rename(tmp_path / "before")
    disk.mkdir(parents=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(disk)
    if holds == "an export":
        shutil.copytree(tmp_path / "before", disk, dirs_exist_ok=True)
        (disk / "config.json").write_text("{}")
    run_export(run, tmp_path, "hf", "--config.overwrite=True")
    assert place.is_symlink() and (disk / "model.safetensors").exists()
    kept = [path.name for path in disk.parent.iterdir() if path != disk]
    assert len(kept) == (holds == "an export")


def test_the_folder_has_one_table_of_the_real_vocabulary(tmp_path):
    run = write_run(tmp_path / "run", n_embd_wte=4)
    made = run_export(run, tmp_path)
    content = (made / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["transformer.wte.weight"]["shape"] == [V, 16]
    assert header["transformer.h.0.mlp.c_fc.weight"]["shape"] == [16, 64]
    assert header["__metadata__"] == {"format": "pt"}
    assert "lm_head.weight" not in header
    config = json.loads((made / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == V
    card = (made / "README.md").read_text()
    assert "This form saves no memory" in card
    assert f"| token table, in full | {V * 16:,} | {V * 64:,} |" in card
    factors = (V + 16) * 4
    assert f"| token table, as factors | {factors} | {4 * factors:,} |" in card
    plain = run_export(write_run(tmp_path / "plain"), tmp_path)
    assert "saves no memory" not in (plain / "README.md").read_text()


@pytest.mark.parametrize("name", ["equal scales", "untied", "bands", "packed"])
def test_the_card_tells_the_bytes_that_are_written(name, tmp_path):
    run, form = write_small(name, tmp_path / "run")
    made = run_export(run, tmp_path / "work", form)
    card = (made / "README.md").read_text()
    rows = r"^\| (?:token table, (?!in full)|other).* ([\d,]+) \|$"
    told = re.findall(rows, card, re.MULTILINE)
    tensors = load_file(made / "model.safetensors").values()
    assert len(told) == 2
    assert sum(int(n.replace(",", "")) for n in told) == sum(t.nbytes for t in tensors)


def test_the_card_shows_the_losses_of_this_checkpoint(trained, tmp_path, corpus_folder):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    asked = {"model_path": run, "split": "test"}
    assert call(*tiny("evaluate.py", corpus_folder, **asked)).code == 0
    lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
    losses = [line.split(" | ")[1:3] for line in lines if line.startswith("| `")]
    result = json.loads((run / "result.json").read_text())
    (file,) = run.glob("evaluation_*_test_*.json")
    loss = json.loads(file.read_text())["loss"]
    assert losses == [
        ["val", f"{result['val_loss']:.4f}"],
        ["test", f"{loss:.4f}"],
    ]
    assert any(line.startswith("- D, baseline: ") for line in lines)
    earlier = run_export(run / "ckpt/1", tmp_path / "early")
    assert "| `" not in (earlier.parent / "gpt_baseline_hf/README.md").read_text()


def test_the_card_of_a_compressed_run_tells_how_long_d_was_trained(tmp_path):
    compressed = {"method": "svd", "rank": 4, "step": 3}
    record = {"arm": "baseline", "train": {"steps": 4}, "compressed": compressed}
    run = write_run(tmp_path / "run", record=record, n_embd_wte=4)
    lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
    (made,) = (line for line in lines if line.startswith("- D, baseline: "))
    assert made.endswith("; 3 of 4 steps")


def test_the_card_of_a_model_trained_further_names_where_it_started(tmp_path):
    record = {"arm": "pca_finetune", "train": {"steps": 4}}
    record["init"] = {"weights_from": "runs/compressed/best_coded_k4"}
    for distill, words in (({}, ""), ({"teacher": "D"}, " on the predictions of a")):
        run = write_run(tmp_path / "run", record=record | {"distill": distill})
        lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
        (made,) = (line for line in lines if line.startswith("- B"))
        assert made.startswith(
            f"- B: all weights of best_coded_k4, trained further{words}"
        )
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "exported")
    for start, named in (
        ("runs/gpt_baseline/ckpt/375", "gpt_baseline, step 375"),
        ("ckpt/375", "375"),
        (".", "."),
        ("/model", "model"),
    ):
        record["init"] = {"weights_from": start}
        run = write_run(tmp_path / "run", record=record)
        card = (run_export(run, tmp_path) / "README.md").read_text()
        assert f"all weights of {named}, trained further" in card
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "exported")


def test_the_card_shows_no_loss_of_weights_that_were_replaced(tmp_path, corpus_folder):
    run = write_run(tmp_path / "run")
    loss_of(run, tmp_path, corpus_folder)
    shutil.rmtree(run / "ckpt")
    write_run(run, seed=1)
    assert "| `" not in (run_export(run, tmp_path) / "README.md").read_text()


def test_the_card_has_a_line_for_each_length_of_windows(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    step = json.loads((run / "result.json").read_text())["steps"]
    tokens = {"corpus": "one", "split": "test", "tokens_predicted": 90}
    for window in (8, 16):
        protocol = tokens | {"tokens_sha256": "a", "window": window}
        content = {"step": step, "loss": 1.0 + window, "protocol": protocol}
        write_json(run / f"evaluation_one_test_{window}.json", content)
    lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
    shown = [line.strip("| ").split(" | ") for line in lines if " test " in line]
    assert [[row[0], row[2], row[5]] for row in shown] == [
        ["`one`", "17.0000", "16"],
        ["`one`", "9.0000", "8"],
    ]


def test_the_card_has_a_line_for_each_compute_dtype(trained, tmp_path, corpus_folder):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    for dtype in ("float32", "bfloat16"):
        asked = {"model_path": run, "model.compute_dtype": dtype}
        assert call(*tiny("evaluate.py", corpus_folder, **asked)).code == 0
    lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
    shown = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    # result.json has one of them, too.
    assert shown == [
        f"| `{corpus_folder.name}, in {dtype}`" for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize("missing", [0, 5])
def test_the_card_tells_two_corpora_of_one_name_apart(
    missing, trained, tmp_path, corpus_folder
):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    other = shutil.copytree(corpus_folder, tmp_path / "other" / corpus_folder.name)
    tokens = np.fromfile(other / "test.bin", np.uint16)
    tokens[::-1][missing:].tofile(other / "test.bin")
    for corpus in (other, corpus_folder):
        asked = {"model_path": run, "split": "test"}
        assert call(*tiny("evaluate.py", corpus, **asked)).code == 0
    lines = (run_export(run, tmp_path) / "README.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith("| `") and " test " in line]
    assert len({line.split(" | ")[0] for line in shown}) == len(shown) == 2
    assert all(f"{corpus_folder.name}, tokens " in line for line in shown)


@pytest.mark.parametrize(
    "name", ["evaluation_x_val_step0.json", "../sweep.json", "../advice.json"]
)
def test_a_measurement_that_the_card_cannot_read_is_named(name, tmp_path, caplog):
    made = {"method": "svd", "fingerprint": "x"}
    run = write_run(tmp_path / "run", record={"compressed": made})
    (run / name).write_text("{")
    source = open_source(Settings(task="export", model_path=str(run)))
    for _ in range(2):
        assert measured(source, tmp_path) == []
    (line,) = [one for one in caplog.messages if "model card" in one]
    assert f"{(run / name).resolve()} is damaged" in line
    assert "delete it to measure again" in line


def test_the_card_leaves_out_a_measurement_with_an_odd_protocol(tmp_path):
    run, plain = write_run(tmp_path / "run"), {"corpus": "x"}
    own = {"status": "done", "steps": 0, "step": 0, "loss": 3, "val_loss": 3}
    source = open_source(Settings(task="export", model_path=str(run)))

    def count(file, protocol, **fields):
        (run / file).write_text(json.dumps(own | fields | {"protocol": protocol}))
        return len(measured(source, tmp_path))

    for file in ("result.json", "evaluation_x_val_step0.json"):
        for name, values in {
            "corpus": ([], 3, None),
            "split": ([], 3, None),
            "window": ("x",),
            "tokens_predicted": ({},),
            "tokens_sha256": ([], 3),
        }.items():
            for value in values:
                assert count(file, plain | {name: value}) == 0
        assert count(file, "text") == count(file, plain, loss="", val_loss="") == 0
        assert count(file, plain) == 1
        (run / file).unlink()


# Its tokenizer.


def test_characters_and_a_named_tokenizer_go_along(tmp_path):
    texts = [chr(32 + number) for number in range(V)]
    run = write_run(tmp_path / "run", record={"characters": texts})
    made = run_export(run, tmp_path)
    assert Run.open(made).record["characters"] == tuple(texts)
    other = "--config.data.tokenizer=sotu4096"
    asked = f"--config={CONFIGS / 'export.py'}", f"--config.model_path={run}", other
    assert "its own 97 characters: leave it out" in refusal(*asked, unchanged=[run])
    bare = run_export(write_run(tmp_path / "bare"), tmp_path)
    assert "knows no tokenizer for the token ids" in (bare / "README.md").read_text()
    assert Run.open(bare).record["tokenizer"] is None
    line = refusal(*asked[:1], f"--config.model_path={bare}", other, unchanged=[bare])
    assert "sotu4096 has 4096 tokens, the model of" in line


def write_corpus(folder, **meta):
    folder.mkdir()
    for split in ("train", "val"):
        (np.arange(999) % V).astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": V} | meta))
    return folder


def test_an_exported_model_refuses_tokens_of_another_numbering(tmp_path):
    texts = [chr(200 + number) for number in range(V)]
    own = write_corpus(tmp_path / "own", itos=texts)
    stated = write_corpus(tmp_path / "stated", itos=texts, tokenizer_sha256="x")
    other = write_corpus(tmp_path / "other", itos=texts[::-1])
    unknown = write_corpus(tmp_path / "unknown")
    characters = run_export(
        write_run(tmp_path / "run", record={"characters": texts}), tmp_path
    )
    record = {"tokenizer": "sotu4096"}
    named = write_run(tmp_path / "named", vocab_size=4096, record=record)
    named = run_export(named, tmp_path)
    for model, corpus, is_refused in (
        (characters, own, False),
        (characters, stated, False),
        (characters, unknown, False),
        (characters, other, True),
    ):
        for config in ("evaluate.py", "compress.py"):
            asked = {"model_path": model, "workdir": tmp_path / "runs"}
            asked["model"] = {"n_layer": 2}
            if config == "compress.py":
                asked |= {"ranks": 4, "compress": {"methods": "svd", "bands": 1}}
            arguments = tiny(config, corpus, **asked)
            if is_refused:
                line = refusal(*arguments, unchanged=[model, corpus])
                assert f"{corpus.name} numbers its tokens in another way" in line
            elif config == "evaluate.py":
                assert call(*arguments).code == 0
    asked = {"model_path": named, "workdir": tmp_path / "runs", "model": {"n_layer": 2}}
    outcome = call(*tiny("evaluate.py", other, **asked))
    assert json.loads(outcome.out)["protocol"]["tokenizer"] == "sotu4096"


def test_an_export_with_another_tokenizer_is_another_export(tmp_path):
    run = write_run(tmp_path / "run", vocab_size=4100)
    run_export(run, tmp_path)
    named = "--config.data.tokenizer=sotu4096"
    words = f"--config.model_path={run}", f"--config.workdir={tmp_path}", named
    line = refusal(f"--config={CONFIGS / 'export.py'}", *words, unchanged=[run])
    assert "run_hf holds something else" in line
    made = run_export(run, tmp_path / "named", "hf", named)
    assert Run.open(made).record["tokenizer"] == "sotu4096"


# The table of another architecture.


def write_table_of_another(folder, method="svd", names=("model.embed_tokens.weight",)):
    """The folder of a table of 'theirs', as `compress` writes it."""
    config = {"model_type": "llama", "hidden_size": 16, "vocab_size": V}
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    theirs = folder / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text(json.dumps(config))
    table = np.random.default_rng(0).normal(0, 0.2, (V, 16)).astype(np.float32)
    tensors = dict.fromkeys(names, table)
    hugging_face_files.write_tensors(theirs / "model.safetensors", tensors)
    run = Run.open(theirs, any_architecture=True)
    made = {"run": str(theirs), "run_from_here": "../theirs"}
    made |= {"fingerprint": run.fingerprint, "method": method}
    if method == "svd":
        made["table_sha256"] = write_factors(folder / "table", table, 4)
    else:
        codes = codes_of(method, table, 9000)
        made["table_sha256"] = codes.sha256
        description = coding.Description(method, checkpoint=run.fingerprint)
        (folder / "table").mkdir()
        KINDS[method].write(folder / "table" / KINDS[method].file, codes, description)
    write_record(folder / "table", run.record | {"compressed": made})
    return folder / "table"


def codes_of(method, table, most_bytes):
    return KINDS[method].make(coding.prepare(table, Weighting()), 1, most_bytes)[0]


def write_factors(folder, table, rank):
    """Writes factors/ of a rank; returns the hash of the factors."""
    made, _ = Factorizer(table, "svd").of_rank(rank, 1)
    factor_files.write_bands(folder / "factors", made)
    return made.sha256


def source_of(folder):
    return open_source(Settings(task="export", model_path=str(folder)))


def test_factors_of_another_table_than_the_record_names_are_refused(tmp_path):
    folder = write_table_of_another(tmp_path)
    stated = read_record(folder)["compressed"]["table_sha256"]
    assert source_of(folder).identity["table_sha256"] == stated
    shutil.rmtree(folder / "factors")
    write_factors(folder, np.random.default_rng(1).normal(size=(V, 16)), 2)
    with pytest.raises(UserError, match="factors is another table than the one"):
        source_of(folder)


def test_a_table_whose_model_got_another_tokenizer_is_refused(tmp_path):
    folder = write_table_of_another(tmp_path)
    record = read_record(folder) | {"tokenizer_sha256": "0" * 64}
    write_record(folder, record)
    with pytest.raises(UserError, match="theirs has another tokenizer than when"):
        source_of(folder)


@pytest.mark.parametrize("told_by", ["record", "command", "nothing"])
def test_a_table_leaves_with_the_tokenizer_that_its_model_lacks(told_by, tmp_path):
    (tmp_path / "own").mkdir()
    word_level(tmp_path / "own")
    file, folder = tmp_path / "own/tokenizer.json", write_table_of_another(tmp_path)
    (tmp_path / "theirs/added_tokens.json").write_text('{"<of another>": 9}')
    told = {"tokenizer": str(file)}
    told["tokenizer_sha256"] = vocabulary.describe(str(file)).sha256
    if told_by == "record":
        write_record(folder, read_record(folder) | told)
    asked = f"--config.model_path={folder}", f"--config.workdir={tmp_path}"
    words = (f"--config.data.tokenizer={file}",) * (told_by == "command")
    outcome = call(f"--config={CONFIGS / 'export.py'}", *asked, *words)
    assert outcome.code == 0, outcome
    made, is_told = tmp_path / "exported/table_hf", told_by != "nothing"
    assert ("pcagpt knows no tokenizer" in outcome.out) != is_told
    assert ("for the token ids" in (made / "README.md").read_text()) != is_told
    name = str(made / "tokenizer.json") if is_told else None
    assert Run.open(made, any_architecture=True).record["tokenizer"] == name
    assert (made / "tokenizer_config.json").exists() == is_told
    assert (made / "added_tokens.json").exists() != is_told
    if told_by == "record":
        words = f"--config={CONFIGS / 'export.py'}", *asked
        other = refusal(*words, "--config.data.tokenizer=gpt2", unchanged=[tmp_path])
        assert "data.tokenizer is 'gpt2', but" in other
        file.rename(tmp_path / "moved.json")
        gone = f"{file}, the tokenizer of {folder}, is gone: restore it, or name the"
        assert gone in refusal(*words, unchanged=[tmp_path])


def test_the_card_tells_in_which_type_transformers_computes(tmp_path):
    folder = write_table_of_another(tmp_path)
    for dtype, is_told in (("bfloat16", True), ("float32", False)):
        source = source_of(folder)
        config = source.config() | {"dtype": dtype}
        source.config = lambda config=config: config
        for form in ("hf", "coded"):
            card = model_card(source, form, [])
            assert ("weights are in bfloat16" in card) == is_told


def test_a_table_that_was_moved_with_its_model_finds_it(tmp_path):
    before = tmp_path / "before/project"
    before.mkdir(parents=True)
    table = write_table_of_another(before).relative_to(before)
    theirs = source_of(before / table).original.fingerprint
    after = before.rename(tmp_path / "after")
    found = source_of(after / table)
    assert found.original.folder == after / "theirs"
    assert found.original.fingerprint == theirs
    # Another model is now at the old place.
    write_gpt2(before / "theirs")
    assert source_of(after / table).original.folder == after / "theirs"
    shutil.rmtree(after / "theirs")
    with pytest.raises(UserError, match="is a table of another model than the one in"):
        source_of(after / table)


def test_a_table_whose_model_is_gone_names_it(tmp_path):
    folder = write_table_of_another(tmp_path)
    shutil.move(tmp_path / "theirs", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"model in {tmp_path}/theirs, which is gone"):
        source_of(folder)


@pytest.mark.parametrize("method", KINDS)
def test_codes_of_another_table_than_the_record_names_are_refused(method, tmp_path):
    folder = write_table_of_another(tmp_path, method)
    path = folder / KINDS[method].file
    codes, description = KINDS[method].read(path)
    assert source_of(folder).identity["table_sha256"] == sha256_of_file(path)
    renewed = dataclasses.replace(description, predicted_loss=0.25)
    KINDS[method].write(path, codes, renewed)
    assert source_of(folder).identity["table_sha256"] == sha256_of_file(path)
    smaller = codes_of(method, codes.dense(), 5000)
    KINDS[method].write(path, smaller, description)
    with pytest.raises(UserError, match=f"{path.name} is another table than the one"):
        source_of(folder)


def test_a_tensor_of_the_table_s_shape_may_have_a_name_without_a_dot(tmp_path):
    names = "model.embed_tokens.weight", "odd"
    source = source_of(write_table_of_another(tmp_path, names=names))
    assert source.table_name == names[0]


@dataclasses.dataclass
class OtherCodes:
    """What `Codes` asks for, and no more."""

    sizes: tuple
    ranks: tuple
    memory: int
    constants: dict | None
    blocks: tuple

    def dense(self):
        return np.zeros((V, 16), np.float32)


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_a_new_kind_of_codes_is_exported_by_its_protocol(name, tmp_path):
    source = source_of(write_run(tmp_path / "run", **MODELS["packed"]))
    own = source.table
    parts = [getattr(own, field.name) for field in dataclasses.fields(OtherCodes)]
    wanted, found = tmp_path / "wanted", tmp_path / "found"
    wanted.mkdir()
    found.mkdir()
    formats.write_factored(wanted, source)
    source.__dict__["table"] = table = OtherCodes(*parts)
    if name == "dense":
        table.constants = None
        with pytest.raises(UserError, match="without factors and without packed codes"):
            formats.write_factored(tmp_path, source)
        return
    formats.write_factored(found, source)
    for path in wanted.iterdir():
        assert path.read_bytes() == (found / path.name).read_bytes(), path


# npz.


def test_the_factors_are_the_files_that_imports_read(tmp_path, corpus_folder):
    run = write_run(tmp_path / "run", n_embd_wte=4)
    made = run_export(run, tmp_path, "npz")
    params = checkpoint.load_weights(run)["params"]["embed"]["band_0"]
    table = factor_files.read_table(made / "wte_pca_k4.npy")
    scales = factor_files.read_scale_matrices(made / "scale_mats_pca_k4.npz")
    np.testing.assert_array_equal(table, params["wte"][:V])
    np.testing.assert_array_equal(scales.scale_up, params["scale_up"])
    np.testing.assert_array_equal(scales.scale_down, params["scale_up"])
    init = {
        "import_wte_npy": made / "wte_pca_k4.npy",
        "import_scale_matrices_npz": made / "scale_mats_pca_k4.npz",
        "blocks_from": run,
    }
    knobs = {
        "init": init,
        "model": {"n_layer": 2, "n_embd_wte": 4},
        "workdir": tmp_path,
    }
    outcome = call(*tiny("pca_finetune_k128.py", corpus_folder, **knobs))
    assert outcome.code == 0, outcome


def test_bands_a_full_table_and_untied_scales_have_their_files(tmp_path):
    run = write_run(tmp_path / "bands", **MODELS["bands"])
    table = factor_files.read_bands(run_export(run, tmp_path, "npz"))
    assert (table.sizes, table.ranks) == ((10, 40, 47), (0, 8, 4))
    dense = run_export(run, tmp_path) / "model.safetensors"
    assert dense.exists()
    tied = Run.open(dense.parent).table()
    np.testing.assert_allclose(table.dense(), tied, atol=1e-6)
    full = run_export(write_run(tmp_path / "full"), tmp_path, "npz")
    assert np.load(full / "wte.npy").shape == (V, 16)
    untied = write_untied(tmp_path / "untied")
    scales = np.load(run_export(untied, tmp_path, "npz") / "scale_mats_pca_k4.npz")
    assert not np.array_equal(scales["scale_up"], scales["scale_down"])


def write_untied(folder, **model):
    """A run whose scale matrices differ."""
    made = write_run(folder, n_embd_wte=4, n_embd_wte_scale_tying=False)
    weights = checkpoint.load_weights(made)
    weights["params"]["embed"]["band_0"]["scale_down"] *= 2
    shutil.rmtree(made / "ckpt")
    checkpoint.save_weights(made, weights)
    return made


# What is kept and refused.


@pytest.mark.parametrize("name", ["exported", "exported/run_hf"])
def test_a_file_in_place_of_a_folder_is_refused_by_its_name(tmp_path, name):
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    run = write_run(tmp_path / "run")
    ask = (
        f"--config={CONFIGS / 'export.py'}",
        f"--config.model_path={run}",
        f"--config.workdir={tmp_path}",
    )
    for overwrite in (False, True):
        line = refusal(*ask, f"--config.overwrite={overwrite}", unchanged=[tmp_path])
        assert f"{place} is a file, not a folder: move it away" in line


def test_the_same_export_is_not_written_again_and_a_damaged_one_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    made = run_export(run, tmp_path)
    before = snapshot(made)
    run_export(run, tmp_path)
    assert snapshot(made) == before
    (made / "README.md").write_text("my notes")
    ask = (
        f"--config={CONFIGS / 'export.py'}",
        f"--config.model_path={run}",
        f"--config.workdir={tmp_path}",
    )
    said = f"{made} holds an export, but {made / 'README.md'} was changed or damaged"
    assert said in refusal(*ask, unchanged=[tmp_path])
    run_export(run, tmp_path, "hf", "--config.overwrite=True")
    (kept,) = made.parent.glob("run_hf.replaced-*")
    assert (kept / "README.md").read_text() == "my notes"
    assert "written by pcagpt" in (made / "README.md").read_text()


def test_another_checkpoint_of_the_run_is_named_by_its_step(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    config = f"--config={CONFIGS / 'export.py'}"
    workdir = f"--config.workdir={tmp_path}"
    assert call(config, f"--config.model_path={run / 'ckpt/1'}", workdir).code == 0
    line = refusal(config, f"--config.model_path={run}", workdir, unchanged=[tmp_path])
    assert "hf holds gpt_baseline at step 1, and this is step 2: use another" in line


def test_an_export_says_that_its_card_lacks_a_later_evaluation(
    trained, tmp_path, corpus_folder
):
    run = shutil.copytree(trained, tmp_path / "gpt_baseline")
    made, factors = (run_export(run, tmp_path, form) for form in ("hf", "npz"))
    before = snapshot(made)
    asked = {"model_path": run, "split": "test"}
    assert call(*tiny("evaluate.py", corpus_folder, **asked)).code == 0
    words = (
        f"--config={CONFIGS / 'export.py'}",
        f"--config.model_path={run}",
        f"--config.workdir={tmp_path}",
    )
    said = call(*words).out
    assert f"{made} is done, but its README.md shows other losses than {run}" in said
    assert snapshot(made) == before
    assert call(*words, "--config.format=npz").out == f"{factors} is done\n"
    assert "was written" in call(*words, "--config.overwrite=True").out
    assert " | test | " in (made / "README.md").read_text()
    (kept,) = made.parent.glob("gpt_baseline_hf.replaced-*")
    assert " | test | " not in (kept / "README.md").read_text()
    assert call(*words, "--config.overwrite=True").out == f"{made} is done{HOW}\n"


def test_two_commands_at_once_make_one_export(tmp_path):
    run = write_run(tmp_path / "run")
    ask = f"--config.model_path={run}", f"--config.workdir={tmp_path}"
    words = [sys.executable, "-m", "pcagpt.main", "--config=configs/export.py", *ask]
    started = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [command.communicate()[0].splitlines()[-1] for command in started]
    assert [command.returncode for command in started] == [0, 0]
    made = tmp_path / "exported/run_hf"
    assert sorted(said) == [f"{made} is done{HOW}", f"{made} was written{HOW}"]
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")

    def fail(*_):
        raise OSError(28, "No space left on device", "here")

    monkeypatch.setattr(hugging_face_files, "write_config", fail)
    ask = f"--config.model_path={run}", f"--config.workdir={tmp_path / 'work'}"
    outcome = call(f"--config={CONFIGS / 'export.py'}", *ask)
    assert outcome.code == 2, outcome
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("write", "form", "words"),
    [
        (write_untied, "hf", "two different scale matrices"),
        (write_run, "hf-factored", "without factors and without packed codes"),
        (write_run, "coded", "has no coded table"),
        (
            lambda folder: write_run(folder, **MODELS["packed"]),
            "npz",
            "a table of codes, which has no factors",
        ),
        (lambda folder: folder.mkdir() or folder, "hf", "holds no finished checkpoint"),
    ],
)
def test_a_model_that_the_form_cannot_hold_is_refused(write, form, words, tmp_path):
    run = write(tmp_path / "run")
    ask = f"--config.model_path={run}", f"--config.format={form}"
    workdir = f"--config.workdir={tmp_path / 'work'}"
    line = refusal(
        f"--config={CONFIGS / 'export.py'}", *ask, workdir, unchanged=[tmp_path]
    )
    assert words in line
    assert not (tmp_path / "work").exists()


def test_a_model_of_another_program_can_be_exported_as_a_table(tmp_path):
    theirs = write_gpt2(tmp_path / "theirs")
    before = snapshot(theirs)
    made = run_export(theirs, tmp_path / "work", "npz")
    np.testing.assert_array_equal(np.load(made / "wte.npy"), Run.open(theirs).table())
    assert snapshot(theirs) == before


def test_an_exported_table_is_not_compressed_again(tmp_path, corpus_folder):
    made = run_export(write_coded(tmp_path / "run"), tmp_path / "work")
    asked = {"model_path": made, "workdir": tmp_path / "again", "model": {"n_layer": 2}}
    line = refusal(*tiny("compress.py", corpus_folder, **asked), unchanged=[made])
    assert f"{made} has a compressed table" in line


def test_a_compressed_model_keeps_its_order_of_tokens(tmp_path):
    run = write_run(tmp_path / "run", **MODELS["bands"])
    flat = trees.flatten(checkpoint.load_weights(run)["params"])
    constants = checkpoint.load_weights(run)["constants"]
    position = constants["embed"]["position_of_token"]
    token = int(np.flatnonzero(position == 3)[0])
    made = Run.open(run_export(run, tmp_path)).table()
    np.testing.assert_array_equal(made[token], flat["embed/band_0/wte"][3])
    assert read_record(run)["model"]["n_embd"] == 16
