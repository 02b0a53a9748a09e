"""A run that was stopped or killed ends like one that never was."""

import errno
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
    described,
    execute,
    job,
    metrics,
    overrides,
    quick_environment,
    saved_state,
    signal_at,
    without_timings,
)

from pcagpt.config import Settings
from pcagpt.errors import Interrupted, UserError
from pcagpt.factorization import BandFactors, FactorizedTable
from pcagpt.factorization.factor_files import write_bands
from pcagpt.pipeline.evaluate import evaluate
from pcagpt.run import folder, initialise, provenance
from pcagpt.run.checkpoint import Checkpoints, steps
from pcagpt.training import loop
from pcagpt.training.interrupt import recorded_signals

pytestmark = pytest.mark.usefixtures("quick")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def straight_dir(finished_experiment):
    """The folder of D trained with tiny_config's knobs, never stopped."""
    return Path(finished_experiment.workdir) / "gpt_baseline"


@pytest.fixture
def resumable(straight_dir, tiny_config):
    """A function: makes tiny_config's D look as if it was killed after a save."""

    def cut(step):
        run_dir = Path(shutil.copytree(straight_dir, job(tiny_config).folder))
        (run_dir / "result.json").unlink()
        (run_dir / "val_window_losses.npy").unlink()
        for later in steps(run_dir):
            if later > step:
                shutil.rmtree(run_dir / "ckpt" / str(later))
        assert job(tiny_config).status().words == f"resumes at step {step}"
        return run_dir

    return cut


def stop(config, at, number=signal.SIGTERM):
    """Trains until a signal that arrives during step `at`; training stops after it."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, at - 1, number)
        stopped = f"stopped at step {at} of 6, saved"
        with pytest.raises(Interrupted, match=stopped) as caught:
            execute(config)
    assert caught.value.number == number


def assert_same_run(found_dir, wanted_dir):
    """The same weights, optimizer state, losses, metrics and result."""
    assert_equal(saved_state(found_dir), saved_state(wanted_dir))
    assert metrics(found_dir) == metrics(wanted_dir)
    keys = [(line["step"], line["split"]) for line in metrics(found_dir)]
    assert len(set(keys)) == len(keys)
    found, wanted = (folder.read_result(path) for path in (found_dir, wanted_dir))
    assert without_timings(found) == without_timings(wanted)
    np.testing.assert_array_equal(
        folder.read_window_losses(found_dir), folder.read_window_losses(wanted_dir)
    )


def test_a_run_with_dropout_parts_and_frozen_bands_resumes_bit_identical(
    tiny_config, tmp_path
):
    random = np.random.default_rng(0)
    sizes = zip(BANDS["model.band_sizes"], BANDS["model.band_ranks"], strict=True)
    bands = [
        BandFactors(
            random.normal(size=(n, k or 32)), random.normal(size=(k, 32)) if k else None
        )
        for n, k in sizes
    ]
    write_bands(
        tmp_path / "bands",
        FactorizedTable(random.permutation(97).astype(np.int32), tuple(bands), None),
    )
    straight = changed(
        tiny_config,
        arm="pca",
        **{"model.dropout": 0.2, "train.accumulation": 2, "train.learning_rate": 3e-3},
        **{
            "model.n_embd_wte": 11,
            "init.import_bands": str(tmp_path / "bands"),
            "init.import_wte_freeze": True,
        },
    )
    stopped = changed(straight, workdir=str(tmp_path / "stopped"))
    stop(stopped, 4)  # neither an evaluation nor a save is due
    assert job(stopped).status().words == "resumes at step 4"
    run_dir = execute(straight)
    assert_same_run(execute(stopped), run_dir)
    result = folder.read_result(run_dir)
    assert result["band_sizes"] == [10, 40, 47]
    before, *_, after = (m["loss"] for m in metrics(run_dir) if m["split"] == "val")
    assert after < before - 0.1
    again = changed(tiny_config, model_path=str(run_dir), **{"data.source": ""})
    assert evaluate(Settings.of(again))["loss"] == result["val_loss"]


def test_a_run_that_an_older_version_began_under_another_rank_goes_on(
    tiny_config, tmp_path, monkeypatch
):
    random = np.random.default_rng(0)
    band = BandFactors(random.normal(size=(97, 4)), random.normal(size=(4, 32)))
    write_bands(tmp_path / "bands", FactorizedTable.of_one_band(band))
    given = {"init.import_bands": str(tmp_path / "bands"), "model.n_embd_wte": 8}
    config = changed(tiny_config, arm="pca", **given)
    with monkeypatch.context() as older:
        older.setattr(initialise, "check_rank", lambda _: None)
        stop(config, 4)
    assert described(config)[0].endswith("resumes at step 4")
    assert execute(config).name == "gpt_pca_k8"
    assert described(config)[0].endswith("done")
    with pytest.raises(UserError, match=r"rank 4: set --config.model.n_embd_wte=4"):
        described(changed(config, overwrite=True, seed=7))


def test_a_signal_in_the_last_step_stops_what_would_follow(tiny_config, monkeypatch):
    signal_at(monkeypatch, 5, signal.SIGUSR1)
    with pytest.raises(Interrupted, match="is done: run the same command") as caught:
        execute(tiny_config)
    assert caught.value.number == signal.SIGUSR1
    assert job(tiny_config).status().words == "done"


def test_a_run_stopped_twice_ends_bit_identical_to_one_never_stopped(
    tiny_config, straight_dir
):
    stop(tiny_config, 2)
    stop(tiny_config, 4, signal.SIGINT)
    assert not (job(tiny_config).folder / "result.json").exists()
    run_dir = execute(tiny_config)
    assert_same_run(run_dir, straight_dir)
    # Kept: the last two, and the best. A signal saves, but does not evaluate.
    assert steps(run_dir) == [4, 6]


def test_a_run_killed_between_its_last_save_and_its_result_ends_the_same(
    tiny_config, straight_dir, resumable
):
    killed_dir = resumable(6)
    execute(tiny_config)
    assert_same_run(killed_dir, straight_dir)
    found, wanted = (folder.read_result(path) for path in (killed_dir, straight_dir))
    assert all(found[name] == wanted[name] for name in TIMINGS & wanted.keys())


def test_a_result_names_what_each_session_of_the_run_ran_on(tiny_config, monkeypatch):
    device = provenance.device(1)

    def session(commit, version, at=None):
        monkeypatch.setenv("PCAGPT_COMMIT", commit)
        monkeypatch.setattr(provenance, "device", lambda count: f"{device} {version}")
        monkeypatch.setattr("pcagpt.__version__", version)
        return stop(tiny_config, at) if at else execute(tiny_config)

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "git_commit", lambda: None)
        session("", "0.9", 2)
    session("one", "1.0", 3)
    session("one", "1.0", 4)
    session("two", "1.1", 5)
    result = folder.read_result(session("one", "1.2"))
    versions = ("0.9", "1.0", "1.1", "1.2")
    assert result["git_commit"] == "unknown, one, two"
    assert result["versions"]["pcagpt"] == ", ".join(versions)
    assert result["device"] == ", ".join(f"{device} {one}" for one in versions)


@pytest.mark.parametrize(
    ("place", "name"), [(Checkpoints, "save"), (loop, "write_result")]
)
def test_a_loss_is_told_if_it_cannot_be_saved(
    place, name, tiny_config, straight_dir, resumable, monkeypatch, capsys
):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_dir = resumable(3)
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(OSError, match="No space left"):
        execute(tiny_config)
    loss = folder.read_result(straight_dir)["val_loss"]
    told = f"{run_dir.name}: val loss {loss:.4f} at step 6"
    assert told in capsys.readouterr().out


def test_lines_logged_after_the_checkpoint_are_dropped_and_logged_again(
    tiny_config, straight_dir, resumable
):
    run_dir = resumable(3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    execute(tiny_config)
    assert_same_run(run_dir, straight_dir)


def test_a_run_can_resume_with_other_intervals_of_evaluation_and_saving(
    tiny_config, straight_dir, resumable
):
    run_dir = resumable(3)
    tiny_config.evaluate.every = tiny_config.checkpoint.every = 1
    execute(tiny_config)
    assert_equal(saved_state(run_dir), saved_state(straight_dir))
    evaluated = [line["step"] for line in metrics(run_dir) if line["split"] == "val"]
    assert evaluated == [0, 3, 4, 5, 6]
    assert steps(run_dir) == [5, 6]


def test_a_run_can_resume_with_other_device_knobs_and_records_them(
    tiny_config, straight_dir, resumable
):
    """Records of older versions count these knobs as part of a run's identity."""
    auto = {"compute_dtype": "float32", "attention": "xla", "kernels": "xla"}
    assert folder.read_result(straight_dir)["resolved"] == auto
    run_dir = resumable(3)
    record = folder.read_record(run_dir)
    record["model"] |= {"compute_dtype": "auto", "attention": "auto", "kernels": "auto"}
    del record["compress"], record["train"]["beta1"]  # knobs younger than the run
    folder.write_record(run_dir, record)
    named = changed(tiny_config, **{f"model.{name}": v for name, v in auto.items()})
    assert job(named).status().words == "resumes at step 3"
    execute(named)
    assert_same_run(run_dir, straight_dir)
    assert folder.read_record(run_dir)["model"]["kernels"] == "xla"
    assert folder.read_result(run_dir)["resolved"] == auto
    assert job(tiny_config).status().words == "done"


def test_a_result_names_the_kernels_of_all_sessions(tiny_config, monkeypatch):
    stop(tiny_config, 3)
    of, seen = loop.History.of, []

    def of_a_gpu(stored):
        seen.append(stored["resolved"]["kernels"])
        return of(stored | {"resolved": stored["resolved"] | {"kernels": "triton"}})

    monkeypatch.setattr(loop.History, "of", of_a_gpu)
    resolved = folder.read_result(execute(tiny_config))["resolved"]
    assert seen == ["xla"]
    assert (resolved["kernels"], resolved["attention"]) == ("triton, xla", "xla")


def test_a_run_goes_on_in_no_other_compute_dtype(tiny_config, resumable):
    run_dir = resumable(3)
    assert folder.read_record(run_dir)["model"]["compute_dtype"] == "float32"
    other = changed(tiny_config, **{"model.compute_dtype": "bfloat16"})
    words = "compute_dtype=float32 to match.: use another --config.workdir, or give"
    with pytest.raises(UserError, match=words) as caught:
        job(other).status()
    assert "(there float32, here bfloat16; " in str(caught.value)
    # The checkpoint's copy says it, too.
    (run_dir / "config.json").unlink()
    with pytest.raises(UserError, match="was begun with another compute_dtype"):
        execute(other)
    assert job(changed(other, overwrite=True)).status().words == "to do"
    assert job(tiny_config).status().words == "lacks its config.json"


def test_a_preview_on_a_cpu_does_not_know_the_compute_dtype_of_a_gpu(
    tiny_config, resumable
):
    run_dir = resumable(3)
    record = folder.read_record(run_dir)
    record["model"]["compute_dtype"] = "bfloat16"
    folder.write_record(run_dir, record)
    with pytest.raises(UserError, match="begun with another compute_dtype"):
        described(tiny_config)
    (line,) = described(tiny_config, writes=False)
    assert "resumes at step 3" in line
    asked = changed(tiny_config, **{"model.compute_dtype": "float32"})
    with pytest.raises(UserError, match="begun with another compute_dtype"):
        described(asked, writes=False)


@pytest.mark.slow
def test_a_killed_process_resumes_to_end_bit_identical(tiny_config, compiled, tmp_path):
    straight = changed(
        tiny_config,
        **{"train.steps": 100, "checkpoint.every": 10, "evaluate.every": 50},
    )
    killed = changed(straight, workdir=str(tmp_path / "killed"))
    killed_dir = job(killed).folder
    process = subprocess.Popen(
        [sys.executable, "-m", "pcagpt.main", "--config=configs/baseline.py"]
        + overrides(killed),
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
    assert folder.read_result(killed_dir) is None
    assert 10 <= max(steps(killed_dir)) < 100
    assert_same_run(execute(killed), execute(straight))


def test_a_second_interrupt_is_obeyed_at_once_and_handlers_are_given_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with recorded_signals() as request:
        assert not request.stops_at(3)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.stops_at(3)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    told = "pcagpt: stops after this step; another Ctrl-C stops it at once\n"
    assert capfd.readouterr().err == told
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
