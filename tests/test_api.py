"""pcagpt as a library: what it returns, refuses, and leaves alone."""

import dataclasses
import errno
import inspect
import itertools
import json
import logging
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import types
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpt2_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiktoken
import tokenizers
from command_line import CONFIGS, ROOT, call, tiny
from runs import json_of, quick_compiles

import pcagpt
from pcagpt.api import calls
from pcagpt.coding.table import CodedTable, InexactSums
from pcagpt.compression.codes import KINDS
from pcagpt.config import KNOBS, effort
from pcagpt.data import tokenize
from pcagpt.factorization.factor_files import read_bands, read_table
from pcagpt.run import calibrate, lock
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")

TEXT = "The people of the United States and their Congress. Naïve café in 東京. "
BOUND = {"max_bytes": 13_000, "methods": "svd", "max_tokens": 320}
SMALL = {"train": TEXT * 60, "val": TEXT * 3}
NEW_FOLDER = "name a folder that is not there"


@pytest.fixture(scope="session")
def place(shared, compiled):
    """A folder with a corpus, `text`, and a trained run on it, `gpt_baseline`."""

    def make(folder):
        (folder / "text").mkdir()
        for split, count in (("train", 60), ("val", 24)):
            (folder / "text" / f"{split}.txt").write_text(TEXT * count)
        knobs = {"train": {"steps": 20, "learning_rate": 0.01}}
        knobs["data"] = {"tokenizer": "sotu4096"}
        with quick_compiles(compiled):
            done = call(*tiny("baseline.py", folder / "text", workdir=folder, **knobs))
        assert done.code == 0, done

    return shared("api", make)


@pytest.fixture(scope="session")
def run(place):
    return place / "gpt_baseline"


@pytest.fixture(scope="session")
def model(run):
    return pcagpt.load(run)


@pytest.fixture(autouse=True)
def calibrates_quickly(monkeypatch):
    """Statistics of a few windows, where a test or a command names no number."""
    few = effort.CPU._replace(calibration_tokens=512)
    monkeypatch.setattr(effort, "CPU", few)


@pytest.fixture(scope="session")
def val(run):
    """The ids of the validation split."""
    (file,) = run.parent.glob("data/text-*/val.bin")
    return np.fromfile(file, np.uint16)


def files_of(*folders):
    """{file: time of its last change} of all files."""
    files = [path for folder in folders for path in Path(folder).rglob("*")]
    return {path: path.stat().st_mtime_ns for path in files}


def run_alone(script, prints_errors=False, **options):
    """What another Python process prints; without `prints_errors`, no stderr."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert prints_errors or not done.stderr, done.stderr
    return done.stdout


# The package


def test_importing_pcagpt_imports_no_package_that_takes_time():
    found = run_alone("import sys, pcagpt; print(*sys.modules)").split()
    assert not {"jax", "numpy", "absl", "pcagpt.api", "pcagpt.errors"} & {*found}


def test_names_are_those_that_are_declared():
    assert {*pcagpt.__all__} <= {*dir(pcagpt)}
    assert pcagpt.UserError.__name__ == "UserError"
    assert run_alone("import pcagpt; print(pcagpt.api.load is pcagpt.load)") == "True\n"
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = pcagpt.fit


def test_every_public_function_has_types_and_a_docstring():
    owners = [pcagpt.Model, pcagpt.Compressed, pcagpt.Factorization]
    functions = [pcagpt.load, pcagpt.api.compress, pcagpt.api.factorize]
    for owner in owners:
        assert owner.__doc__
        public = {n: f for n, f in vars(owner).items() if not n.startswith("_")}
        functions += [f for f in public.values() if inspect.isfunction(f)]
    assert len(functions) >= 10
    for function in functions:
        parameters = set(inspect.signature(function).parameters) - {"self"}
        assert typing.get_type_hints(function).keys() == parameters | {"return"}
        assert function.__doc__
    assert (Path(pcagpt.__file__).parent / "py.typed").is_file()
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in built["package-data"]["pcagpt"]


def test_defaults_are_those_of_the_knobs():
    generate = inspect.signature(pcagpt.Model.generate).parameters
    for name in ("temperature", "top_k", "top_p"):
        assert generate[name].default == KNOBS[f"sample.{name}"].default
    assert generate["max_tokens"].default == KNOBS["sample.tokens"].default
    assert generate["seed"].default == KNOBS["seed"].default
    assert {*calls.ARGUMENTS} < KNOBS.keys()


def test_the_process_stays_as_it_was_and_nothing_is_printed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = f"""
import logging, os, signal, sys, threading, warnings
import jax, scipy.special  # They change the environment and the filters.
def state():
    handlers = [signal.getsignal(number) for number in range(1, 32)]
    logs = logging.root.handlers, logging.root.level, logging.getLogger('absl').level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    settings = {{n: v for n, v in jax.config.values.items()}}
    place = dict(os.environ), os.getcwd(), sys.stdout, sys.stderr
    return [place, handlers, str(logs), hooks, settings]
before = state()
import pcagpt
model = pcagpt.load({str(run)!r})
model.loss('The people'), model.logits('The'), list(model.generate('The', max_tokens=2))
small = pcagpt.compress(model, **{BOUND})
small.save('small')
pcagpt.load('small').table
for one, other in zip(before, state()):
    assert one == other, (one, other)
"""
    before = files_of(run.parent)
    assert run_alone(script) == ""
    assert files_of(run.parent) == before
    assert os.listdir(tmp_path) == ["small"]


# Models


def test_loss_is_that_of_the_command(model, run, val, place):
    assert len(val) > 33 * model.block_size
    words = ("--config.mesh.data=1", f"--config.workdir={place / 'measured'}")
    done = call(
        f"--config={CONFIGS / 'evaluate.py'}", f"--config.model_path={run}", *words
    )
    assert done.code == 0, done
    (file,) = run.glob("evaluation_text_val_step20.json")
    assert model.loss(val) == json_of(file)["loss"]
    file.unlink()


def test_loss_is_the_mean_of_what_the_logits_say_in_each_window(model, val):
    tokens = val[:41]  # 40 targets: windows of 16, 16 and 8.
    losses = []
    for start in (0, 16, 32):
        window = tokens[start : start + 17].astype(int)
        logits = model.logits(window[:-1]).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses += [-log_p[at, token] for at, token in enumerate(window[1:])]
    assert len(losses) == 40
    assert model.loss(tokens) == pytest.approx(np.mean(losses), abs=1e-5)


def test_text_is_read_with_the_tokenizer_of_the_model(model):
    tokens = model.encode(f"<|endoftext|>{TEXT}")
    assert tokens[0] == 4095 and tokens.dtype == np.int32
    assert model.decode(tokens[1:]) == TEXT
    assert model.loss(TEXT) == model.loss(tokens[1:]) != model.loss(tokens)
    assert model.loss(TEXT) == model.loss(tokens[1:].tolist())
    np.testing.assert_array_equal(
        model.logits("The people"), model.logits(model.encode("The people"))
    )


def test_logits_are_of_each_token_and_do_not_depend_on_later_ones(model):
    tokens = model.encode(TEXT)[:16]
    logits = model.logits(tokens)
    assert logits.shape == (16, 4096) and logits.dtype == np.float32
    np.testing.assert_allclose(model.logits(tokens[:5]), logits[:5], atol=1e-5)
    assert np.abs(logits[1:] - logits[:-1]).max() > 0.1


def test_attributes_describe_the_model(model, run):
    assert (model.path, model.step, model.block_size) == (run, 20, 16)
    assert (model.vocab_size, model.width) == model.table.shape == (4096, 16)
    assert model.table.dtype == np.float32
    assert f"{run}, step 20, table [4096, 16]" in repr(model)
    assert pcagpt.load(run / "ckpt" / "20").step == 20


def test_a_model_is_used_from_another_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    found = pcagpt.load("gpt_baseline")
    monkeypatch.chdir(tmp_path)
    assert found.path == run
    small = pcagpt.compress(found, **BOUND).save("small")
    assert pcagpt.load("small").path == small == tmp_path / "small"


def test_a_model_of_hugging_face_opens_with_its_own_table(tmp_path):
    tensors = gpt2_folders.tensors()
    folder = gpt2_folders.write(tmp_path / "model", tensors)
    before = files_of(folder)
    model = pcagpt.load(folder)
    np.testing.assert_array_equal(model.table, tensors[gpt2_folders.TABLE])
    assert model.logits([1, 2, 3]).shape == (3, 97)
    assert files_of(folder) == before
    words = "model has no tokenizer: open it with tokenizer=FILE, such as its tokenizer"
    with pytest.raises(pcagpt.UserError, match=words):
        model.loss("text")
    with pytest.raises(pcagpt.UserError, match="have shape .* and dtype timedelta64"):
        model.loss(np.array([1, 2, 3], "m8[s]"))


def words(folder, *texts):
    """Writes a tokenizer of words; each one's id is its number."""
    ids = {text: number for number, text in enumerate(texts)}
    model = tokenizers.models.WordLevel(ids, unk_token=texts[0])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["tok", "~/tok"])
def test_a_named_tokenizer_is_the_one_that_was_there_when_the_model_was_loaded(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    gpt2_folders.write(tmp_path / "model")
    words(tmp_path / "tok", "u", "a", "b")
    words(tmp_path / "other/tok", "u", "b", "a")
    first, second = (pcagpt.load("model", tokenizer=name) for _ in range(2))
    monkeypatch.chdir(tmp_path / "other")
    assert first.encode("a b").tolist() == [1, 2]
    bound = BOUND | {"max_bytes": 3000, "data": {"train": "a b " * 99, "val": "a b a"}}
    saved = pcagpt.compress(first, **bound).save(tmp_path / "saved")
    assert pcagpt.load(saved).encode("a b").tolist() == [1, 2]
    same = pcagpt.compress(tmp_path / "model", tokenizer="~/tok", **bound)
    assert pcagpt.load(same.save(tmp_path / "same")).encode("a b").tolist() == [1, 2]
    words(tmp_path / "tok", "u", "b", "a")
    assert first.encode("a b").tolist() == [1, 2]  # It is in memory.
    changed = f"{tmp_path}/tok/tokenizer.json is another tokenizer now"
    for use in (lambda: second.encode("a"), lambda: pcagpt.compress(first, **bound)):
        with pytest.raises(pcagpt.UserError, match=changed):
            use()


@pytest.mark.parametrize("name", ["gpt_baseline", "gpt_pca_k8", "gpt_pca_finetune_k8"])
def test_the_table_of_a_run_is_multiplied_out(finished_experiment, name):
    run = Path(finished_experiment.workdir) / name
    embed = pcagpt.load(run)._run.weights["params"]["embed"]["band_0"]
    wanted = embed["wte"] @ embed["scale_up"] if "scale_up" in embed else embed["wte"]
    found = pcagpt.load(run).table
    np.testing.assert_allclose(found, wanted[:97], atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_generated_text_is_that_of_the_command_in_pieces(model, run):
    options = {"temperature": 1.5, "top_k": 300, "top_p": 0.9}
    words = [f"--config.sample.{name}={value}" for name, value in options.items()]
    words += ["--config.sample.prompt=The people", "--config.sample.tokens=30"]
    source = f"--config.model_path={run}"
    done = call(f"--config={CONFIGS / 'sample.py'}", source, "--config.seed=3", *words)
    pieces = list(model.generate("The people", max_tokens=30, seed=3, **options))
    text = "".join(pieces)
    assert len(pieces) > 5 and all(pieces)
    assert done.out.removesuffix("\n").rstrip("\ufffd") == "The people" + text
    others = [{"seed": 4}, {"top_p": 0.1}, {"top_k": 2}, {"temperature": 0}]
    for other in others:
        asked = {"seed": 3} | options | other
        assert "".join(model.generate("The people", max_tokens=30, **asked)) != text
    assert (
        "".join(model.generate("The people", max_tokens=3, seed=3, **options)) in text
    )


def test_a_prompt_of_which_no_token_is_left_is_told(model, run, monkeypatch, said):
    own = tiktoken.Encoding.encode

    def encode(self, text, **options):  # T5's drops white space, too.
        return own(self, text.strip(), **options)

    monkeypatch.setattr(tiktoken.Encoding, "encode", encode)
    begun = "".join(model.generate("", max_tokens=2))
    assert not said()
    assert "".join(model.generate("  ", max_tokens=2)) == begun
    words = ("--config.sample.prompt= \t", "--config.sample.tokens=2")
    call(f"--config={CONFIGS / 'sample.py'}", f"--config.model_path={run}", *words)
    assert ["has no token of the model" in line for line in said()] == [True, True]


def test_a_model_needs_no_temporary_folder(run, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    assert pcagpt.load(run).encode(TEXT).size


def test_generated_text_ends_before_a_stop_string_and_before_the_end_of_text(
    model, monkeypatch
):
    asked = {"max_tokens": 40, "seed": 1}
    text = "".join(model.generate("The", **asked))
    stop = text[len(text) // 2 :][:3]
    found = "".join(model.generate("The", stop=stop, **asked))
    assert found == text.partition(stop)[0]
    assert found == "".join(model.generate("The", stop=["nowhere", stop], **asked))
    assert text == "".join(model.generate("The", stop=None, **asked))
    # The end of text would be drawn at once.
    module = sys.modules[pcagpt.Model.__module__]
    ends = iter([np.array([5]), np.array([4095]), np.array([6])])
    monkeypatch.setattr(module, "generate", lambda *_, **__: ends)
    assert "".join(model.generate("The")) == model.decode([5])


def test_no_token_is_drawn_that_is_not_asked_for(model, monkeypatch):
    module, drawn = sys.modules[pcagpt.Model.__module__], []

    def generate(*_, limit, **__):
        for _ in range(limit):
            drawn.append(1)
            yield np.array([70])

    monkeypatch.setattr(module, "generate", generate)
    pieces = model.generate("The", max_tokens=5)
    assert not drawn
    next(pieces)
    assert len(drawn) == 1
    assert len([*pieces]) == 4
    assert len(drawn) == 5


SETTINGS = {
    "jax_debug_key_reuse": True,
    "jax_default_matmul_precision": "BF16_BF16_F32",
    "jax_default_prng_impl": "rbg",
    "jax_disable_jit": True,
    "jax_enable_x64": True,
    "jax_high_dynamic_range_gumbel": True,
    "jax_no_execution": True,
    "jax_no_tracing": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_random_seed_offset": 5,
    "jax_threefry_partitionable": False,
    "jax_transfer_guard": "disallow",
}


def test_settings_that_a_program_chose_for_jax_change_nothing(run):
    def found():
        model = pcagpt.load(run)
        context = pcagpt.compress(model, data=SMALL, **BOUND | {"methods": "context"})
        return (
            model.loss(TEXT),
            list(model.generate("The", max_tokens=4, seed=3, temperature=2)),
            context.dense().tobytes(),
            context.added_loss,
            pcagpt.factorize(model.table, 4).dense().tobytes(),
        )

    wanted, before = found(), jax.config.values
    try:
        for name, value in SETTINGS.items():
            jax.config.update(name, value)
        again, after = found(), jax.config.values
    finally:
        for name in SETTINGS:
            jax.config.update(name, before[name])
    assert again == wanted
    assert SETTINGS.items() <= after.items()
    assert jax.config.values == before


# Factors


def test_factors_have_the_least_error_of_their_rank():
    table = np.random.default_rng(0).normal(size=(40, 12)) + 1
    left = np.linalg.svd(table)[1]
    found = pcagpt.factorize(table, 5)
    assert found.wte.shape == (40, 5) and found.scale.shape == (5, 12)
    assert found.mean is None and found.wte.dtype == np.float32
    error = np.linalg.norm(found.dense() - table)
    assert error == pytest.approx(np.linalg.norm(left[5:]), rel=1e-4)
    assert found.energy_kept == pytest.approx(1 - error**2 / (left**2).sum(), rel=1e-4)
    whole = pcagpt.factorize(table.astype(np.float16), np.int64(12))
    np.testing.assert_allclose(whole.dense(), table.astype(np.float16), atol=1e-5)


def test_pca_subtracts_the_mean_row_and_adds_it_again():
    table = np.random.default_rng(0).normal(size=(40, 12)) + 5
    found = pcagpt.factorize(table, 5, method="pca")
    np.testing.assert_allclose(found.mean, table.mean(0), rtol=1e-5)
    centred = np.linalg.svd(table - table.mean(0))[1]
    error = np.linalg.norm(found.dense() - table)
    assert error == pytest.approx(np.linalg.norm(centred[5:]), rel=1e-4)


def test_a_share_of_the_singular_values_can_be_in_the_scale():
    table = np.random.default_rng(0).normal(size=(40, 12))
    plain = pcagpt.factorize(table, 3)
    found = pcagpt.factorize(table, 3, singular_value_split=1)
    np.testing.assert_allclose(found.dense(), plain.dense(), atol=1e-5)
    np.testing.assert_allclose(found.wte.T @ found.wte, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(plain.scale @ plain.scale.T, np.eye(3), atol=1e-5)


# Compressed tables


def test_the_table_of_a_bound_is_that_of_the_command(run, model, tmp_path):
    knobs = {"compress.max_bytes": 8000, "compress.methods": "svd,coded"}
    words = [f"--config.{name}={value}" for name, value in knobs.items()]
    words += [f"--config.workdir={tmp_path}", "--config.mesh.data=1"]
    source = f"--config.model_path={run}"
    before = files_of(run)
    found = pcagpt.compress(model, max_bytes=8000, methods=["svd", "coded"])
    assert files_of(run) == before
    done = call(f"--config={CONFIGS / 'compress.py'}", source, *words)
    assert done.code == 0, done
    chosen = json_of(tmp_path / "compressed" / "advice.json")["chosen"]
    for name in ("method", "bits", "bytes", "added_loss"):
        assert getattr(found, name) == chosen[name], name
    assert list(found.interval) == chosen["added_loss_interval"]
    theirs = pcagpt.load(tmp_path / "compressed" / "advised").table
    np.testing.assert_array_equal(found.dense(), theirs)
    for path in run.glob("statistics_*"):  # Of the command.
        path.unlink()


@pytest.mark.parametrize("method", ["svd", "coded", "packed"])
def test_a_saved_table_is_a_model_with_the_added_loss(
    model, run, val, method, tmp_path
):
    bound = {"svd": 40_000, "coded": 2500, "packed": 12_000}[method]
    found = pcagpt.compress(run, max_bytes=bound, methods=method)
    assert found.method == method or (method, found.method) == ("svd", "baseline")
    assert found.bytes <= bound
    folder = found.save(tmp_path / "deep" / "small")
    saved = pcagpt.load(folder)
    np.testing.assert_allclose(saved.table, found.dense(), atol=1e-6)
    added = saved.loss(val) - model.loss(val)
    assert added == pytest.approx(found.added_loss, abs=1e-5)
    assert found.interval[0] < found.added_loss < found.interval[1]
    error = np.linalg.norm(saved.table - model.table) / np.linalg.norm(model.table)
    assert found.relative_error == pytest.approx(error, rel=1e-3)
    with pytest.raises(pcagpt.UserError, match="small is not empty: name a folder"):
        found.save(folder)


def test_of_threads_that_save_to_one_folder_one_does(model, tmp_path, capfd):
    found = pcagpt.compress(model, data=SMALL, **BOUND)
    barrier = threading.Barrier(3)

    def save(_):
        barrier.wait()
        try:
            return str(found.save(tmp_path / "small"))
        except pcagpt.UserError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        told = sorted(pool.map(save, range(3)))
    place = tmp_path / "small"
    assert told == [str(place), *2 * [f"{place} is not empty: {NEW_FOLDER}"]]
    assert os.listdir(tmp_path) == ["small"]
    np.testing.assert_allclose(pcagpt.load(place).table, found.dense(), atol=1e-6)
    assert capfd.readouterr() == ("", "")


def test_no_save_goes_among_the_models_that_a_task_writes(model, tmp_path):
    found = pcagpt.compress(model.table, max_bytes=40_000, methods="svd")
    place = tmp_path / "compressed/best_k8"
    with lock.held(place.parent, meanwhile=lambda: None):
        with pytest.raises(pcagpt.UserError, match=f"writes into {place.parent} "):
            found.save(place)
        assert not place.exists()
    assert found.save(place) == place


def test_what_another_program_writes_during_a_save_stays(model, tmp_path):
    found = pcagpt.compress(model.table, max_bytes=40_000, methods="svd")
    place = tmp_path / "small"

    def write(folder):
        place.mkdir()
        (place / "own").write_text("")

    with pytest.raises(pcagpt.UserError, match=f"is not empty: {NEW_FOLDER}"):
        dataclasses.replace(found, _write=write).save(place)
    assert [str(path) for path in tmp_path.rglob("*")] == [str(place), f"{place}/own"]


def test_a_bound_on_loss_gives_a_smaller_table_for_a_higher_bound(model):
    how = {"methods": "svd", "max_tokens": 320}
    tight, loose = (
        pcagpt.compress(model, max_added_loss=bound, **how) for bound in (0.005, 0.5)
    )
    assert tight.added_loss <= 0.005 and loose.added_loss <= 0.5
    assert loose.bytes < tight.bytes


def test_only_a_cache_that_is_named_is_kept_and_it_is_used(
    model, run, place, tmp_path, capfd, monkeypatch
):
    before = files_of(place)
    first = pcagpt.compress(model, cache_dir=tmp_path / "cache", **BOUND)
    assert files_of(place) == before
    names = {path.name.partition("_")[0] for path in files_of(tmp_path / "cache")}
    assert "statistics" in names
    assert any((tmp_path / "cache").glob("text-*/val.bin"))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(calibrate, "collect", None)  # It would be called.
    again = pcagpt.compress(model, cache_dir=tmp_path / "cache", progress=True, **BOUND)
    assert repr(again) == repr(first)
    shown = capfd.readouterr()
    assert not shown.out and "fitting gpt_baseline" in shown.err


def test_nothing_is_kept_beside_token_files(model, val, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "val"):
        val.tofile(corpus / f"{split}.bin")
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    (corpus / "meta.json").write_text(json.dumps(meta))
    for path in corpus.iterdir():  # A file that has just changed is not remembered.
        os.utime(path, (1, 1))
    pcagpt.compress(model, data=corpus, cache_dir=tmp_path / "cache", **BOUND)
    assert {path.name for path in corpus.iterdir()} == {
        *("train.bin", "val.bin", "meta.json")
    }


def test_data_can_be_texts_ids_or_a_folder_of_text(model, val, tmp_path):
    texts = SMALL
    ids = {name: model.encode(text) for name, text in texts.items()}
    how = BOUND | {"max_tokens": 0}
    found = pcagpt.compress(model, data=texts, **how)
    assert repr(pcagpt.compress(model, data=ids, **how)) == repr(found)
    codes = how | {"max_bytes": 8000, "methods": "coded"}
    for one in (found, pcagpt.compress(model, data=texts, **codes)):
        one.save(tmp_path / one.method)  # The texts are not there any more.
    own = pcagpt.compress(model, **how)
    assert own.added_loss != found.added_loss
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    # A document begins with an end of text, which the texts above lack.
    ids = {name: model.encode("<|endoftext|>" + text) for name, text in texts.items()}
    of_folder = pcagpt.compress(model, data=tmp_path, **how)
    assert repr(of_folder) == repr(pcagpt.compress(model, data=ids, **how))


def test_progress_of_tokenizing_is_shown_only_if_it_is_asked_for(
    model, run, capfd, monkeypatch
):
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr(tokenize, "time", clock)
    for shows in (False, True):
        pcagpt.compress(model, data=run.parent / "text", progress=shows, **BOUND)
        assert ("tokenizing text" in capfd.readouterr().err) == shows


def test_a_model_of_another_dtype_is_compressed_as_it_computes(run, model):
    found = pcagpt.load(run, compute_dtype="bfloat16")
    assert found.loss(TEXT) != model.loss(TEXT)
    assert found.table.dtype == np.float32
    np.testing.assert_array_equal(found.table, model.table)
    theirs, ours = (pcagpt.compress(one, **BOUND) for one in (found, model))
    assert theirs.added_loss != ours.added_loss


def test_the_table_of_another_architecture_is_compressed_from_its_folder(
    tmp_path, capfd
):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=16, tie_word_embeddings=True
    )
    level = transformers.utils.logging.get_verbosity()
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "llama")
    ids = np.random.default_rng(0).integers(0, 90, 600)
    capfd.readouterr()
    how = {"max_bytes": 4000, "methods": "coded"}
    data = {"train": ids, "val": ids[:200]}
    found = pcagpt.compress(tmp_path / "llama", data=data, **how)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert found.bytes <= 4000 and found.interval[0] < found.interval[1]
    saved = found.save(tmp_path / "small")
    assert {path.name for path in saved.iterdir()} == {"config.json", "table.pcat"}
    with pytest.raises(pcagpt.UserError, match="Llama"):
        pcagpt.load(tmp_path / "llama")
    assert transformers.utils.logging.get_verbosity() == level
    config.tie_word_embeddings = False
    untied = transformers.LlamaForCausalLM(config)
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(pcagpt.UserError, match="two tables, of input and output"):
        pcagpt.compress(tmp_path / "untied", data=data, **how)


def test_max_tokens_limits_what_is_measured(model):
    few = pcagpt.compress(model, **BOUND | {"max_tokens": 10})
    assert few.interval is None
    assert pcagpt.compress(model, **BOUND).interval is not None


@pytest.mark.parametrize("method", ["", "coded", "packed", "svd"])
def test_a_bare_table_is_compressed_by_its_own_error(model, method, tmp_path):
    table = model.table
    found = pcagpt.compress(table, max_bytes=40_000, methods=method)
    assert found.bytes <= 40_000
    assert found.added_loss is None and found.interval is None
    error = np.linalg.norm(found.dense() - table) / np.linalg.norm(table)
    assert found.relative_error == pytest.approx(error, rel=1e-5)
    folder = found.save(tmp_path / "table")
    if found.bits == 0:
        kind = KINDS[found.method]
        read = kind.read(folder / kind.file)[0].dense()
        assert (folder / kind.file).stat().st_size == found.bytes
    else:
        read = read_bands(folder / "factors").dense()
    np.testing.assert_array_equal(read, found.dense())
    if not method:
        methods = ("coded", "packed", "svd")
        each = [
            pcagpt.compress(table, max_bytes=40_000, methods=one) for one in methods
        ]
        assert found.relative_error == min(one.relative_error for one in each)


# Errors


REFUSED = {
    "nowhere does not exist": lambda m: pcagpt.load("nowhere"),
    "tokenizer is 'gpt2', but": lambda m: pcagpt.load(m.path, tokenizer="gpt2"),
    "compute_dtype is 'int8': it must be": lambda m: pcagpt.load(
        m.path, compute_dtype="int8"
    ),
    "has 1 tokens: at least two": lambda m: m.loss("T"),
    "has 0 tokens: at least two": lambda m: m.loss([]),
    "token id 4096 is unknown": lambda m: m.loss([1, 4096]),
    "token id -1 is unknown": lambda m: m.loss([1, -1]),
    r"shape \(2,\) and dtype float64": lambda m: m.loss([1.0, 2.0]),
    r"shape \(1, 2\)": lambda m: m.loss([[1, 2]]),
    "from 1 to 16 at a time": lambda m: m.logits(np.arange(17)),
    "temperature is -1.0: it must be at least 0": lambda m: m.generate(
        "The", temperature=-1
    ),
    "temperature is 'hot': it must be a number, as in temperature=0.8": (
        lambda m: m.generate("The", temperature="hot")
    ),
    "top_p is 0.0: it must be above 0 and at most 1": lambda m: m.generate(
        "The", top_p=0
    ),
    "max_tokens is 2.5: it must be a whole": lambda m: m.generate(
        "The", max_tokens=2.5
    ),
    "temperature is inf: it must be finite": lambda m: m.generate(
        "The", temperature=10**400
    ),
    "the text is '.*.py', the path of a file": lambda m: m.loss(__file__),
    r"data\['val'\] is '.*', the path of a file": lambda m: pcagpt.compress(
        m, **BOUND, data=SMALL | {"val": __file__}
    ),
    "the text has half of a surrogate pair": lambda m: m.loss("The people\ud83d of"),
    "has half of a surrogate pair: decode it anew": lambda m: pcagpt.compress(
        m, **BOUND, data=SMALL | {"val": "The people\ud83d of"}
    ),
    "the text has half of a surrogate pair: decode it": lambda m: pcagpt.compress(
        m, **BOUND, data=SMALL | {"train": 99 * "The people\udcff of"}
    ),
    "seed is -1: it must be": lambda m: m.generate("The", seed=-1),
    r"stop is \[''\]": lambda m: m.generate("The", stop=[""]),
    "stop is 5: it must hold texts": lambda m: m.generate("The", stop=5),
    "stop is b'x': it must hold texts": lambda m: m.generate("The", stop=b"x"),
    "methods is 5: it must hold texts": lambda m: pcagpt.compress(
        m, max_bytes=9, methods=5
    ),
    "the text is 5: it must be a str": lambda m: m.encode(5),
    "a text is given as bytes, which": lambda m: m.loss(b"The people"),
    "a text is given as bytearray": lambda m: m.loss(bytearray(b"The people")),
    "a text is given as memoryview": lambda m: m.logits(memoryview(b"The people")),
    "a text is given as mmap": lambda m: m.loss(mmap.mmap(-1, 9)),
    "True and False are no token ids": lambda m: m.loss([2, True, 3]),
    "'kl' needs statistics of the model": lambda m: pcagpt.factorize(
        m.table, 2, method="kl"
    ),
    "method is 'nmf': it must be one of svd": lambda m: pcagpt.factorize(
        m.table, 2, method="nmf"
    ),
    "rank is 17: .* from 1 to 16": lambda m: pcagpt.factorize(m.table, 17),
    "rank is 2.0: .* whole": lambda m: pcagpt.factorize(m.table, 2.0),
    "the table has shape": lambda m: pcagpt.factorize(m.table[0], 1),
    "the table has dtype int64": lambda m: pcagpt.factorize(
        np.ones((9, 3), np.int64), 1
    ),
    "the table holds only zeros": lambda m: pcagpt.factorize(np.zeros((9, 3)), 1),
    "the table holds no value above 1e-40, but .* above 1e-30: multiply": lambda m: (
        pcagpt.compress(1e-40 * np.eye(9, 3), max_bytes=999)
    ),
    "holds nan at": lambda m: pcagpt.factorize(np.full((9, 3), np.nan), 1),
    "no bound is given: give max_bytes": lambda m: pcagpt.compress(m),
    "max_added_loss and max_bytes are both set": lambda m: pcagpt.compress(
        m, max_bytes=9, max_added_loss=0.1
    ),
    "no table fits max_bytes = 10: raise it to": lambda m: pcagpt.compress(
        m, **BOUND | {"max_bytes": 10}
    ),
    "max_bytes is 200000.0: it must be a whole number": lambda m: pcagpt.compress(
        m, max_bytes=2e5
    ),
    "max_bytes is True: it must be a whole number": lambda m: pcagpt.compress(
        m, max_bytes=True
    ),
    "max_added_loss is inf: it must be finite and at least 0": lambda m: (
        pcagpt.compress(m, max_added_loss=float("inf"))
    ),
    "methods is 'nmf': it must be all": lambda m: pcagpt.compress(
        m, max_bytes=9, methods=["nmf"]
    ),
    r"no table fits bands \(3,\): list 1": lambda m: pcagpt.compress(
        m, **BOUND, bands=[3]
    ),
    "data source 'nowhere' does not exist": lambda m: pcagpt.compress(
        m, **BOUND, data="nowhere"
    ),
    "data is 5: give a name, a folder, or the texts": lambda m: pcagpt.compress(
        m, **BOUND, data=5
    ),
    "data has train: give the texts 'train' and 'val'": lambda m: pcagpt.compress(
        m, **BOUND, data={"train": TEXT}
    ),
    r"data\['val'\] has 1 tokens: give at least two": lambda m: pcagpt.compress(
        m, **BOUND, data=SMALL | {"val": [3]}
    ),
    "max_added_loss is set, but a table without its model has no": lambda m: (
        pcagpt.compress(m.table, max_added_loss=0.1)
    ),
    "'fisher' needs statistics": lambda m: pcagpt.compress(
        m.table, max_bytes=9999, methods="fisher"
    ),
    "the table is a list that NumPy cannot read: give a float32 array, such as": (
        lambda m: pcagpt.factorize([[1.0, 2.0], [3.0]], 1)
    ),
    "the table has masked values: fill them": lambda m: pcagpt.factorize(
        np.ma.masked_less(m.table, 0), 1
    ),
    "the text is a list that NumPy cannot read: give one list of whole": lambda m: (
        m.loss([[1, 2], [3]])
    ),
    "None is no path: give the path of a folder": lambda m: pcagpt.load(None),
    "no path": lambda m: pcagpt.compress(m.table, **BOUND).save("a\0b"),
    r"bands is '1,7': it must be whole numbers, as in bands=\[1, 7\]": lambda m: (
        pcagpt.compress(m, **BOUND, bands="1,7")
    ),
    "bands holds 1000000000: it must be from 1 to 1000": lambda m: pcagpt.compress(
        m.table, max_bytes=40_000, bands=[10**9]
    ),
    r"bands is 7: .* as in bands=\[1, 7\]$": lambda m: pcagpt.compress(
        m, **BOUND, bands=7
    ),
    "tokenizer is 5: it must be text, as in tokenizer='auto'": lambda m: pcagpt.load(
        m.path, tokenizer=5
    ),
    "cache_dir is .*test_api.py, which is no folder: name": lambda m: pcagpt.compress(
        m, **BOUND, cache_dir=__file__
    ),
    "cache_dir is .*/new, below .*test_api.py, which is no folder: name": lambda m: (
        pcagpt.compress(m, **BOUND, cache_dir=f"{__file__}/new")
    ),
    "a/b cannot be written: .*test_api.py is not a writable folder": lambda m: (
        pcagpt.compress(m.table, max_bytes=40_000, methods="svd").save(
            f"{__file__}/a/b"
        )
    ),
    r"a\[b holds one of .*: use another folder$": lambda m: pcagpt.compress(
        m.table, max_bytes=40_000, methods="svd"
    ).save("a[b"),
    "'gptq' only serves for comparison": lambda m: pcagpt.compress(
        m.table, max_bytes=9999, methods="svd,gptq"
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_in_terms_of_python(model, words):
    with pytest.raises(pcagpt.UserError, match=words) as raised:
        REFUSED[words](model)
    line = str(raised.value)
    assert "\n" not in line
    assert "--config" not in line and "compress." not in line.replace("pcagpt.c", "")


def test_a_run_that_does_not_say_its_text_needs_data(tmp_path):
    folder = gpt2_folders.write(tmp_path / "model")
    with pytest.raises(pcagpt.UserError, match="name a corpus as data$"):
        pcagpt.compress(folder, **BOUND)


def test_a_factorized_table_is_refused(finished_experiment):
    run = Path(finished_experiment.workdir) / "gpt_pca_k8"
    with pytest.raises(pcagpt.UserError, match="already has a factorized embedding"):
        pcagpt.compress(run, **BOUND)


def test_a_table_is_saved_once_its_moved_run_is_back(run, tmp_path):
    place, away = tmp_path / "runs" / "gpt_baseline", tmp_path / "away"
    shutil.copytree(run, place)
    found = pcagpt.compress(place, **BOUND)
    place.rename(away)
    words = f"{place} is gone: move it back, and call save again; the table is kept"
    with pytest.raises(pcagpt.UserError, match=words):
        found.save(tmp_path / "small")
    (shutil.copytree(away, place) / "config.json").unlink()
    shutil.rmtree(place / "ckpt")
    with pytest.raises(pcagpt.UserError, match="changed meanwhile: load the model ag"):
        found.save(tmp_path / "small")
    shutil.rmtree(place)
    away.rename(place)
    assert found.save(tmp_path / "small").is_dir()


def test_an_error_of_the_system_stays_an_oserror(model, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    found = pcagpt.compress(model.table, max_bytes=40_000, methods="svd")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        found.save(tmp_path / "small")


def saved_within(limit, run, folder, **options):
    """What `save` raises three times under a limit, in a program that then ends."""
    return run_alone(
        f"""
import os, resource, sys, pcagpt
model = pcagpt.load({str(run)!r})
small = pcagpt.compress(model, data={SMALL}, **{BOUND})
hook, opened = sys.unraisablehook, len(os.listdir("/proc/self/fd"))
for more in range(3, 6):
    resource.setrlimit({limit})
    try:
        small.save({str(folder)!r})
    except OSError as error:
        print(error.errno, error.filename)
    except pcagpt.UserError as error:  # The model could not be read either.
        print(error)
pcagpt.factorize(model.table, 2)
assert sys.unraisablehook is hook
""",
        timeout=60,
        **options,
    )


def test_a_save_that_does_not_fit_raises_an_oserror_and_prints_nothing(run, tmp_path):
    limit = "resource.RLIMIT_FSIZE, (3000, 3000)"
    told = saved_within(limit, run, tmp_path / "small")
    assert told == 3 * f"{errno.EFBIG} {tmp_path}/small\n"
    assert not list(tmp_path.iterdir())


def test_a_program_ends_after_a_save_without_descriptors(run, tmp_path):
    limit = "resource.RLIMIT_NOFILE, (opened + more, 4096)"
    # asyncio prints that it has none.
    told = saved_within(limit, run, tmp_path / "small", prints_errors=True)
    assert f"{errno.EMFILE} {tmp_path}/small\n" in told


def test_remarks_go_to_the_logger_of_the_package(model, caplog):
    with caplog.at_level(logging.WARNING, "pcagpt"):
        pcagpt.compress(model, data=SMALL, **BOUND)
    assert "another corpus than the one that" in caplog.text


@pytest.mark.parametrize("method", ["coded", "packed"])
def test_a_table_of_tiny_numbers_is_compressed_as_another_one(method):
    table = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    errors = [
        pcagpt.compress(scale * table, max_bytes=4700, methods=method).relative_error
        for scale in np.float32([1, 1e-20])
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_bound_that_is_large_enough_is_not_to_be_raised(monkeypatch):
    def refuse(table):
        raise InexactSums("its integers are too large for exact sums")

    monkeypatch.setattr(CodedTable, "dense", refuse)
    table = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    with pytest.raises(pcagpt.UserError) as caught:
        pcagpt.compress(table, max_bytes=4500, methods="coded")
    assert str(caught.value) == (
        "no table fits max_bytes = 4500: no coded table: its integers are too large "
        "for exact sums; try other methods"
    )


def test_a_table_may_be_bfloat16(tmp_path):
    table = np.random.default_rng(0).normal(size=(60, 8)).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "table.npy", table)
    wanted = pcagpt.factorize(table.astype(np.float32), 3).wte
    for given in (table, jnp.asarray(table)):
        np.testing.assert_array_equal(pcagpt.factorize(given, 3).wte, wanted)
    read = read_table(tmp_path / "table.npy")  # NumPy reads it as bytes without a type.
    np.testing.assert_array_equal(read, table.astype(np.float32))


def test_a_tensor_that_numpy_cannot_read_is_refused():
    torch = pytest.importorskip("torch", reason="needs the extra hf")
    tensor = torch.ones(6, 3)
    for given in (torch.nn.Parameter(tensor), tensor.bfloat16()):
        with pytest.raises(pcagpt.UserError, match=r"such as `\.detach\(\)\.float"):
            pcagpt.factorize(given, 2)


def test_the_argument_of_the_model_is_named(monkeypatch):
    def refuse(*_, **__):
        raise pcagpt.UserError("--config.model_path is wrong")

    monkeypatch.setattr(Run, "open", refuse)
    for ask, name in ((pcagpt.load, "path"), (pcagpt.compress, "model")):
        with pytest.raises(pcagpt.UserError, match=f"^{name} is wrong$"):
            ask("x")
