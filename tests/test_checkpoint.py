"""Checkpoints: which are kept, what happens to damaged ones, and reading them."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import assert_equal, changed, execute, metrics, saved_state

from pcagpt.errors import UserError
from pcagpt.run import checkpoint
from pcagpt.run.checkpoint import Checkpoints

# Orbax is still reading other arrays when it gives up on a damaged one.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

WEIGHTS = {
    "params": {"embed": {"wte": np.arange(6, dtype=np.float32).reshape(3, 2)}},
    "constants": {"position": np.array([2, 0, 1], np.int32)},
}
OPTIMIZER = {"state": {"moment": np.full(4, 0.5, np.float32)}, "step": np.int32(0)}


@pytest.fixture
def said(caplog, monkeypatch):
    """A function that returns what the person was told so far."""
    # The command line takes the logger's propagation away.
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    caplog.set_level(logging.WARNING, "pcagpt")
    return lambda: [r.message for r in caplog.records if r.name.startswith("pcagpt")]


def weights_at(step):
    return jax.tree.map(lambda array: jax.numpy.asarray(array + step), WEIGHTS)


def save(run_dir, losses, keep_last=1):
    """Saves a checkpoint a step, from {step: validation loss or None}."""
    with Checkpoints(run_dir, keep_last) as checkpoints:
        for step, loss in losses.items():
            optimizer = jax.tree.map(jax.numpy.asarray, OPTIMIZER)
            checkpoints.save(step, weights_at(step), optimizer, {"at": step}, loss)
        checkpoints.wait()


def template(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
        tree,
    )


def restore(run_dir, weights=WEIGHTS):
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        found = checkpoints.restore_latest(template(weights), template(OPTIMIZER))
        return found, checkpoints.latest_step


def damage(run_dir, step, item="weights"):
    """Cuts every file of an item of a checkpoint to half its length."""
    for path in (run_dir / "ckpt" / str(step) / item).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("losses", "keep_last", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 1, [2, 4]),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 2, [2, 3, 4]),
        ({1: 3.0, 2: 1.0, 3: 0.5}, 1, [3]),
        ({1: 1.0, 2: None, 3: 2.0, 4: None}, 1, [1, 4]),
        ({1: None, 2: None, 3: None}, 2, [2, 3]),
    ],
)
def test_the_last_and_the_best_are_kept(losses, keep_last, kept, tmp_path):
    save(tmp_path, losses, keep_last)
    assert checkpoint.steps(tmp_path) == kept


def test_the_best_is_kept_across_a_restart(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0})
    save(tmp_path, {3: 2.0, 4: 2.5})
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_what_was_saved_last_is_restored_whole(tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    (weights, optimizer, meta, step), latest = restore(tmp_path)
    assert step == latest == 2
    assert meta == {"at": 2}
    for found, wanted in ((weights, weights_at(2)), (optimizer, OPTIMIZER)):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_there_is_nothing_to_restore_in_a_new_run(tmp_path):
    assert restore(tmp_path) == (None, None)


@pytest.mark.parametrize("item", ["weights", "optimizer", "meta"])
def test_a_damaged_checkpoint_is_left_for_the_one_before_which_is_said(
    item, tmp_path, said
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    damage(tmp_path, 2, item)
    (weights, _, meta, step), latest = restore(tmp_path)
    assert (step, latest, meta) == (1, 1, {"at": 1})
    jax.tree.map(np.testing.assert_array_equal, weights, weights_at(1))
    (message,) = said()
    assert f"{tmp_path}/ckpt/2 is damaged" in message
    assert "falling back to the one before" in message


def test_saving_again_replaces_the_damaged_checkpoint(tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    damage(tmp_path, 2)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.restore_latest(template(WEIGHTS), template(OPTIMIZER))
        optimizer = jax.tree.map(jax.numpy.asarray, OPTIMIZER)
        checkpoints.save(2, weights_at(2), optimizer, {"at": "again"}, 2.0)
        checkpoints.wait()
    (_, _, meta, step), _ = restore(tmp_path)
    assert (step, meta) == (2, {"at": "again"})


def test_an_unfinished_checkpoint_is_none(tmp_path):
    save(tmp_path, {1: 3.0})
    (tmp_path / "ckpt" / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    assert restore(tmp_path)[0][3] == 1


def test_when_all_are_damaged_one_line_says_so_and_none_is_deleted(tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(
        UserError, match=f"every checkpoint .* damaged .*: delete {tmp_path}"
    ):
        restore(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_checkpoint_of_another_shape_is_refused_and_kept(tmp_path):
    save(tmp_path, {1: 3.0})
    wider = {**WEIGHTS, "params": {"embed": {"wte": np.zeros((3, 4), np.float32)}}}
    with pytest.raises(UserError, match="every checkpoint"):
        restore(tmp_path, wider)
    assert checkpoint.steps(tmp_path) == [1]


# Finding


@pytest.mark.parametrize(
    ("below", "step"), [("", 4), ("ckpt", 4), ("ckpt/2", 2), ("ckpt/4/", 4)]
)
def test_a_run_its_folder_of_checkpoints_and_each_of_them_are_found(
    below, step, tmp_path
):
    save(tmp_path / "run", {1: 3.0, 2: 1.0, 4: 2.0})
    run_dir = tmp_path / "run"
    assert checkpoint.find(f"{run_dir}/{below}") == (run_dir, step)
    assert checkpoint.load_weights(run_dir / below)[2] == step


def test_what_is_no_run_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "run", {1: 3.0})
    for name, message in (
        ("nothing", "nothing does not exist: give the folder of a run"),
        ("file", "file is no folder: give the folder of a run"),
        ("empty", "empty holds no finished checkpoint"),
        ("run/ckpt/7", "7 does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            checkpoint.find(tmp_path / name)
        assert "\n" not in str(caught.value)


# Weights only


def test_loading_weights_strips_and_changes_nothing(finished_experiment):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    params, constants, step = checkpoint.load_weights(run_dir)
    assert (step, constants) == (6, {})
    assert params["embed"]["band_0"]["wte"].shape == (128, 32)  # 97 and padding
    assert params.keys() == {"embed", "wpe", "block_0", "ln_f"}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_loading_weights_returns_constants_too(tmp_path):
    save(tmp_path, {5: 1.0})
    params, constants, step = checkpoint.load_weights(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, weights_at(5)["params"])
    jax.tree.map(np.testing.assert_array_equal, constants, weights_at(5)["constants"])


def test_loading_damaged_weights_says_what_to_do(tmp_path):
    save(tmp_path, {1: 1.0})
    damage(tmp_path, 1)
    with pytest.raises(UserError, match="cannot be read .*name another step") as caught:
        checkpoint.load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_fingerprint_tells_steps_and_runs_apart(tmp_path):
    save(tmp_path / "run", {1: 1.0, 2: 2.0})
    one, two = (checkpoint.fingerprint(tmp_path / f"run/ckpt/{n}") for n in (1, 2))
    assert one != two == checkpoint.fingerprint(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"seed": 1}))
    other = checkpoint.fingerprint(tmp_path / "run")
    assert other != two
    (tmp_path / "run" / "result.json").write_text(json.dumps({"val_loss": 1}))
    assert checkpoint.fingerprint(tmp_path / "run") not in (two, other)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoint.fingerprint(tmp_path / "moved/ckpt/1") != one


# Other numbers of devices


def restart(run_dir, workdir, at):
    """A copy of a finished run as it was at a checkpoint, without its result."""
    copy = Path(workdir) / run_dir.name
    shutil.copytree(run_dir, copy)
    (copy / "result.json").unlink()
    for step in checkpoint.steps(copy):
        if step > at:
            shutil.rmtree(copy / "ckpt" / str(step))
    return copy


@pytest.mark.usefixtures("quick")
def test_a_run_saved_on_8_devices_goes_on_on_1_as_it_would_have_on_8(
    tiny_config, tmp_path
):
    on_8 = changed(
        tiny_config,
        **{"mesh.data": 2, "mesh.fsdp": 4, "checkpoint.keep_last": 2},
    )
    run_dir = execute(on_8)
    params, _, _ = checkpoint.load_weights(run_dir / "ckpt/3")
    assert params["embed"]["band_0"]["wte"].shape == (128, 32)

    moved_dir = restart(run_dir, tmp_path / "moved", at=3)
    on_1 = {"mesh.data": 1, "mesh.fsdp": 1, "workdir": str(tmp_path / "moved")}
    assert execute(changed(on_8, **on_1)) == moved_dir
    stays, moves = saved_state(run_dir), saved_state(moved_dir)
    assert stays.keys() == moves.keys()
    for name, array in stays.items():
        np.testing.assert_allclose(moves[name], array, rtol=1e-4, atol=1e-6)
    seen = [(m["step"], m["split"], m["loss"]) for m in metrics(run_dir)]
    for (step, split, loss), line in zip(seen, metrics(moved_dir), strict=True):
        assert (line["step"], line["split"]) == (step, split)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("quick")
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    finished_experiment, tiny_config, said
):
    straight_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    run_dir = restart(straight_dir, tiny_config.workdir, at=6)
    damage(run_dir, 6)
    execute(tiny_config)
    assert "falling back to the one before" in said()[0]
    assert_equal(saved_state(run_dir), saved_state(straight_dir))
    assert metrics(run_dir) == metrics(straight_dir)
