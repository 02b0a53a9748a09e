"""What a folder holds is replaced only if this code made it, unfinished, as asked."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import (
    assert_equal,
    changed,
    described,
    execute,
    job,
    json_of,
    metrics,
    plan,
    saved_state,
    setup,
    signal_at,
    snapshot,
    start,
)

from pcagpt import file_hashes, main
from pcagpt.compression import sweep, write_model
from pcagpt.compression.original import Original
from pcagpt.config import Settings
from pcagpt.data.corpus import open_corpus
from pcagpt.data.token_array import TokenArray
from pcagpt.errors import Interrupted, UserError, warn_once
from pcagpt.factorization import Factorizer
from pcagpt.json_files import write_json
from pcagpt.pipeline import compress as compressing
from pcagpt.pipeline import execute as executing
from pcagpt.pipeline import train_job
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.run import calibrate, checkpoint, digests, fingerprint, folder, lock
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.folder import read_record, read_result, write_record
from pcagpt.run.trained import Run
from pcagpt.training.setup import Setup

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copied(finished_experiment, tiny_config):
    """tiny_config, its workdir a copy of the finished experiment's."""
    shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    return tiny_config


@pytest.fixture
def made_elsewhere(finished_experiment, tiny_config):
    """tiny_config with a model at the place of D: config.json, ckpt/0 and notes."""
    source = Path(finished_experiment.workdir) / "gpt_baseline"
    run_dir = job(tiny_config).folder
    shutil.copytree(source / "ckpt" / "6", run_dir / "ckpt" / "0")
    shutil.copy(source / "config.json", run_dir)
    (run_dir / "notes.txt").write_text("mine")
    return tiny_config


def finetuned(config):
    """The config of B."""
    return changed(config, arm="pca_finetune", **{"model.n_embd_wte": 8})


def content(folder):
    """{file: its bytes}."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refusal(config):
    """The message with which a config is refused; nothing is written."""
    workdir = Path(config.workdir)
    before = snapshot(workdir)
    with pytest.raises(UserError) as caught:
        execute(config)
    assert snapshot(workdir) == before
    return str(caught.value)


def moved(folder):
    """The folder that was moved aside."""
    (found,) = folder.parent.glob(f"{folder.name}.replaced-*")
    return found


# A model made elsewhere


@pytest.mark.parametrize("kept", [("weights",), ("weights", "optimizer", "meta")])
@pytest.mark.parametrize("is_bare", [False, True])
def test_a_model_made_elsewhere_is_refused_where_a_run_was_asked_for(
    made_elsewhere, kept, is_bare
):
    run_dir = job(made_elsewhere).folder
    for item in {"weights", "optimizer", "meta"} - {*kept}:
        shutil.rmtree(run_dir / "ckpt" / "0" / item)
    if is_bare:  # As README describes it.
        record = read_record(run_dir)
        write_record(run_dir, {name: record[name] for name in ("model", "vocab_size")})
        made_elsewhere.seed = 2
    assert "holds a model that was made elsewhere: use" in refusal(made_elsewhere)


def test_a_model_made_elsewhere_is_d_for_the_arms_and_stays_as_it_is(made_elsewhere):
    run_dir = job(made_elsewhere).folder
    before = content(run_dir)
    b = finetuned(changed(made_elsewhere, seed=7))
    assert described(b)[0].endswith("done")
    run_dir_b = execute(b)
    assert read_result(run_dir_b)["status"] == "done"
    assert content(run_dir) == before
    other = changed(finetuned(made_elsewhere), **{"model.n_head": 1})
    other.workdir = str(Path(shutil.copytree(run_dir.parent, run_dir.parent / "w")))
    shutil.rmtree(Path(other.workdir) / run_dir_b.name)
    words = "gpt_baseline has another model.n_head (there 2, here 1)"
    assert words in refusal(other)
    other = changed(other, arm="continued")
    assert words in refusal(other)


def test_an_unfinished_d_without_its_optimizer_is_no_model_to_start_from(copied):
    run_dir = job(copied).folder
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "ckpt" / "6")
    for item in ("optimizer", "meta"):
        shutil.rmtree(run_dir / "ckpt" / "3" / item)
    for made in ("gpt_pca_finetune_k8", "pca_factorized"):
        shutil.rmtree(Path(copied.workdir) / made)
    assert described(finetuned(copied))[0].endswith("resumes at step 3")


def test_a_record_of_another_model_than_its_checkpoint_s_is_refused(copied):
    run_dir = job(copied).folder
    record = read_record(run_dir)
    record["model"]["n_head"] = 4
    write_record(run_dir, record)
    with pytest.raises(
        UserError, match="json contradicts .*6: .*n_head is 4, and 2 there"
    ):
        Run.open(run_dir)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("train.learning_rate", 0.01),
        ("train.steps", 12),
        ("seed", 2),
        ("corpus.train", "1d62"),
        ("imported_sha256.blocks_from", "1d62"),
        ("tokenizer", "gpt2"),
        ("characters", ["b", "a"]),
    ],
)
def test_a_record_that_was_changed_after_the_run_is_refused(copied, knob, value):
    run = finetuned(copied)
    run_dir, (section, _, field) = job(run).folder, knob.partition(".")
    for path in run_dir.glob("ckpt/*/meta/metadata"):  # The copies know a text, too.
        (path.parent.parent / "digests.json").unlink()
        meta = json.loads(path.read_text())
        meta["config"] |= {"tokenizer": "sotu4096", "characters": ["a", "b"]}
        path.write_text(json.dumps(meta))
    record = read_record(run_dir)
    if field:
        record[section][field] = value
    else:
        record[section] = value
    write_record(run_dir, record)
    asked = {knob: value} if knob in ("train.learning_rate", "seed") else {}
    wanted = rf"config.json contradicts .*: {knob} is .*, and .* there"
    for _ in ("finished", "unfinished"):
        assert re.search(wanted, refusal(run))
        assert re.search(wanted, refusal(changed(run, **asked)))
        with pytest.raises(UserError, match=wanted):
            Run.open(run_dir)
        (run_dir / "result.json").unlink(missing_ok=True)


def test_a_record_that_contradicts_its_result_is_refused_without_a_copy(copied):
    run_dir = job(copied).folder
    for path in run_dir.glob("ckpt/*/meta"):
        shutil.rmtree(path)
    write_record(run_dir, {**read_record(run_dir), "seed": 2})
    wanted = "config.json contradicts .*result.json: seed is 2, and 1 there"
    assert re.search(wanted, refusal(changed(copied, seed=2)))


def test_a_compressed_model_at_the_place_of_an_arm_is_refused(copied):
    a = changed(copied, arm="pca", **{"model.n_embd_wte": 8})
    run_dir = job(a).folder
    write_record(run_dir, {**read_record(run_dir), "compressed": {"method": "svd"}})
    (run_dir / "result.json").unlink()
    assert "holds a model that was made elsewhere" in refusal(a)


@pytest.mark.parametrize("below", ["", "ckpt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_a_folder_is_refused_by_its_name(
    tiny_config, below, overwrite
):
    place = job(tiny_config).folder / below
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    wanted = f"{place} is a file, not a folder: move it away, or use another"
    assert wanted in refusal(changed(tiny_config, overwrite=overwrite))


def test_with_overwrite_everything_is_moved_aside_and_nothing_deleted(
    made_elsewhere, capsys
):
    run_dir = job(made_elsewhere).folder
    before = content(run_dir)
    asked = changed(made_elsewhere, overwrite=True)
    execute(asked)
    assert content(moved(run_dir)) == before
    assert f"{run_dir} was moved to {moved(run_dir).name}\n" in capsys.readouterr().out
    assert read_result(run_dir)["steps"] == 6
    execute(asked)  # Now it is done.
    assert moved(run_dir).is_dir()


def test_a_link_stays_a_link_when_what_it_names_is_moved_aside(made_elsewhere):
    """The lock is beside its target: the next command must meet the same one."""
    run_dir = job(made_elsewhere).folder
    disk = Path(made_elsewhere.workdir).with_name("disk") / "D"
    disk.parent.mkdir()
    run_dir.rename(disk)
    run_dir.symlink_to(disk)
    before = content(disk)
    execute(changed(made_elsewhere, overwrite=True))
    assert run_dir.is_symlink()
    assert content(moved(disk)) == before
    assert read_result(disk)["steps"] == 6


def test_a_run_that_another_command_replaced_meanwhile_is_not_told(copied, monkeypatch):
    """The first command has seen its own run, which was finished."""

    def replace(job, is_needed):
        record = read_record(job.folder)
        write_record(job.folder, record | {"seed": 2})

    monkeypatch.setattr(train_job.TrainJob, "compare_corpus", replace)
    with pytest.raises(UserError, match="json contradicts .*: seed is 2, "):
        execute(changed(copied, task="train", arm="baseline"))


def test_the_result_of_another_run_is_moved_aside(copied, capsys):
    run_dir = job(copied).folder
    path = run_dir / "result.json"
    wanted = read_result(run_dir)["val_loss"]
    write_json(path, json_of(path) | {"run_id": "another"})
    theirs = path.read_bytes()
    assert described(copied)[0].endswith("resumes at step 6")
    execute(copied)
    assert read_result(run_dir)["val_loss"] == wanted
    (kept,) = run_dir.glob("result.json.replaced-*")
    assert kept.read_bytes() == theirs
    assert f"{path} was moved to {kept.name}" in capsys.readouterr().out


def test_a_run_that_lost_its_lock_logs_no_more(tiny_config, monkeypatch):
    run_dir, batch = job(tiny_config).folder, Setup.batch

    def lose_lock(self, step):
        if step == 2:
            (held,) = run_dir.parent.glob(f".{run_dir.name}.lock.*")
            held.unlink()
        return batch(self, step)

    monkeypatch.setattr(Setup, "batch", lose_lock)
    with pytest.raises(UserError, match="the lock .* is gone"):
        execute(tiny_config)
    assert [line["step"] for line in metrics(run_dir)] == [0, 1]


def test_a_command_that_lost_its_lock_moves_nothing_aside(made_elsewhere, monkeypatch):
    run_dir = job(made_elsewhere).folder
    before = content(run_dir)

    def lose(self):
        raise UserError("the lock is gone")

    monkeypatch.setattr(lock.Lock, "check", lose)
    with pytest.raises(UserError, match="the lock is gone"):
        execute(changed(made_elsewhere, overwrite=True))
    assert content(run_dir) == before


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_is_refused_and_with_overwrite_moved_aside(copied, name):
    run_dir = job(copied).folder
    (run_dir / name).write_text("{")
    assert f"{name} is damaged" in refusal(copied)
    before = content(run_dir)
    execute(changed(copied, overwrite=True))
    assert content(moved(run_dir)) == before
    assert read_result(run_dir)["steps"] == 6


@pytest.mark.parametrize("item", checkpoint.ITEMS)
def test_an_unfinished_run_without_a_whole_checkpoint_is_moved_aside(copied, item):
    run_dir = job(copied).folder
    (run_dir / "result.json").unlink()
    for path in (run_dir / "ckpt").glob(f"*/{item}/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes() + b" ")
    before = content(run_dir)
    with pytest.raises(UserError, match=r"give .*--config\.overwrite=True"):
        execute(copied)
    execute(changed(copied, overwrite=True))
    kept = content(moved(run_dir))
    assert {name for name in before if "ckpt" in name} <= kept.keys()
    assert read_result(run_dir)["steps"] == 6


def test_what_is_moved_aside_twice_in_a_second_has_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr("pcagpt.files.time.strftime", str)
    for number in range(3):
        (tmp_path / "run" / str(number)).mkdir(parents=True)
        train_job.move_aside(tmp_path / "run")
    assert len(list(tmp_path.glob("run.replaced-*/?"))) == 3


def test_a_link_to_an_empty_folder_stays_and_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with (
        pytest.raises(UserError, match="half"),
        folder.replacing(tmp_path / "link") as written,
    ):
        (written / "part").write_text("")
        raise UserError("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    with folder.replacing(tmp_path / "link") as written:
        (written / "whole").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/whole").exists()


# Runs of this code


def test_a_run_that_saved_nothing_yet_begins_again_in_its_folder(
    tiny_config, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_at(patch, 0, 15)
        with pytest.raises(Interrupted, match="nothing to save yet"):
            execute(tiny_config)
    run_dir = job(tiny_config).folder
    (run_dir / "notes.txt").write_text("mine")
    other = changed(tiny_config, seed=2)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "tokens": 9, "split": "train", "loss": 1}))
    assert "another config: seed (was 1, now 2)" in refusal(other)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    execute(other)
    assert read_result(run_dir)["seed"] == 2
    assert (run_dir / "notes.txt").read_text() == "mine"


def test_a_checkpoint_0_of_an_older_version_is_resumed(tiny_config, copied):
    run_dir = job(copied).folder
    record, wanted = read_record(run_dir), saved_state(run_dir)
    shutil.rmtree(run_dir)
    state, _ = start(setup(copied), run_dir)
    meta = {"history": {}, "config": {**record, "seed": 1}}
    del record["run_id"], meta["config"]["run_id"]
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        checkpoints.save(0, state.checkpoint_items, meta)
    write_record(run_dir, record)
    assert job(copied).status().words == "to do"
    execute(copied)
    assert_equal(saved_state(run_dir), wanted)


def test_a_result_of_another_run_does_not_count(copied):
    run_dir = job(copied).folder
    result = json_of(run_dir / "result.json")
    assert result["run_id"] == read_record(run_dir)["run_id"]
    write_json(run_dir / "result.json", {**result, "run_id": "another"})
    assert read_result(run_dir) is None
    assert job(copied).status().words == "resumes at step 6"
    del result["run_id"]
    write_json(run_dir / "result.json", result)
    assert read_result(run_dir) is None
    record = read_record(run_dir)
    del record["run_id"]
    write_record(run_dir, record)  # As an older version did.
    assert read_result(run_dir)["seed"] == record["seed"]
    write_json(run_dir / "result.json", {**result, "seed": 9})
    assert read_result(run_dir) is None


def test_checkpoints_of_another_run_than_config_json_are_refused(copied):
    run_dir = job(copied).folder
    write_record(run_dir, {**read_record(run_dir), "run_id": "another"})
    wanted = r"ckpt/\d is a checkpoint of another run than .*config.json: "
    share = {"finetune.learning_rate_share": 0.3}
    other_b = changed(finetuned(copied), overwrite=True, **share)
    for config in (copied, other_b):
        assert re.search(wanted, refusal(config))
    with pytest.raises(UserError, match=wanted):
        Run.open(run_dir)


def test_another_run_s_checkpoint_that_lost_its_copy_of_the_record_is_refused(copied):
    run_dir = job(copied).folder
    write_record(run_dir, {**read_record(run_dir), "run_id": "another"})
    for path in run_dir.glob("ckpt/*/meta"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="is a checkpoint of another run than"):
        Run.open(run_dir)


@pytest.fixture(params=["its", "none"])
def swapped(request, copied):
    """D's last weights are those of its first save, without digests, with a meta."""
    run_dir = job(copied).folder
    last = run_dir / "ckpt" / "6"
    for item in ("weights", "optimizer"):
        shutil.rmtree(last / item)
    shutil.copytree(run_dir / "ckpt" / "3" / "weights", last / "weights")
    (last / "digests.json").unlink()
    if request.param == "none":
        shutil.rmtree(last / "meta")
    return run_dir


def test_other_weights_without_digests_are_refused_in_a_finished_run(swapped, copied):
    for use in (Run.open, fingerprint.of, lambda _: execute(copied)):
        with pytest.raises(UserError, match="6 holds other weights than those of"):
            use(swapped)


def test_a_line_says_that_nothing_proves_the_weights_of_a_run(swapped, said):
    (swapped / "result.json").unlink()
    warn_once.cache_clear()
    Run.open(swapped)
    assert "6/digests.json is missing: nothing shows" in "".join(said())
    record = read_record(swapped)
    del record["run_id"]
    write_record(swapped, record)  # As an older version did.
    warn_once.cache_clear()
    Run.open(swapped)
    assert len(said()) == 1


def test_a_line_says_that_a_run_goes_on_from_unproved_weights(copied, said):
    run_dir = job(copied).folder
    wanted = saved_state(run_dir)
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "ckpt" / "6")
    (run_dir / "ckpt" / "3" / "digests.json").unlink()
    warn_once.cache_clear()
    execute(copied)
    assert "3/digests.json is missing: nothing shows" in "".join(said())
    assert_equal(saved_state(run_dir), wanted)


@pytest.mark.parametrize("version", ["this", "older"])
def test_a_run_does_not_fall_back_to_another_run_s_checkpoint(copied, version):
    run_dir = job(copied).folder
    (run_dir / "result.json").unlink()
    (run_dir / "ckpt" / "3" / "digests.json").unlink()
    path, field = run_dir / "ckpt" / "3" / "meta" / "metadata", "run_id"
    meta, record = json.loads(path.read_text()), read_record(run_dir)
    if version == "older":
        field = "seed"
        del meta["config"]["run_id"], record["run_id"]
        write_record(run_dir, record)
    meta["config"][field] = 9
    path.write_text(json.dumps(meta))
    said = "3 is a checkpoint of another run than"
    if version == "older":
        said = "config.json contradicts .*3: seed is 1, and 9 there"
    assert re.search(said, refusal(copied))


def test_exchanged_checkpoints_of_a_finished_run_are_refused(copied):
    ckpt = job(copied).folder / "ckpt"
    for old, new in (("6", "x"), ("3", "6"), ("x", "3")):
        (ckpt / old).rename(ckpt / new)
    assert "3 holds the weights after 6 updates, not after 3" in refusal(copied)
    with pytest.raises(UserError, match="6 holds the weights after 3 updates"):
        Run.open(ckpt.parent)


def test_a_copy_of_a_checkpoint_under_another_number_is_refused(copied):
    run_dir = job(copied).folder
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "ckpt" / "6")
    shutil.copytree(run_dir / "ckpt" / "3", run_dir / "ckpt" / "5")
    wanted = "5 holds the weights after 3 updates, not after 5"
    assert wanted in refusal(copied)
    with pytest.raises(UserError, match=wanted):
        Run.open(run_dir)


def test_a_finished_run_without_its_last_checkpoint_is_opened_only_by_name(copied):
    run_dir = job(copied).folder
    assert Run.open(run_dir).step == 6
    shutil.rmtree(run_dir / "ckpt" / "6")
    assert Run.open(run_dir / "ckpt" / "3").step == 3
    for read in (Run.open, fingerprint.of):
        with pytest.raises(
            UserError, match=r"step 6, is damaged or incomplete \(it is missing\)"
        ):
            read(run_dir)


def test_a_loss_that_is_not_finite_names_what_helps_its_run(copied):
    b = changed(finetuned(copied), **{"train.learning_rate": 1e30})
    baseline, factors, run_dir = [one.folder for one in plan(b).jobs]
    shutil.rmtree(run_dir)
    with pytest.raises(UserError, match="the loss is not finite") as caught:
        execute(b)
    lower = "lower finetune.learning_rate_share and give --config.overwrite=True, which"
    assert lower in str(caught.value)
    for made in (baseline, factors):
        shutil.rmtree(made)
    with pytest.raises(UserError, match="the loss is not finite") as caught:
        execute(b)
    lower = f"lower train.learning_rate and move {baseline} away to train it again"
    assert str(caught.value).endswith(lower)


def test_a_d_of_other_settings_is_used_with_a_word(copied, caplog):
    asked = changed(finetuned(copied), overwrite=True, **{"train.learning_rate": 0.005})
    assert described(asked)[0].endswith("done")
    assert "gpt_baseline is used as it is: train.learning_rate (was" in caplog.text


def test_a_d_that_is_used_as_it_is_shows_its_own_number_of_steps(copied):
    asked = changed(finetuned(copied), overwrite=True, **{"train.steps": 12})
    d, *_, b = (line.split() for line in described(asked))
    assert d[2:] == ["6", "steps", "done"]
    assert b[2:] == ["6", "steps", "to", "do"]  # Half of what was asked for.


def test_a_d_that_was_made_elsewhere_shows_this_instead_of_steps(made_elsewhere):
    assert described(finetuned(made_elsewhere))[0].endswith("made elsewhere  done")


def test_a_run_that_goes_on_keeps_what_it_knows_of_its_text(copied):
    run_dir = job(copied).folder
    record = read_record(run_dir) | {"characters": ["a", "b"], "tokenizer": "mine"}
    write_record(run_dir, record)
    (run_dir / "result.json").unlink()
    execute(copied)
    known = read_record(run_dir)
    assert (known["characters"], known["tokenizer"]) == (["a", "b"], "mine")


def test_a_run_stops_when_its_folder_becomes_another_runs(tiny_config, monkeypatch):
    run_dir, batch = job(tiny_config).folder, Setup.batch

    def batch_and_replace(self, step):
        if step == 1 and (run_dir / "config.json").exists():
            write_record(run_dir, {**read_record(run_dir), "run_id": "another"})
        return batch(self, step)

    monkeypatch.setattr(Setup, "batch", batch_and_replace)
    with pytest.raises(UserError, match="was removed or replaced while this run"):
        execute(tiny_config)
    assert checkpoint.steps(run_dir) == []


@pytest.mark.parametrize("at", ["step", "save", "end of a save"])
@pytest.mark.parametrize("level", ["ckpt", "run", "workdir"])
def test_a_run_whose_folder_is_moved_stops_with_a_line_and_goes_on_when_it_is_back(
    tiny_config, monkeypatch, at, level
):
    run_dir = job(tiny_config).folder
    places = {"ckpt": run_dir / "ckpt", "run": run_dir, "workdir": run_dir.parent}
    place = places[level]
    away = place.with_name("away")
    owner, name = {
        "step": (Setup, "batch"),
        "save": (ocp.CheckpointManager, "save"),
        "end of a save": (digests, "seal"),
    }[at]
    call = getattr(owner, name)

    def move_and_call(*args, **kwargs):
        if at == "step" and args[1] == 4:
            while not (run_dir / "ckpt" / "3" / digests.FILE).exists():
                time.sleep(0.01)
        if (run_dir / "ckpt").is_dir() and (at != "step" or args[1] == 4):
            place.rename(away)
        return call(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, move_and_call)
        with pytest.raises(UserError, match="removed or replaced while .* move it bac"):
            execute(tiny_config)
    if place.exists():  # Threads of Orbax may still write there.
        place.rename(place.with_name("rest"))
    away.rename(place)
    for left in run_dir.parent.glob(".*.lock.*"):  # Its process has ended elsewhere.
        left.unlink()
    execute(tiny_config)
    assert read_result(run_dir)["status"] == "done"
    assert checkpoint.steps(run_dir)[-1] == 6


def test_a_save_that_fails_does_not_hide_why_training_stopped(copied, monkeypatch):
    def close(_):
        raise ValueError("Checkpoint directory does not exist")

    monkeypatch.setattr(ocp.CheckpointManager, "close", close)
    with (
        pytest.raises(UserError, match="the reason"),
        Checkpoints(job(copied).folder, keep_last=1),
    ):
        raise UserError("the reason")
    with pytest.raises(ValueError, match="does not exist"):
        Checkpoints(job(copied).folder, keep_last=1).__exit__(None)


# A lost config.json


def test_a_lost_config_json_is_restored_from_a_checkpoint(copied):
    run_dir = job(copied).folder
    (run_dir / "config.json").rename(run_dir / "lost")
    before = snapshot(run_dir)
    assert described(copied)[0].endswith("lacks its config.json")
    assert described(finetuned(copied))[0].endswith("done")  # needs no D any more
    assert snapshot(run_dir) == before
    workdir = Path(copied.workdir)
    (workdir / "gpt_pca_finetune_k8").rename(workdir / "lost")
    assert described(finetuned(copied))[0].endswith("lacks its config.json")
    execute(copied)
    found, lost = (
        json.loads((run_dir / n).read_text()) for n in ("config.json", "lost")
    )
    assert found.pop("sha256", None) == lost.pop("sha256", None)
    assert found == lost
    (run_dir / "config.json").unlink()
    (run_dir / "result.json").unlink()
    execute(copied)
    assert read_result(run_dir)["run_id"] == found["run_id"]


def test_without_config_json_checkpoints_of_two_runs_are_refused(copied):
    run_dir = job(copied).folder
    (run_dir / "config.json").unlink()
    (run_dir / "ckpt" / "3" / "digests.json").unlink()
    path = run_dir / "ckpt" / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["run_id"] = "another"
    path.write_text(json.dumps(meta))
    assert "3 is a checkpoint of another run than" in refusal(copied)


def test_a_lost_config_json_is_no_agreement_with_other_settings(copied):
    run_dir = job(copied).folder
    (run_dir / "config.json").unlink()
    other = changed(copied, **{"train.learning_rate": 1e-2})
    assert "train.learning_rate (was 0.0006, now 0.01)" in refusal(other)
    (run_dir / "result.json").unlink()
    assert "train.learning_rate (was 0.0006, now 0.01)" in refusal(other)


def test_without_config_json_and_a_copy_of_it_a_run_is_refused(copied):
    run_dir = job(copied).folder
    (run_dir / "config.json").unlink()
    for step in checkpoint.steps(run_dir):
        shutil.rmtree(run_dir / "ckpt" / str(step) / "meta")
    message = "holds a run without its config.json, and no checkpoint has a copy"
    assert message in refusal(copied)
    (run_dir / "result.json").unlink()
    assert message in refusal(copied)
    before = content(run_dir)
    execute(changed(copied, overwrite=True))
    assert content(moved(run_dir)) == before


def test_a_fault_of_d_is_not_told_as_one_of_b(copied):
    d, b = job(copied).folder, job(finetuned(copied)).folder
    experiment = changed(copied, task="experiment", ranks=(8,))
    (d / "config.json").rename(d / "lost")
    for path in d.glob("ckpt/*/meta"):
        shutil.rmtree(path)
    lost = "gpt_baseline holds a run without its config.json, and no checkpoint has"
    assert lost in refusal(experiment)
    with pytest.raises(UserError, match="gpt_baseline has no config.json: it is not"):
        fingerprint.of(d)
    assert described(finetuned(copied))[0].endswith("done")  # B is good.
    shutil.rmtree(d)
    shutil.copytree(b.with_name("gpt_pca_k8"), d)
    assert "gpt_baseline was trained with another config: arm" in refusal(experiment)


# Factorizations and compressed models


@pytest.fixture
def factorization(copied):
    """The config of D's factorization at rank 4; rank 8 is there."""
    return changed(
        copied,
        task="factorize",
        model_path=f"{copied.workdir}/gpt_baseline",
        ranks=(4,),
    )


def test_a_persons_file_at_the_place_of_factors_is_refused_or_moved(factorization):
    folder = job(factorization).folder
    (folder / "wte_pca_k4.npy").write_text("mine")
    assert "wte_pca_k4.npy does not belong to a factorization" in refusal(factorization)
    (folder / "metadata.json").unlink()
    assert "does not belong to a factorization made here" in refusal(factorization)
    before = content(folder)
    execute(changed(factorization, overwrite=True))
    assert content(moved(folder)) == before
    assert np.load(folder / "wte_pca_k4.npy").shape == (97, 4)


def test_another_rank_leaves_the_files_that_are_there_alone(factorization):
    folder = job(factorization).folder
    names = ("wte_pca_k8.npy", "scale_mats_pca_k8.npz")
    before = [(folder / name).stat().st_mtime_ns for name in names]
    execute(factorization)
    assert [(folder / name).stat().st_mtime_ns for name in names] == before
    ranks = json.loads((folder / "metadata.json").read_text())["ranks"]
    assert list(ranks) == ["4", "8"]


def test_the_place_of_a_compressed_model_must_be_its_own(tmp_path):
    place = tmp_path / "best_k8"
    write_model.check_place(place)
    place.mkdir()
    write_model.check_place(place)
    write_record(place, {"model": {}})
    with pytest.raises(UserError, match="best_k8 holds something other than"):
        write_model.check_place(place)
    write_record(place, {"model": {}, "compressed": {}})
    write_model.check_place(place)


# Other commands at the same time


@pytest.fixture
def meanwhile(monkeypatch):
    """A function: holds a folder until its waiter sleeps, and then does something."""

    def hold(folder, action):
        holder = lock.Lock(folder)
        assert holder.attempt() is None

        def act(_):
            action()
            holder.release()

        monkeypatch.setattr(lock.time, "sleep", act)

    return hold


def test_what_another_command_did_meanwhile_is_not_done_again(
    finished_experiment, tiny_config, meanwhile, monkeypatch, capsys
):
    b = finetuned(tiny_config)
    jobs, finished = plan(b).jobs, Path(finished_experiment.workdir)
    monkeypatch.setattr(train_job, "train", pytest.fail)
    monkeypatch.setattr(FactorizeJob, "_write", pytest.fail)
    for one in jobs:
        assert one.status().words == "to do"
        source = finished / one.folder.name
        meanwhile(one.folder, lambda s=source, to=one.folder: shutil.copytree(s, to))
        one.run()
        assert (
            f"waiting for {one.folder}: process {os.getpid()}"
            in capsys.readouterr().out
        )
        assert one.status().words == "done"


def test_another_config_that_appears_meanwhile_is_refused_without_a_long_wait(
    tiny_config, meanwhile
):
    asked = job(tiny_config)
    record = {**job(changed(tiny_config, seed=2)).record(), "run_id": "another"}

    def begin():
        write_record(asked.folder, record)
        (asked.folder / "metrics.jsonl").write_text("{}\n")

    meanwhile(asked.folder, begin)
    with pytest.raises(UserError, match=r"seed \(was 2, now 1\)"):
        asked.run()


def test_factors_that_another_command_made_with_d_meanwhile_are_no_mistake(copied):
    _, factors, _ = plan(finetuned(copied)).jobs
    factors.check({factors.source})
    (factors.source / "result.json").unlink()
    factors.check({factors.source})  # Its last step is there.
    shutil.rmtree(factors.source / "ckpt/6")
    with pytest.raises(UserError, match="another factorization"):
        factors.check({factors.source})


# D is replaced while a command uses it


@pytest.fixture
def replace_d(copied, tmp_path):
    """Replaces D by a run of another seed: a function without arguments."""
    other = changed(copied, workdir=str(tmp_path / "other"), seed=9)
    new, there = execute(other), Path(copied.workdir) / "gpt_baseline"

    def replace():
        if not there.with_name("old").exists():
            there.rename(there.with_name("old"))
            shutil.copytree(new, there)

    return replace


def first_replacing(replace, function):
    """The function, after D was replaced."""

    def replaced(*args, **kwargs):
        replace()
        return function(*args, **kwargs)

    return replaced


@pytest.mark.parametrize(
    ("owner", "name", "overrides"),
    [
        (Factorizer, "of_rank", {"task": "factorize", "ranks": (4,)}),
        (calibrate, "collect", {"task": "factorize", "factorize.method": "kl"}),
        (Original, "measure", {"task": "compress"}),
        (Original, "measure", {"task": "compress", "compress.max_bytes": 9000}),
        (sweep, "write_sweep_report", {"compress.recover_ranks": (8,)}),
    ],
)
def test_what_was_made_of_a_replaced_d_is_not_written_as_the_new_d_s(
    copied, replace_d, monkeypatch, owner, name, overrides
):
    shutil.rmtree(Path(copied.workdir) / "pca_factorized")
    d = Path(copied.workdir) / "gpt_baseline"
    chosen = {"task": "compress", "model_path": str(d), "ranks": (8,)}
    chosen |= {"compress.methods": "svd", "compress.bands": (1,)}
    chosen |= {"compress.calibration_tokens": 512, "compress.bits": ()}
    before = Run.open(d).fingerprint
    replacing = first_replacing(replace_d, getattr(owner, name))
    monkeypatch.setattr(owner, name, replacing)
    settings = Settings.of(changed(copied, **chosen | overrides))
    with pytest.raises(UserError, match="was .*changed while .*: run the same command"):
        main.run(settings, "a command", print_only=False)
    made = {p.name for p in Path(copied.workdir).rglob("*") if "best" in p.name}
    assert not (Path(copied.workdir) / "pca_factorized" / "metadata.json").exists()
    if name == "write_sweep_report":
        assert made == {"best_k8"}
        best = Path(copied.workdir) / "compressed" / "best_k8"
        assert read_record(best)["compressed"]["fingerprint"] == before
    else:
        assert not made


def test_the_loss_of_a_replaced_run_is_only_printed(
    copied, replace_d, monkeypatch, said, capsys
):
    d = Path(copied.workdir) / "gpt_baseline"
    before = read_result(d)["val_loss"]
    replacing = first_replacing(replace_d, Evaluator.__call__)
    monkeypatch.setattr(Evaluator, "__call__", replacing)
    config = changed(copied, task="evaluate", model_path=str(d))
    main.run(Settings.of(config), "a command", print_only=False)
    assert f"{before:.4f}" in capsys.readouterr().out
    assert "gpt_baseline was replaced or changed while" in "".join(said())
    assert not list(d.glob("evaluation_*"))


# The corpus changes while a command uses it


@pytest.fixture
def own_corpus(copied, corpus_folder, tmp_path):
    """The config of a copy of the corpus, and a function that edits its splits."""
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    tokens = {path: np.fromfile(path, "<u2") for path in folder.glob("*.bin")}

    def edit():
        for path, ids in tokens.items():
            ids[::-1].tofile(path)

    d = str(Path(copied.workdir) / "gpt_baseline")
    return changed(copied, model_path=d, **{"data.source": str(folder)}), edit


SWEEP = {"task": "compress", "ranks": (8,), "compress.calibration_tokens": 512}
SWEEP |= {"compress.methods": "svd,kl", "compress.bands": (1,), "compress.bits": ()}


@pytest.mark.parametrize(
    ("owner", "name", "overrides"),
    [
        (calibrate, "collect", SWEEP),
        (Original, "measure", SWEEP),
        (Setup, "batch", {"workdir": "new", "model_path": "", "seed": 3}),
    ],
)
def test_no_result_of_a_corpus_that_changed_on_the_way_is_written(
    own_corpus, tmp_path, monkeypatch, owner, name, overrides
):
    config, edit = own_corpus
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(owner, name, first_replacing(edit, getattr(owner, name)))
    settings = Settings.of(changed(config, **overrides))
    before = {*tmp_path.rglob("statistics*")}
    with pytest.raises(UserError, match=r"corpus/\w+.bin was changed while"):
        main.run(settings, "a command", print_only=False)
    is_measured = name == "measure"  # Statistics are measured before.
    assert is_measured or {*tmp_path.rglob("statistics*")} == before
    assert not list(tmp_path.rglob("sweep.json"))
    assert not list((tmp_path / "new").rglob("ckpt/*/weights"))


def test_the_loss_on_a_corpus_that_changed_on_the_way_is_only_printed(
    own_corpus, monkeypatch, said
):
    config, edit = own_corpus
    replacing = first_replacing(edit, Evaluator.__call__)
    monkeypatch.setattr(Evaluator, "__call__", replacing)
    settings = Settings.of(changed(config, task="evaluate"))
    main.run(settings, "a command", print_only=False)
    assert "val.bin was changed while this command used it" in "".join(said())
    assert not list(Path(config.model_path).glob("evaluation_*"))


def test_an_experiment_is_not_compared_with_a_d_that_came_later(
    copied, replace_d, monkeypatch
):
    (Path(copied.workdir) / "report.html").unlink()
    replacing = first_replacing(replace_d, executing._corpora_without_text)
    monkeypatch.setattr(executing, "_corpora_without_text", replacing)
    with pytest.raises(UserError, match="gpt_baseline was trained .* seed"):
        execute(changed(copied, task="experiment"))
    assert not (Path(copied.workdir) / "report.html").exists()


def test_a_recovery_is_not_compared_with_a_d_that_came_later(
    copied, replace_d, monkeypatch
):
    def executed(*args, **kwargs):
        executing.execute(*args, **kwargs)
        replace_d()

    monkeypatch.setattr(compressing, "execute", executed)
    d = str(Path(copied.workdir) / "gpt_baseline")
    asked = SWEEP | {"compress.recover_ranks": (8,), "model_path": d}
    settings = Settings.of(changed(copied, **asked))
    with pytest.raises(UserError, match="was replaced or changed while"):
        main.run(settings, "a command", print_only=False)
    sweep_file = Path(copied.workdir) / "compressed" / "sweep.json"
    assert "recovered" not in json_of(sweep_file)


def rewrite(path, ids=None):
    """Writes a file in place, with its own ids again or others of equal number."""
    time.sleep(0.01)  # Its ctime shows it.
    with path.open("r+b") as file:
        file.write(path.read_bytes() if ids is None else ids.astype("<u2").tobytes())


def swap_for_a_moment(path):
    status, own = path.stat(), np.fromfile(path, "<u2")
    for ids in (own[::-1], own):
        rewrite(path, ids)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path):
    new = path.with_suffix(".new")
    np.fromfile(path, "<u2")[::-1].tofile(new)
    new.replace(path)


@pytest.mark.parametrize(
    ("do", "told"),
    [
        (Path.touch, "was touched or written"),
        (rewrite, "was touched or written"),
        (swap_for_a_moment, "was touched or written"),
        (Path.unlink, "was removed or replaced"),
        (replace, "was removed or replaced"),
        (lambda path: path.parent.rename(path.parent.with_name("x")), "was removed or"),
        (lambda path: path.stat(), None),
    ],
)
def test_tokens_that_are_proved_good_stay_and_a_warning_tells_of_their_file(
    own_corpus, tmp_path, said, do, told
):
    config, _ = own_corpus
    corpus = open_corpus(config.data.source, tmp_path)
    ids, hashes = np.array(corpus.tokens("val")), corpus.tokens_sha256("val")
    time.sleep(0.01)
    warn_once.cache_clear()
    do(tmp_path / "corpus/val.bin")
    for _ in range(2):
        corpus.check_unchanged()
    np.testing.assert_array_equal(corpus.tokens("val"), ids)
    assert corpus.count_tokens("val").sum() == len(ids)
    assert corpus.tokens_sha256("val") == hashes
    warnings = [line for line in said() if "val.bin" in line]
    assert [told in line for line in warnings] == ([True] if told else [])


def test_an_open_file_is_hashed_only_if_its_stamp_differs(
    own_corpus, tmp_path, monkeypatch
):
    config, _ = own_corpus
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", 0)
    corpus = open_corpus(config.data.source, tmp_path)
    tokens = corpus.tokens("val")
    with monkeypatch.context() as patch:
        patch.setattr(TokenArray, "sha256", None)
        corpus.check_unchanged()
    rewrite(tmp_path / "corpus/val.bin", np.array(tokens)[::-1])
    with pytest.raises(UserError, match=r"val.bin was changed while this command"):
        corpus.check_unchanged()


@pytest.mark.parametrize("how", [Path.unlink, Path.touch, replace])
def test_training_is_saved_though_its_token_files_lost_their_names(
    own_corpus, tmp_path, monkeypatch, how
):
    config, _ = own_corpus

    def lose():
        for path in (tmp_path / "corpus").glob("*.bin"):
            if path.exists():
                how(path)
        monkeypatch.setattr(Setup, "batch", batch)

    batch = Setup.batch
    monkeypatch.setattr(Setup, "batch", first_replacing(lose, batch))
    new = changed(config, workdir=str(tmp_path / "new"), model_path="", seed=3)
    plan(new).jobs[-1].run()
    assert read_result(tmp_path / "new/gpt_baseline")["steps"] == new.train.steps


def test_an_error_before_a_save_tells_how_many_steps_are_lost(
    own_corpus, tmp_path, monkeypatch
):
    config, edit = own_corpus
    monkeypatch.chdir(tmp_path)
    batch = Setup.batch

    def edited(self, step):
        if step == 4:
            edit()
        return batch(self, step)

    monkeypatch.setattr(Setup, "batch", edited)
    settings = Settings.of(changed(config, workdir="new", model_path="", seed=3))
    with pytest.raises(UserError, match=r"the 3 steps since step 3 are not saved"):
        main.run(settings, "a command", print_only=False)


@pytest.mark.parametrize(
    ("name", "at_start", "during", "before"),
    [
        ("gpt_baseline", False, "gpt_baseline", "pca_factorized"),
        ("gpt_baseline", False, "pca_factorized", "gpt_pca_finetune_k8"),
        ("pca_factorized", False, "pca_factorized", "gpt_pca_finetune_k8"),
        ("gpt_baseline", True, "pca_factorized", "pca_factorized"),
        ("pca_factorized", True, "gpt_pca_finetune_k8", "gpt_pca_finetune_k8"),
    ],
)
def test_a_prerequisite_that_is_removed_meanwhile_is_named(
    name, at_start, during, before, tiny_config, monkeypatch
):
    config = finetuned(tiny_config)
    of_plan = {one.folder.name: one for one in plan(config).jobs}
    kind, gone = type(of_plan[during]), of_plan[name].folder
    run = kind.run

    def remove(self, *arguments):
        if self.folder.name != during:
            run(self, *arguments)
        elif at_start:
            shutil.rmtree(gone)
            run(self, *arguments)
        else:
            run(self, *arguments)
            shutil.rmtree(gone)

    monkeypatch.setattr(kind, "run", remove)
    line = f"{gone} was removed while this command ran: restore it, or run the same"
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        execute(config)
    assert not of_plan[before].folder.exists()
    monkeypatch.undo()
    execute(tiny_config)  # As the same command asks for if only the factors are left.
    assert read_result(execute(config))
