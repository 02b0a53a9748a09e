"""Run folders: what is finished is skipped, what differs refused, by name."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import (
    changed,
    execute,
    last_run_dir,
    metrics,
    signal_at,
    snapshot,
    status,
    without_timings,
)

from pcagpt.errors import Interrupted, UserError
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.plan import make_plan
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copied(finished_experiment, tiny_config):
    """tiny_config with a copy of the finished experiment as its workdir."""
    shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    return tiny_config


def pca(config):
    """The config of A."""
    return changed(config, arm="pca", **{"model.n_embd_wte": 8})


def finetuned(config):
    """The config of B."""
    return changed(config, arm="pca_finetune", **{"model.n_embd_wte": 8})


# Finished runs


def test_a_finished_run_is_skipped_and_not_a_file_is_touched(copied):
    before = snapshot(Path(copied.workdir))
    execute(copied)
    execute(pca(copied))
    assert snapshot(Path(copied.workdir)) == before


@pytest.mark.parametrize(
    "lost", ["gpt_baseline", "pca_factorized", "gpt_baseline pca_factorized"]
)
def test_a_finished_run_needs_its_prerequisites_no_more(lost, copied):
    for folder in lost.split():
        shutil.rmtree(Path(copied.workdir) / folder)
    before = snapshot(Path(copied.workdir))
    execute(pca(copied))
    assert snapshot(Path(copied.workdir)) == before


@pytest.mark.parametrize("lost", ["result.json", "result.json ckpt", "status"])
def test_a_half_finished_run_is_never_taken_for_a_finished_one(lost, copied):
    run_dir = last_run_dir(copied)
    wanted = run_folder.read_result(run_dir)
    if lost == "status":
        run_folder.write_json(run_dir / "result.json", {**wanted, "status": "failed"})
    else:
        (run_dir / "result.json").unlink()
    if lost.endswith("ckpt"):
        shutil.rmtree(run_dir / "ckpt")
    assert run_folder.read_result(run_dir) is None
    assert status(copied) == ("to do" if "ckpt" in lost else "resumes at step 6")
    execute(copied)
    found = run_folder.read_result(run_dir)
    assert without_timings(found) == without_timings(wanted)


def test_a_damaged_result_is_no_result_and_is_named(copied):
    (last_run_dir(copied) / "result.json").write_text('{"status": "do')
    with pytest.raises(UserError, match="result.json is damaged: delete .*gpt_base"):
        execute(copied)


# Other configs


def test_a_run_whose_config_changed_is_refused_with_old_and_new_values(copied):
    before = snapshot(Path(copied.workdir))
    other = changed(copied, **{"train.learning_rate": 1e-3, "model.dropout": 0.1})
    with pytest.raises(UserError) as caught:
        execute(other)
    message = str(caught.value)
    assert "gpt_baseline was trained with another config" in message
    assert "train.learning_rate (was 0.0006, now 0.001)" in message
    assert "model.dropout (was 0.0, now 0.1)" in message
    assert "--config.overwrite=True" in message
    assert "\n" not in message
    assert message.count("(was") == 2
    assert snapshot(Path(copied.workdir)) == before


def test_a_stopped_run_is_refused_when_its_config_changed(tiny_config, monkeypatch):
    signal_at(monkeypatch, 2, 15)
    with pytest.raises(Interrupted):
        execute(tiny_config)
    with pytest.raises(UserError, match=r"seed \(was 1, now 2\)"):
        execute(changed(tiny_config, seed=2))
    assert status(tiny_config) == "resumes at step 3"


def test_overwrite_discards_the_run_and_trains_it_anew(copied):
    run_dir = last_run_dir(copied)
    (run_dir / "left over").write_text("")
    other = changed(copied, overwrite=True, **{"train.steps": 4})
    assert status(other) == "to do"
    execute(other)
    assert run_folder.read_result(run_dir)["steps"] == 4
    assert not (run_dir / "left over").exists()
    assert max(line["step"] for line in metrics(run_dir)) == 4
    assert checkpoint.steps(run_dir) == [3, 4]


def test_overwrite_leaves_a_run_alone_that_does_not_differ(copied):
    before = snapshot(Path(copied.workdir))
    execute(changed(copied, overwrite=True))
    assert snapshot(Path(copied.workdir)) == before


def test_overwriting_a_run_leaves_its_prerequisites_and_other_ranks_alone(copied):
    workdir = Path(copied.workdir)
    execute(
        changed(
            copied, task="factorize", ranks=(4,), model_path=f"{workdir}/gpt_baseline"
        )
    )
    baseline = snapshot(workdir / "gpt_baseline")
    execute(changed(pca(copied), overwrite=True, **{"train.steps": 2}))
    assert run_folder.read_result(workdir / "gpt_pca_k8")["steps"] == 2
    assert snapshot(workdir / "gpt_baseline") == baseline
    tables = sorted(path.name for path in (workdir / "pca_factorized").glob("wte*"))
    assert tables == ["wte_pca_k4.npy", "wte_pca_k8.npy"]


def test_a_stopped_run_is_refused_when_its_tokens_changed(tiny_config, tmp_path):
    source = Path(shutil.copytree(tiny_config.data.source, tmp_path / "corpus"))
    tiny_config.data.source = str(source)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 2, 15)
        with pytest.raises(Interrupted):
            execute(tiny_config)
    tokens = np.fromfile(source / "train.bin", np.uint16)
    tokens[::-1].tofile(source / "train.bin")
    with pytest.raises(UserError, match="gpt_baseline was trained on other tokens"):
        execute(tiny_config)
    tokens.tofile(source / "train.bin")
    assert run_folder.read_result(execute(tiny_config))["steps"] == 6


@pytest.mark.parametrize(
    "knob",
    [
        {"telemetry.every": 5},
        {"telemetry.tensorboard": True},
        {"evaluate.every": 2},
        {"evaluate.batch_size": 4},
        {"checkpoint.every": 2},
        {"checkpoint.keep_last": 5},
        {"mesh.data": 2},
        {"mesh.fsdp": 2},
        {"data.cache_dir": "elsewhere"},
        {"build_prerequisites": False},
        {"ranks": (4,)},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_a_run_is_the_same_whatever_its_numbers_do_not_depend_on(knob, copied):
    assert status(changed(copied, **knob)) == "done"
    assert status(changed(pca(copied), **knob)) == "done"


def test_a_folder_of_runs_can_be_moved(copied, tmp_path):
    moved = changed(copied, workdir=str(tmp_path / "moved"))
    Path(copied.workdir).rename(moved.workdir)
    for config in (moved, pca(moved), finetuned(moved)):
        assert status(config) == "done"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wte_pca_k8.npy", "import_wte_npy"),
        ("scale_mats_pca_k8.npz", "import_scale_matrices_npz"),
    ],
)
def test_an_imported_file_of_other_content_is_another_config(file, name, copied):
    path = Path(copied.workdir) / "pca_factorized" / file
    if path.suffix == ".npy":
        np.save(path, np.load(path) * 2)
    else:
        np.savez(path, **{key: array * 2 for key, array in np.load(path).items()})
    with pytest.raises(UserError, match=rf"imported_sha256\.{name} \(was \w+, now \w+"):
        execute(pca(copied))


def test_blocks_of_another_run_are_another_config(copied):
    b = finetuned(copied)
    assert status(b) == "done"
    result = Path(copied.workdir) / "gpt_baseline" / "result.json"
    run_folder.write_json(result, {**json.loads(result.read_text()), "val_loss": 1.0})
    with pytest.raises(UserError, match=r"imported_sha256\.blocks_from \(was"):
        status(b)


# Files


def test_every_section_that_numbers_depend_on_is_in_the_identity(tiny_config):
    identity = run_folder.identity(tiny_config.to_dict())
    assert {name.split(".")[0] for name in identity} == {
        "arm", "seed", "model", "data", "train", "distill", "init",
        "imported_sha256",
    }  # fmt: skip
    assert identity["model.n_embd"] == 32
    assert run_folder.config_sha256(tiny_config.to_dict()) != run_folder.config_sha256(
        changed(tiny_config, seed=7).to_dict()
    )


def test_an_identity_survives_being_written_and_read(tiny_config, tmp_path):
    config = changed(
        tiny_config, **{"model.band_sizes": (50, 47), "model.band_ranks": (0, 4)}
    ).to_dict()
    run_folder.write_config(tmp_path, config)
    stored = run_folder.read_config(tmp_path)
    assert run_folder.identity(stored) == run_folder.identity(config)
    assert run_folder.changed_fields(tmp_path, config) == []


def test_results_are_strict_json_without_not_a_number(tmp_path):
    run_folder.write_json(
        tmp_path / "x.json",
        {"a": math.nan, "b": [math.inf, np.float32(0.5)], "c": (np.int64(3), None)},
    )
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 0.5], "c": [3, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_result_is_written_after_the_window_losses(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        with pytest.raises(OSError, match="full"):
            run_folder.write_result(tmp_path, {"status": "done"}, np.zeros((1, 2)))
    assert run_folder.read_result(tmp_path) is None


def test_nothing_is_known_of_a_folder_where_no_run_began(tmp_path):
    assert run_folder.read_config(tmp_path) is None
    assert run_folder.read_result(tmp_path) is None
    assert run_folder.changed_fields(tmp_path, {"seed": 1}) == []


def test_the_plan_says_what_is_done_and_what_is_not(copied):
    def shown(config):
        return [line.split()[-1] for line in experiment.describe(make_plan(config))]

    assert shown(copied) == ["done"]
    shutil.rmtree(Path(copied.workdir) / "gpt_pca_k8")
    assert shown(pca(copied)) == ["done", "done", "do"]
    assert shown(changed(copied, overwrite=True, seed=7)) == ["do"]
