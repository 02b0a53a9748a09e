"""A person's mistake: one clear line, exit code 2, and nothing written or lost.

Each kind of input is spoilt here in a few ways, and in all ways in the tests of the
module that reads it.
"""

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import CONFIGS, call, refusal, tiny

from pcagpt.config import KNOBS, command_line, validate
from pcagpt.config.schema import FinetuneSettings
from pcagpt.pipeline.execute import check_workdir
from pcagpt.pipeline.plan import make_plan
from pcagpt.run.folder import read_record
from pcagpt.telemetry.metrics import read_metrics
from pcagpt.training import loop

VOCAB_SIZE, WIDTH, RANK = 97, 16, 4

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, where everything is written by default."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def corpus(corpus_folder, place):
    """A copy of the corpus that a test may spoil."""
    return Path(shutil.copytree(corpus_folder, place / "corpus"))


# Knobs that do not fit the corpus or the devices.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.n_head": 3}, "model.n_head = 3 does not divide model.n_embd = 16"),
        ({"task": "experiment", "ranks": "4,17"}, "ranks holds 17: a rank is at most"),
        (
            {"task": "experiment", "ranks": "4,98", "model.n_embd": 128},
            "ranks holds 98: the vocabulary has 97 tokens",
        ),
        ({"model.block_size": 6001}, "model.block_size=6001 needs 6002 tokens, but"),
        ({"model.vocab_size": 50}, "is 50, but the corpus has token ids"),
        ({"mesh.data": 9}, "does not fit the 8 devices"),
        ({"mesh.data": 3}, "cannot be split over 3 devices"),
        ({"factorize.method": "nmf"}, "it must be one of svd, pca"),
        ({"init.import_wte_freeze": True}, "the baseline model does not read it"),
        ({"data.source": "nowhere"}, "data source 'nowhere' does not exist"),
        ({"data.tokenizer": "bert"}, "unknown tokenizer 'bert': set --config.data"),
        ({"workdir": "notes.txt"}, "notes.txt is not a writable folder"),
        ({"workdir": "/proc/runs"}, "/proc is not a writable folder"),
    ],
)
def test_a_knob_that_cannot_work_is_refused(overrides, words, corpus, place):
    (place / "notes.txt").write_text("a file in the way")
    arguments = tiny("baseline.py", corpus)
    arguments += [f"--config.{path}={value}" for path, value in overrides.items()]
    assert words in refusal(*arguments, unchanged=[place])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_a_failing_system_is_not_taken_for_a_folder_without_permission(
    number, place, monkeypatch
):
    def fail(**_):
        raise OSError(number, os.strerror(number), str(place / "tmp1"))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(OSError) as caught:
        check_workdir(str(place / "runs"))
    assert (caught.value.errno, caught.value.filename) == (number, str(place))


def test_wandb_that_is_not_installed_is_refused_before_a_run_is_discarded(
    trained, corpus_folder, place, monkeypatch
):
    shutil.copytree(trained, place / "runs" / "gpt_baseline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = {"telemetry.wandb": True, "train.steps": 1, "overwrite": True}
    arguments = tiny("baseline.py", corpus_folder, workdir=place / "runs", **asked)
    assert "pip install 'pcagpt[wandb]'" in refusal(*arguments, unchanged=[place])


# The corpus.


def beyond_the_vocabulary(corpus):
    ids = np.fromfile(corpus / "val.bin", np.uint16)
    ids[700] = VOCAB_SIZE
    ids.tofile(corpus / "val.bin")


class Payload:
    """Unpickled without restraint, this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("was_executed",)


def pickled_code(corpus):
    (corpus / "meta.json").unlink()
    (corpus / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Payload()}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda corpus: (corpus / "val.bin").unlink(), "no 'val' split"),
        (lambda corpus: (corpus / "train.bin").write_bytes(b""), "train.bin is empty"),
        (lambda corpus: (corpus / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda corpus: shutil.rmtree(corpus) or corpus.mkdir(), "nothing recognis"),
        (beyond_the_vocabulary, "val.bin holds id 97 at position 700"),
        (pickled_code, "must be a pickled dict of plain values"),
    ],
)
def test_a_damaged_corpus_is_refused(spoil, words, corpus, place):
    spoil(corpus)
    assert words in refusal(*tiny("baseline.py", corpus), unchanged=[place])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.bin", "no 'train' split in {} (present: val, test; train.bin is a nam"),
        ("meta.json", "{}/meta.json is a named pipe, not a file: name a file, or move"),
        ("meta.pkl", "{}/meta.pkl is a named pipe, not a file: name a file, or move"),
    ],
)
def test_a_named_pipe_in_a_corpus_is_refused(name, words, corpus, place):
    (corpus / name).unlink(missing_ok=True)
    os.mkfifo(corpus / name)
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert words.format(corpus) in line


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_corpus_without_any_file_names_what_is_there_instead(make, place):
    (place / "corpus").mkdir()
    make(place / "corpus" / "train.txt")
    line = refusal(*tiny("baseline.py", place / "corpus"), unchanged=[place])
    kind = "a named pipe" if make is os.mkfifo else "a folder"
    assert f"nothing recognisable in {place}/corpus" in line
    assert line.endswith(f"; train.txt is {kind}\n")


# Prerequisites.


def lacking(config_name, corpus_folder, place, **knobs):
    """The refusal of a run that may not build what it needs, and its planned jobs."""
    asked = {"model": {"n_embd_wte": RANK}, "workdir": "my runs", **knobs}
    arguments = tiny(config_name, corpus_folder, **asked)
    line = refusal(*arguments, "--config.build_prerequisites=False", unchanged=[place])
    return line, make_plan(command_line.parse(["pcagpt", *arguments])[0]).jobs


def only_job(line, monkeypatch):
    """The job of the command that a line ends in."""
    monkeypatch.chdir(CONFIGS.parent)
    words = shlex.split(line[line.index("python -m") :])
    assert words[:3] == ["python", "-m", "pcagpt.main"]
    settings, _ = command_line.parse(["pcagpt", *words[3:]])
    validate(settings)
    (job,) = make_plan(settings).jobs
    return job


@pytest.mark.parametrize("config_name", ["pca_k128.py", "pca_finetune_k128.py"])
def test_a_missing_baseline_is_refused_with_the_command_that_trains_it(
    config_name, corpus_folder, place, monkeypatch
):
    is_tuned = config_name == "pca_finetune_k128.py"  # D reads no such share.
    share = {"finetune": {"steps_share": 0.3}} if is_tuned else {}
    line, (baseline, *_) = lacking(config_name, corpus_folder, place, seed=3, **share)
    assert "gpt_baseline is not trained and build_prerequisites is off" in line
    job = only_job(line, monkeypatch)
    assert job.folder == baseline.folder
    own = {"finetune": FinetuneSettings()}
    assert job.settings == baseline.settings.replace(own)


def test_missing_factors_are_refused_with_the_command_that_makes_them(
    trained, corpus_folder, place, monkeypatch
):
    shutil.copytree(trained, place / "my runs" / trained.name)
    line, (_, factors, _) = lacking("pca_k128.py", corpus_folder, place)
    assert "pca_factorized lacks rank 4 and build_prerequisites is off" in line
    job = only_job(line, monkeypatch)
    assert (job.source, job.folder) == (factors.source, factors.folder)
    assert job.settings.ranks == factors.settings.ranks
    assert job.settings.factorize == factors.settings.factorize


def test_a_finished_baseline_of_another_model_is_refused_by_its_sizes(
    trained, corpus_folder, place
):
    shutil.copytree(trained, place / "runs" / trained.name)
    model = {"n_embd_wte": RANK, "n_embd": 32, "n_layer": 2}
    arguments = tiny("pca_finetune_k128.py", corpus_folder, model=model, workdir="runs")
    line = refusal(*arguments, unchanged=[place])
    assert "model.n_embd (there 16, here 32)" in line
    assert "model.n_layer (there 1, here 2)" in line


def test_a_run_to_evaluate_or_factorize_that_is_not_there_is_refused(place):
    (place / "empty").mkdir()
    for config in ("evaluate.py", "factorize.py"):
        for path, words in (("nowhere", "does not exist"), ("empty", "holds no")):
            arguments = f"--config={CONFIGS / config}", f"--config.model_path={path}"
            assert words in refusal(*arguments, unchanged=[place])


# What a run reads.


def damage(step_folder):
    """Cuts every file of a checkpoint's weights short."""
    for path in (step_folder / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_not_evaluated(trained, corpus_folder, place):
    run_dir = Path(shutil.copytree(trained, place / "run"))
    damage(run_dir / "ckpt" / "2")
    named = tiny("evaluate.py", corpus_folder, model_path=run_dir / "ckpt" / "2")
    assert "ckpt/2 cannot be read" in refusal(*named, unchanged=[place])
    newest = tiny("evaluate.py", corpus_folder, model_path=run_dir)
    for words in (newest, [*newest, "--print_config"]):
        line = refusal(*words, unchanged=[place])
        assert "step 2, is damaged" in line
        assert f"or name {run_dir}/ckpt/1" in line
    (run_dir / "result.json").unlink()  # As of an unfinished run.
    assert json.loads(call(*newest).out)["step"] == 1


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (
            "pca_k128.py",
            {
                "init.import_wte_npy": "missing.npy",
                "init.import_scale_matrices_npz": "missing.npz",
            },
        ),
        ("pca_k128.py", {"init.import_bands": "missing"}),
        ("pca_finetune_k128.py", {"init.blocks_from": "missing"}),
        ("factorize.py", {"ranks": 17}),
        (
            "factorize.py",
            {"factorize.method": "freq", "factorize.statistics": "missing.npz"},
        ),
    ],
    ids=["factors", "bands", "blocks", "rank", "statistics"],
)
def test_print_config_refuses_what_the_command_would_refuse(
    config, asked, trained, corpus_folder, place
):
    if config == "factorize.py":
        asked = {"model_path": trained, "ranks": 4} | asked
    words = tiny(config, corpus_folder, **asked)
    line = refusal(*words, "--print_config", unchanged=[place])
    assert line == refusal(*words, unchanged=[place])
    assert "missing" in line or "rank" in line


@pytest.mark.parametrize("config", ["evaluate.py", "baseline.py"])
def test_a_damaged_config_of_a_run_is_refused(config, trained, corpus_folder, place):
    run_dir = Path(shutil.copytree(trained, place / "gpt_baseline"))
    (run_dir / "config.json").write_text('{"task": "tra')
    asked = {"model_path": run_dir} if config == "evaluate.py" else {}
    arguments = tiny(config, corpus_folder, workdir=place, **asked)
    line = refusal(*arguments, unchanged=[place])
    assert f"{run_dir / 'config.json'} is damaged" in line


@pytest.mark.parametrize("name", ["pca_k128.py", "pca_finetune_k128.py"])
@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.ones((VOCAB_SIZE - 1, RANK)), "is (96, 4), but this model needs (97, 4)"),
        (np.full((VOCAB_SIZE, RANK), np.nan), "holds nan at (0, 0)"),
        (np.array([[Payload()]]), "not a readable array file"),
        (None, "does not exist"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_trained(
    name, table, words, corpus_folder, place
):
    if table is not None:
        np.save(place / "table.npy", table, allow_pickle=True)
    model, init = {"n_embd_wte": RANK}, {"import_wte_npy": "table.npy"}
    line = refusal(
        *tiny(name, corpus_folder, model=model, init=init), unchanged=[place]
    )
    assert "table.npy" in line
    assert words in line


@pytest.mark.parametrize("bands", [1, 2])
def test_a_record_without_a_model_is_refused(bands, corpus_folder, place):
    run_dir = place / "checkpoints" / f"gpt_pca_k{RANK}"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text('{"a": 1}')
    chosen = {"bands": bands, "method": "context"}
    model = {"n_embd_wte": RANK}
    words = tiny("pca_k128.py", corpus_folder, model=model, factorize=chosen)
    assert "holds a model that was made elsewhere" in refusal(*words, unchanged=[place])


def test_a_table_that_cannot_be_factorized_is_refused(place):
    np.save(place / "table.npy", np.ones((VOCAB_SIZE, 2)))
    factorize = f"--config={CONFIGS / 'factorize.py'}", "--config.model_path=table.npy"
    line = refusal(*factorize, "--config.ranks=4", unchanged=[place])
    assert "its rank is at most 2" in line


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(
    make, trained, corpus_folder, place
):
    make(place / "a.npy")
    kind = "a named pipe" if make is os.mkfifo else "a folder"
    factorize = f"--config={CONFIGS / 'factorize.py'}", f"--config.ranks={RANK}"
    named = "--config.factorize.method=kl", "--config.factorize.statistics=a.npy"
    model = {"n_embd_wte": RANK}
    imports = [{"import_wte_npy": "a.npy"}, {"import_scale_matrices_npz": "a.npy"}]
    for words in (
        [*factorize, "--config.model_path=a.npy"],
        [*factorize, f"--config.model_path={trained}", *named],
        *(tiny("pca_k128.py", corpus_folder, model=model, init=i) for i in imports),
    ):
        line = refusal(*words, unchanged=[place])
        assert f"a.npy is {kind}, not a file: name a file, or move it away" in line


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "name", ["config.json", "result.json", "metrics.jsonl", "ckpt/2/digests.json"]
)
def test_a_named_pipe_in_a_run_is_refused(name, trained, corpus_folder, place):
    run_dir = Path(shutil.copytree(trained, place / "runs" / trained.name))
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    arguments = tiny("evaluate.py", corpus_folder, model_path=run_dir)
    if name == "metrics.jsonl":  # Training reads it when it resumes.
        (run_dir / "result.json").unlink()
        arguments = tiny("baseline.py", corpus_folder, workdir=place / "runs")
    line = refusal(*arguments, unchanged=[])
    assert f"{run_dir / name} is" in line
    assert "a named pipe" in line


# While training.


@pytest.mark.usefixtures("place")
def test_exhausted_memory_names_the_knobs_to_change_and_they_can_be_changed(
    corpus_folder, monkeypatch
):
    def exhaust(*_):  # After the validation at step 0.
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nmore"
        )

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_step", lambda *_: exhaust)
        outcome = call(*tiny("baseline.py", corpus_folder))
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if "left" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("pcagpt: the device's memory is exhausted: lower ")
    named = re.findall(r"\w+\.\w+", lines[0])
    assert "train.batch_size" in named
    assert set(named) <= KNOBS.keys()
    run_dir = Path(KNOBS["workdir"].default) / "gpt_baseline"
    assert read_metrics(run_dir / "metrics.jsonl")[0]["step"] == 0
    first = read_record(run_dir)
    smaller = {"batch_size": 2, "loss_chunks": 2}
    assert call(*tiny("baseline.py", corpus_folder, train=smaller)).code == 0
    record = read_record(run_dir)
    assert record["train"]["batch_size"] == 2
    assert record["run_id"] != first["run_id"]
    steps = [(e["step"], e["split"]) for e in read_metrics(run_dir / "metrics.jsonl")]
    assert len(steps) == len(set(steps))
    # The message names this knob also for a run that has begun.
    chunks = tiny("baseline.py", corpus_folder, train=smaller | {"loss_chunks": 1})
    assert call(*chunks, "--print_config").out.endswith("done\n")
