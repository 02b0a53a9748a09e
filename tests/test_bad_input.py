"""A person's mistake: one clear line, exit code 2, and nothing written or lost."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import CONFIGS, call, refusal, snapshot, tiny
from runs import quick_compiles, quick_environment

from pcagpt.config import KNOBS, command_line
from pcagpt.pipeline.plan import make_plan
from pcagpt.run.checkpoint import load_weights
from pcagpt.training.loop import Training

VOCAB_SIZE, WIDTH, RANK = 97, 16, 4

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="session")
def trained(corpus_folder, compiled, tmp_path_factory):
    """The folder of a finished baseline: not to be written to."""
    workdir = tmp_path_factory.mktemp("trained")
    settings = {"checkpoint": {"every": 1, "keep_last": 3}, "workdir": workdir}
    with quick_compiles(compiled):
        outcome = call(*tiny("baseline.py", corpus_folder, **settings))
    assert outcome.code == 0, outcome
    return workdir / "gpt_baseline"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, in which all is written that is not told where."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def corpus(corpus_folder, place):
    """A copy of the corpus that a test may spoil."""
    return Path(shutil.copytree(corpus_folder, place / "corpus"))


# Knobs.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.n_layers": 2}, "no knob 'model.n_layers': did you mean model.n_layer"),
        ({"train.lerning_rate": 1}, "did you mean train.learning_rate"),
        ({"model.n_head": 3}, "model.n_head = 3 does not divide model.n_embd = 16"),
        ({"task": "experiment", "ranks": "0"}, "ranks holds 0: it must be at least 1"),
        ({"task": "experiment", "ranks": "4,17"}, "from 1 to the model's width"),
        ({"task": "experiment", "ranks": "4,x"}, "ranks is '4,x': it must be whole"),
        ({"arm": "random", "model.n_embd_wte": 0}, "n_embd_wte is 0: it must be at"),
        ({"arm": "random", "model.n_embd_wte": 17}, "from 1 to the model's width"),
        ({"model.block_size": 6001}, "model.block_size=6001 needs 6002 tokens, but"),
        ({"model.vocab_size": 50}, "model.vocab_size is 50, the corpus has token ids"),
        ({"mesh.data": 9}, "does not fit the 8 devices"),
        ({"mesh.data": 3}, "cannot be split over 3 devices"),
        ({"factorize.method": "nmf"}, "it must be one of svd, pca"),
        ({"init.import_wte_freeze": True}, "set init.import_wte_npy"),
        ({"data.source": "nowhere"}, "data source 'nowhere' does not exist"),
        ({"data.tokenizer": "bert"}, "unknown tokenizer 'bert': it must be one of"),
        ({"workdir": "notes.txt"}, "notes.txt is no folder that can be written to"),
    ],
)
def test_a_knob_that_cannot_work_is_refused(overrides, words, corpus, place):
    (place / "notes.txt").write_text("a file in the way")
    arguments = tiny("baseline.py", corpus)
    arguments += [f"--config.{path}={value}" for path, value in overrides.items()]
    assert words in refusal(*arguments, unchanged=[place])


def test_wandb_that_is_not_installed_is_refused_before_a_run_is_discarded(
    trained, corpus_folder, place, monkeypatch
):
    shutil.copytree(trained, place / "runs" / "gpt_baseline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = {"telemetry.wandb": True, "train.steps": 1, "overwrite": True}
    arguments = tiny("baseline.py", corpus_folder, workdir=place / "runs", **asked)
    assert "pip install 'pcagpt[wandb]'" in refusal(*arguments, unchanged=[place])


@pytest.mark.parametrize("ranks", ["64,x", "64,,128", "0", "64,1000", ""])
def test_a_rank_list_with_a_bad_entry_is_refused(ranks, place):
    config = f"--config={CONFIGS / 'experiment.py'}"
    assert "rank" in refusal(f"{config}:{ranks}", unchanged=[place])
    assert "rank" in refusal(config, f"--config.ranks={ranks}", unchanged=[place])


def test_a_rank_above_the_vocabulary_is_refused_before_the_baseline_is_trained(
    corpus, place
):
    for path in corpus.glob("*.bin"):
        (np.fromfile(path, np.uint16) % 5).tofile(path)
    (corpus / "meta.json").write_text('{"vocab_size": 5}')
    line = refusal(*tiny("experiment.py:4,6", corpus), unchanged=[place])
    assert "ranks holds 6: the corpus has 5 tokens" in line


# The corpus.


def test_a_missing_split_is_refused_and_those_present_are_named(corpus, place):
    (corpus / "val.bin").unlink()
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "no 'val' split" in line
    assert "present: train, test" in line


def test_an_empty_token_file_is_refused(corpus, place):
    (corpus / "train.bin").write_bytes(b"")
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "train.bin is empty" in line


def test_a_truncated_token_file_is_refused(corpus, place):
    content = (corpus / "val.bin").read_bytes()
    (corpus / "val.bin").write_bytes(content[:-1])
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "val.bin is truncated: 2005 bytes" in line


def test_a_token_file_shorter_than_meta_says_is_refused(corpus, place):
    meta = {"vocab_size": VOCAB_SIZE, "tokens": {"train": 7000}}
    (corpus / "meta.json").write_text(json.dumps(meta))
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "train.bin is truncated or foreign" in line
    assert "7000" in line


def test_a_token_file_of_another_width_is_refused(corpus, place):
    (corpus / "meta.json").unlink()
    ids = np.fromfile(corpus / "train.bin", np.uint16)
    ids.astype(np.uint32).tofile(corpus / "train.bin")
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "train.bin looks like uint32, not uint16" in line


def test_a_file_of_something_else_than_tokens_is_refused(corpus, place):
    (corpus / "train.bin").write_bytes(b"These are letters and no tokens. " * 400)
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "train.bin holds id 26708 at position 0" in line
    assert f"the vocabulary size is {VOCAB_SIZE}" in line


def test_a_token_id_beyond_the_vocabulary_is_refused_with_its_place(corpus, place):
    ids = np.fromfile(corpus / "val.bin", np.uint16)
    ids[700] = VOCAB_SIZE
    ids.tofile(corpus / "val.bin")
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "val.bin holds id 97 at position 700" in line


def test_a_folder_with_nothing_recognisable_is_refused(place):
    (place / "empty").mkdir()
    line = refusal(*tiny("baseline.py", place / "empty"), unchanged=[place])
    assert "nothing recognisable in" in line
    assert "train.bin" in line


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("{", "meta.json is damaged, it is not JSON"),
        ("[97]", "it must hold an object"),
        ('{"vocab_size": "97"}', "gives vocab_size '97'"),
        ('{"vocab_size": 97, "dtype": "int8"}', "must be uint16 or uint32"),
        ('{"vocab_size": 97, "tokenizer": "gpt2"}', "'gpt2' has 50257"),
    ],
)
def test_a_meta_file_that_makes_no_sense_is_refused(meta, words, corpus, place):
    (corpus / "meta.json").write_text(meta)
    assert words in refusal(*tiny("baseline.py", corpus), unchanged=[place])


def test_a_corpus_that_the_trained_model_does_not_know_is_refused(
    trained, corpus, place
):
    (corpus / "meta.json").write_text('{"vocab_size": 200}')
    arguments = tiny("evaluate.py", corpus, model_path=trained)
    line = refusal(*arguments, unchanged=[place, trained])
    assert "has token ids up to 199" in line
    assert "97 tokens" in line


class Payload:
    """Unpickled without restraint, this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("was_executed",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"vocab_size": Payload()}),
        pickle.dumps({"vocab_size": np.int64(97)}),
        pickle.dumps([97]),
        pickle.dumps({"vocab_size": 97})[:-4],
        b"no pickle",
    ],
)
def test_a_pickle_of_more_than_plain_values_is_refused_and_not_executed(
    content, corpus, place
):
    (corpus / "meta.json").unlink()
    (corpus / "meta.pkl").write_bytes(content)
    line = refusal(*tiny("baseline.py", corpus), unchanged=[place])
    assert "meta.pkl is refused, it must be a pickled dict of plain values" in line


# Prerequisites.


def printed_command(line):
    """The arguments of the command that a line ends in."""
    words = shlex.split(line[line.index("python -m") :])
    assert words[:3] == ["python", "-m", "pcagpt.main"]
    return words[3:]


@pytest.mark.parametrize("config_name", ["pca_k128.py", "pca_finetune_k128.py"])
def test_without_prerequisites_the_command_is_given_that_trains_the_baseline(
    config_name, corpus_folder, place, monkeypatch
):
    settings = {"model": {"n_embd_wte": RANK}, "seed": 3, "workdir": "my runs"}
    arguments = tiny(config_name, corpus_folder, **settings)
    line = refusal(*arguments, "--config.build_prerequisites=False", unchanged=[place])
    assert "gpt_baseline is not trained and build_prerequisites is off" in line
    config, _ = command_line.parse(["pcagpt", *arguments])
    baseline = make_plan(config).jobs[0]
    monkeypatch.chdir(CONFIGS.parent)
    config, _ = command_line.parse(["pcagpt", *printed_command(line)])
    (job,) = make_plan(config).jobs
    assert job.folder == baseline.folder
    assert {**job.record(), "build_prerequisites": None} == {
        **baseline.record(),
        "build_prerequisites": None,
    }


def test_without_prerequisites_the_command_is_given_that_makes_the_factors(
    trained, corpus_folder, place, monkeypatch
):
    shutil.copytree(trained, place / "runs" / trained.name)
    settings = {"model": {"n_embd_wte": RANK}, "workdir": "runs"}
    arguments = tiny("pca_k128.py", corpus_folder, **settings)
    line = refusal(*arguments, "--config.build_prerequisites=False", unchanged=[place])
    assert "pca_factorized lacks rank 4 and build_prerequisites is off" in line
    config, _ = command_line.parse(["pcagpt", *arguments])
    factors = make_plan(config).jobs[1]
    assert not factors.is_target
    monkeypatch.chdir(CONFIGS.parent)
    config, _ = command_line.parse(["pcagpt", *printed_command(line)])
    (job,) = make_plan(config).jobs
    assert (job.source, job.folder, job.ranks) == (
        factors.source,
        factors.folder,
        factors.ranks,
    )
    assert job.config.factorize == factors.config.factorize


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


# Checkpoints.


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"n_embd": 32}, "this model needs"),
        ({"block_size": 8}, "'wpe' has shape (16, 16), this model needs (8, 16)"),
        ({"n_layer": 2}, "lacks 'block_1/"),
        ({"bias": False}, "which this model does not have"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    model, words, trained, corpus_folder, place
):
    arguments = tiny(
        "random_k128.py",
        corpus_folder,
        model={"n_embd_wte": RANK, **model},
        init={"blocks_from": trained},
    )
    line = refusal(*arguments, unchanged=[place, trained])
    assert "init.blocks_from" in line
    assert words in line


def damage(step_folder):
    """Cuts every file of a checkpoint's weights short."""
    for path in (step_folder / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def interrupted(trained, place):
    """The workdir of a run that was stopped after step 2 and has checkpoints 0 to 2."""
    run_dir = Path(shutil.copytree(trained, place / "runs" / trained.name))
    (run_dir / "result.json").unlink()
    return run_dir.parent


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    interrupted, corpus_folder, compiled
):
    newest = interrupted / "gpt_baseline" / "ckpt" / "2"
    damage(newest)
    arguments = tiny(
        "baseline.py",
        corpus_folder,
        checkpoint={"every": 1, "keep_last": 3},
        workdir=interrupted,
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pcagpt.main", *arguments],
        capture_output=True,
        text=True,
        env=quick_environment(compiled),
    )
    assert ended.returncode == 0, ended.stderr
    warnings = [line for line in ended.stderr.splitlines() if "damaged" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"pcagpt: checkpoint {newest} is damaged (")
    assert "): falling back to the one before, step " in warnings[0]
    result = json.loads((interrupted / "gpt_baseline" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("done", 2)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(
    interrupted, corpus_folder, place
):
    run_dir = interrupted / "gpt_baseline"
    for folder in (run_dir / "ckpt").iterdir():
        damage(folder)
    before = snapshot(run_dir / "ckpt")
    outcome = call(*tiny("baseline.py", corpus_folder, workdir=interrupted))
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"pcagpt: every checkpoint in {run_dir / 'ckpt'} is damaged")
    assert line.endswith(f"delete {run_dir} to train the run again")
    assert snapshot(run_dir / "ckpt") == before


def test_a_damaged_checkpoint_is_not_evaluated(trained, corpus_folder, place):
    run_dir = Path(shutil.copytree(trained, place / "run"))
    damage(run_dir / "ckpt" / "2")
    arguments = tiny("evaluate.py", corpus_folder, model_path=run_dir)
    assert "ckpt/2 cannot be read" in refusal(*arguments, unchanged=[place])


@pytest.mark.parametrize("config", ["evaluate.py", "baseline.py"])
def test_a_damaged_config_of_a_run_is_refused(config, trained, corpus_folder, place):
    run_dir = Path(shutil.copytree(trained, place / "gpt_baseline"))
    (run_dir / "config.json").write_text('{"task": "tra')
    arguments = tiny(config, corpus_folder, model_path=run_dir, workdir=place)
    line = refusal(*arguments, unchanged=[place])
    assert f"{run_dir / 'config.json'} is damaged" in line


def test_a_run_folder_with_another_config_is_refused_with_the_fields_that_differ(
    trained, corpus_folder, place
):
    settings = {"train": {"steps": 3, "learning_rate": 0.5}, "seed": 2}
    arguments = tiny("baseline.py", corpus_folder, workdir=trained.parent, **settings)
    line = refusal(*arguments, unchanged=[place, trained])
    assert "gpt_baseline was trained with another config" in line
    for field in (
        "train.steps (was 2, now 3)",
        "train.learning_rate (was 0.0006, now 0.5)",
        "seed (was 1, now 2)",
        "--config.overwrite=True",
    ):
        assert field in line
    assert "model" not in line


def test_a_folder_with_another_factorization_is_refused_with_what_differs(place):
    np.save(place / "table.npy", good_table())
    arguments = [
        f"--config={CONFIGS / 'factorize.py'}",
        "--config.model_path=table.npy",
        "--config.ranks=4",
    ]
    assert call(*arguments).code == 0
    line = refusal(*arguments, "--config.factorize.method=pca", unchanged=[place])
    assert "pca_factorized holds another factorization (method differ)" in line
    assert "--config.overwrite=True" in line


# Imported arrays.


def good_table():
    return np.full((VOCAB_SIZE, RANK), 0.1, np.float32)


def good_scales(**replaced):
    scale = np.full((RANK, WIDTH), 0.1, np.float32)
    return {"scale_up": scale, "scale_down": scale, **replaced}


def with_value(array, value):
    array = array.copy()
    array[1, 2] = value
    return array


def npy(array, **keywords):
    file = io.BytesIO()
    np.save(file, array, **keywords)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(good_table()[:-1]), "is (96, 4), this model's table is (97, 4)"),
        (npy(good_table()[:, :3]), "is (97, 3), this model's table is (97, 4)"),
        (npy(good_table()[0]), "has shape (4,): 2 dimensions are needed"),
        (npy(good_table().astype(int)), "has dtype int64: floating point is needed"),
        (npy(with_value(good_table(), np.nan)), "holds nan at (1, 2)"),
        (npy(with_value(good_table(), np.inf)), "holds inf at (1, 2)"),
        (npy(np.array([[Payload()]]), allow_pickle=True), "not a readable array"),
        (npy(good_table())[:300], "not a readable array file"),
        (npz(wte=good_table()), "is not a .npy file"),
        (b"no array", "not a readable array file"),
        (b"", "not a readable array file"),
        (None, "does not exist"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(content, words, corpus_folder, place):
    if content is not None:
        (place / "table.npy").write_bytes(content)
    arguments = tiny(
        "random_k128.py",
        corpus_folder,
        model={"n_embd_wte": RANK},
        init={"import_wte_npy": "table.npy"},
    )
    line = refusal(*arguments, unchanged=[place])
    assert "table.npy" in line
    assert words in line


def down(array):
    return npz(**good_scales(scale_down=array))


SCALE = good_scales()["scale_up"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz(scale_up=SCALE), "has no array 'scale_down', only ['scale_up']"),
        (npz(**good_scales(scale_up=SCALE[:3], scale_down=SCALE[:3])), "is (3, 16)"),
        (down(SCALE[:3]), "scale_down (3, 16)"),
        (down(SCALE.astype(int)), "'scale_down' has dtype int64"),
        (down(with_value(SCALE, np.nan)), "'scale_down' holds nan at (1, 2)"),
        (down(2 * SCALE), "two different scale matrices and this model ties them"),
        (npz(**good_scales(mean=SCALE[0, :3])), "mean (3,)"),
        (npz(**good_scales())[:200], "not a readable array file"),
        (npy(SCALE), "is not a .npz file"),
        (None, "does not exist"),
    ],
)
def test_scale_matrices_that_do_not_fit_are_refused(
    content, words, corpus_folder, place
):
    if content is not None:
        (place / "scales.npz").write_bytes(content)
    arguments = tiny(
        "random_k128.py",
        corpus_folder,
        model={"n_embd_wte": RANK},
        init={"import_scale_matrices_npz": "scales.npz"},
    )
    line = refusal(*arguments, unchanged=[place])
    assert "scales.npz" in line
    assert words in line


def test_a_table_is_checked_before_the_baseline_is_trained_for_the_blocks(
    corpus_folder, place
):
    np.save(place / "table.npy", good_table()[:-1])
    arguments = tiny(
        "pca_finetune_k128.py",
        corpus_folder,
        model={"n_embd_wte": RANK},
        init={"import_wte_npy": "table.npy"},
    )
    line = refusal(*arguments, unchanged=[place])
    assert "is (96, 4), this model's table is (97, 4)" in line


def test_scale_matrices_for_a_model_with_a_full_table_are_refused(corpus_folder, place):
    (place / "scales.npz").write_bytes(npz(**good_scales()))
    init = {"import_scale_matrices_npz": "scales.npz"}
    line = refusal(*tiny("baseline.py", corpus_folder, init=init), unchanged=[place])
    assert "set model.n_embd_wte=4" in line


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (with_value(good_table(), np.nan), "holds nan at (1, 2)"),
        (good_table().astype(int), "has dtype int64"),
        (good_table()[0], "2 dimensions are needed"),
        (good_table()[:, :2], "its rank is at most 2"),
    ],
)
def test_a_table_that_cannot_be_factorized_is_refused(table, words, place):
    np.save(place / "table.npy", table)
    line = refusal(
        f"--config={CONFIGS / 'factorize.py'}",
        "--config.model_path=table.npy",
        "--config.ranks=4",
        unchanged=[place],
    )
    assert words in line


def test_a_model_that_is_factorized_already_is_not_factorized_again(
    corpus_folder, place
):
    arguments = tiny("random_k128.py", corpus_folder, model={"n_embd_wte": RANK})
    assert call(*arguments).code == 0
    line = refusal(
        f"--config={CONFIGS / 'factorize.py'}",
        "--config.model_path=checkpoints/gpt_random_lowrank_k4",
        "--config.ranks=2",
        unchanged=[place],
    )
    assert "has a factorized embedding already" in line


# While training.


def test_exhausted_memory_names_the_knobs_to_lower_and_they_can_be_lowered(
    corpus_folder, place, monkeypatch
):
    def exhaust(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nmore"
        )

    with monkeypatch.context() as patched:
        patched.setattr(Training, "compile_step", exhaust)
        outcome = call(*tiny("baseline.py", corpus_folder))
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if "left" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("pcagpt: the device's memory is exhausted: lower ")
    named = re.findall(r"\w+\.\w+", lines[0])
    assert "train.batch_size" in named
    assert set(named) <= KNOBS.keys()
    smaller = tiny("baseline.py", corpus_folder, train={"batch_size": 2})
    assert call(*smaller).code == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    corpus_folder, place
):
    settings = {
        "train": {"learning_rate": 1e30, "gradient_clip": 0, "steps": 6},
        "checkpoint": {"every": 1},
    }
    outcome = call(*tiny("baseline.py", corpus_folder, **settings))
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if line.startswith("pcagpt: ")]
    assert len(lines) == 1
    stopped = re.search("the loss is not finite at step ([1-6]) ", lines[0])
    assert stopped
    assert "train.learning_rate" in lines[0]
    assert "Traceback" not in outcome.err
    run_dir = place / "checkpoints" / "gpt_baseline"
    assert not (run_dir / "result.json").exists()
    kept = [int(folder.name) for folder in (run_dir / "ckpt").glob("[0-9]*")]
    assert kept
    assert max(kept) < int(stopped[1])
    weights, _, _ = load_weights(run_dir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
