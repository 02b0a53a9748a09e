"""A run that was stopped or killed ends as one that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import (
    BANDS,
    TIMINGS,
    assert_equal,
    changed,
    execute,
    last_run_dir,
    metrics,
    quick_environment,
    saved_state,
    signal_at,
    status,
    without_timings,
)

from pcagpt import config as knobs
from pcagpt.errors import Interrupted
from pcagpt.pipeline.evaluate_task import evaluate_run
from pcagpt.run import folder as run_folder
from pcagpt.run.checkpoint import steps
from pcagpt.training.interrupt import StopRequest

pytestmark = pytest.mark.usefixtures("quick")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def straight_dir(finished_experiment):
    """The folder of D trained with tiny_config's knobs, never stopped."""
    return Path(finished_experiment.workdir) / "gpt_baseline"


def stop(config, at, number=signal.SIGTERM):
    """Trains until a signal, sent in the middle of step `at`, is obeyed after it."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, at - 1, number)
        with pytest.raises(Interrupted, match=f"stopped at step {at} of 6, saved"):
            execute(config)


def assert_same_run(found_dir, wanted_dir):
    """The same weights, optimizer state, losses, metrics and result."""
    assert_equal(saved_state(found_dir), saved_state(wanted_dir))
    assert metrics(found_dir) == metrics(wanted_dir)
    keys = [(line["step"], line["split"]) for line in metrics(found_dir)]
    assert len(set(keys)) == len(keys)
    found, wanted = (run_folder.read_result(path) for path in (found_dir, wanted_dir))
    assert without_timings(found) == without_timings(wanted)
    np.testing.assert_array_equal(
        run_folder.read_window_losses(found_dir),
        run_folder.read_window_losses(wanted_dir),
    )


@pytest.fixture
def well_mixed(tiny_config):
    """A run with dropout and accumulation."""
    return changed(
        tiny_config,
        **{"model.dropout": 0.2, "train.accumulation": 2, "train.learning_rate": 3e-3},
    )


def assert_resumes(straight, workdir):
    """That it ends the same when it is stopped; returns its folder."""
    stopped = changed(straight, workdir=str(workdir))
    stop(stopped, 4)  # due for neither an evaluation nor a checkpoint
    assert status(stopped) == "resumes at step 4"
    run_dir = execute(straight)
    assert_same_run(execute(stopped), run_dir)
    return run_dir


def test_several_bands_train_resume_bit_identical_and_are_evaluated(
    well_mixed, tmp_path
):
    banded = changed(well_mixed, arm="random", **BANDS)
    run_dir = assert_resumes(banded, tmp_path / "stopped")
    result = run_folder.read_result(run_dir)
    assert (result["rank"], result["band_sizes"]) == (None, [10, 40, 47])
    assert result["params_embedding"] == (
        10 * 32 + 40 * 8 + 8 * 32 + 47 * 4 + 4 * 32 + 97
    )
    before, *_, after = (m["loss"] for m in metrics(run_dir) if m["split"] == "val")
    assert after < before - 0.1
    evaluation = changed(
        well_mixed, task="evaluate", model_path=str(run_dir), **{"data.source": ""}
    )
    assert evaluate_run(evaluation)["loss"] == result["val_loss"]


def test_a_run_with_a_frozen_table_resumes_bit_identical(well_mixed, tmp_path):
    table = np.random.default_rng(0).normal(0, 0.02, (97, 8)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    frozen = changed(
        well_mixed,
        arm="pca",
        **{"model.n_embd_wte": 8, "init.import_wte_freeze": True},
        **{"init.import_wte_npy": str(tmp_path / "table.npy")},
    )
    assert_resumes(frozen, tmp_path / "stopped")


def test_a_run_stopped_twice_ends_bit_identical_to_one_never_stopped(
    tiny_config, straight_dir
):
    stop(tiny_config, 2)
    stop(tiny_config, 4, signal.SIGINT)
    assert not (last_run_dir(tiny_config) / "result.json").exists()
    assert_same_run(execute(tiny_config), straight_dir)


def test_a_run_killed_between_its_last_checkpoint_and_its_result_ends_the_same(
    tiny_config, straight_dir
):
    killed_dir = last_run_dir(tiny_config)
    shutil.copytree(straight_dir, killed_dir)
    (killed_dir / "result.json").unlink()
    (killed_dir / "val_window_losses.npy").unlink()
    assert status(tiny_config) == "resumes at step 6"
    execute(tiny_config)
    assert_same_run(killed_dir, straight_dir)
    found, wanted = (
        run_folder.read_result(path) for path in (killed_dir, straight_dir)
    )
    assert all(found[name] == wanted[name] for name in TIMINGS & wanted.keys())


def test_lines_logged_after_the_checkpoint_are_dropped_when_resuming(
    tiny_config, straight_dir
):
    stop(tiny_config, 4)
    with (last_run_dir(tiny_config) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "tokens": 0, "split": "train"}) + "\n")
        file.write('{"step": 6, "tok')
    assert metrics(execute(tiny_config)) == metrics(straight_dir)


def test_resuming_may_change_how_often_is_evaluated_and_saved(
    tiny_config, straight_dir
):
    stop(tiny_config, 4)
    tiny_config.evaluate.every = tiny_config.checkpoint.every = 1
    run_dir = execute(tiny_config)
    assert_equal(saved_state(run_dir), saved_state(straight_dir))
    evaluated = [line["step"] for line in metrics(run_dir) if line["split"] == "val"]
    assert evaluated == [0, 3, 5, 6]


def test_a_run_killed_by_force_resumes_to_end_bit_identical(
    tiny_config, compiled, tmp_path
):
    straight = changed(
        tiny_config,
        **{"train.steps": 100, "checkpoint.every": 10, "evaluate.every": 50},
    )
    killed = changed(straight, workdir=str(tmp_path / "killed"))
    killed_dir = last_run_dir(killed)
    default = knobs.flat(knobs.base())
    overrides = [
        knobs.override(path, value)
        for path, value in knobs.flat(killed).items()
        if value != default[path]
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pcagpt.main", "--config=configs/baseline.py"]
        + overrides,
        cwd=REPOSITORY,
        env=quick_environment(compiled),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        give_up = time.monotonic() + 60
        while max(steps(killed_dir), default=0) < 10 and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert run_folder.read_result(killed_dir) is None
    assert 10 <= max(steps(killed_dir)) < 100
    assert_same_run(execute(killed), execute(straight))


def test_a_second_interrupt_is_obeyed_at_once_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.received
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
