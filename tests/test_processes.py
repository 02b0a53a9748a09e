"""Several processes, joined by jax.distributed, train what one process would."""

import errno
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from runs import changed, metrics, overrides, quick_environment

from pcagpt import main
from pcagpt.config import Settings, override
from pcagpt.errors import Interrupted, Unreadable, UserError
from pcagpt.run import checkpoint, folder
from pcagpt.sharding import processes
from pcagpt.training.interrupt import StopRequest

pytestmark = pytest.mark.usefixtures("quick")

REPOSITORY = Path(__file__).parent.parent
SECONDS = 300  # a limit for a busy machine
AFTER = 60  # in which the others end when one process did


def test_a_signal_to_one_process_stops_all_at_the_same_step(monkeypatch):
    """In this process: what the other one received is made up."""
    others = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: np.array([own, *others])
    )
    request = StopRequest()
    others[:] = [False]
    assert not request.stops_at(10)
    others[:] = [True]
    assert request.stops_at(10)
    request.received = True
    assert not request.stops_at(13)  # processes exchange signals every ten steps
    others[:] = [False]
    assert request.stops_at(20)


def test_what_the_first_process_decides_or_refuses_is_the_same_on_all(monkeypatch):
    """In this process, as one process after the other."""
    sent = []

    def as_process(number, decide):
        waiting = list(sent)

        def broadcast(value):
            if number == 0:
                sent.append(value)
                return value
            assert np.shape(value) == np.shape(waiting[0])
            return waiting.pop(0)

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
        return processes.from_first(decide)

    def fail(error):
        raise error

    for value in (None, "to do", [[0, "done"], [1, "résumé"]]):
        sent.clear()
        assert as_process(0, lambda v=value: v) == value
        assert as_process(1, pytest.fail) == value
    sent.clear()
    nested = as_process(0, lambda: processes.from_first(lambda: "a call"))
    assert (nested, len(sent)) == ("a call", 2)  # one size and one answer
    for error in (
        UserError("no such folder"),
        Unreadable("no permission"),
        Interrupted("stopped", signal.SIGUSR1),
        OSError(errno.ENOSPC, "No space left on device", "a"),
        KeyError("a bug"),
    ):
        sent.clear()
        for number, decide in enumerate((partial(fail, error), pytest.fail)):
            with pytest.raises(type(error)) as caught:
                as_process(number, decide)
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
            assert vars(caught.value) == vars(error)


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def run_in_processes(config, log_dir, cache, count=2, meanwhile=lambda processes: None):
    """`python -m pcagpt.main`, with a device each: exit codes and output.

    `meanwhile` is called with the processes, again and again, while they run. When one
    has failed, the others get `AFTER` seconds.
    """
    environment = quick_environment(cache)
    # The last flag of the same name counts.
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    joined = {
        "distributed.enabled": True,
        "distributed.coordinator_address": free_address(),
        "distributed.num_processes": count,
    }
    words = [*overrides(config), *(override(*setting) for setting in joined.items())]
    processes, logs = [], []
    try:
        for number in range(count):
            logs.append(log_dir / f"{number}.log")
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "pcagpt.main"]
                        + ["--config=configs/baseline.py", *words]
                        + [override("distributed.process_id", number)],
                        cwd=REPOSITORY,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        give_up = time.monotonic() + SECONDS
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):
                give_up = min(give_up, time.monotonic() + AFTER)
            if time.monotonic() > give_up:
                break
            meanwhile(processes)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [p.returncode for p in processes], [log.read_text() for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_a_and_its_prerequisites_like_one(
    count, finished_experiment, tmp_path, compiled
):
    config = changed(
        finished_experiment,
        task="train",
        arm="pca",
        workdir=str(tmp_path / "runs"),
        **{"model.n_embd_wte": 8, "mesh.data": count // 2, "mesh.fsdp": 2},
        **{"checkpoint.every": 6, "checkpoint.keep_last": 1},
    )
    codes, said = run_in_processes(config, tmp_path, compiled, count)
    assert codes == [0] * count, "\n".join(said)
    for run in ("gpt_baseline", "gpt_pca_k8"):
        one = Path(finished_experiment.workdir) / run
        several = Path(config.workdir) / run
        found, wanted = folder.read_result(several), folder.read_result(one)
        assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)
        by_decile = [one["val_loss_by_decile"] for one in (found, wanted)]
        for loss, wanted_loss in zip(*by_decile, strict=True):  # None: no tokens.
            assert loss == (wanted_loss and pytest.approx(wanted_loss, rel=1e-5))
        assert found["device"].startswith(f"{count} x")
        for line, other in zip(metrics(several), metrics(one), strict=True):
            assert (line["step"], line["split"]) == (other["step"], other["split"])
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert "A gpt_pca_k8" in said[0]
    assert "to do" not in "".join(said[1:])  # Only the first process prints the plan.


@pytest.mark.slow
def test_the_first_of_two_processes_writes_the_report(
    finished_experiment, tmp_path, compiled
):
    workdir = shutil.copytree(finished_experiment.workdir, tmp_path / "runs")
    (workdir / "report.md").unlink()
    config = changed(finished_experiment, workdir=str(workdir))
    codes, said = run_in_processes(config, tmp_path, compiled)
    assert codes == [0, 0], "\n".join(said)
    assert (workdir / "report.md").exists()
    assert ["report: " in text for text in said] == [True, False]


@pytest.mark.slow
def test_when_one_of_two_processes_gets_a_signal_both_stop_at_the_same_step(
    finished_experiment, tmp_path, compiled
):
    config = changed(
        finished_experiment,
        task="train",
        arm="baseline",
        workdir=str(tmp_path / "runs"),
        **{"train.steps": 100_000, "mesh.data": 2},
        **{"checkpoint.every": 100_000, "evaluate.every": 100_000},
    )
    run_dir = tmp_path / "runs" / "gpt_baseline"
    asked = []

    def ask_the_second(processes):
        log = run_dir / "metrics.jsonl"
        if not asked and log.exists() and '"train"' in log.read_text():
            asked.append(processes[1].pid)
            processes[1].send_signal(signal.SIGTERM)

    codes, said = run_in_processes(config, tmp_path, compiled, meanwhile=ask_the_second)
    assert asked
    assert codes == [1, 1], "\n".join(said)
    first, second = (re.findall(r"stopped at step (\d+) of 100000", s) for s in said)
    assert first == second
    assert max(checkpoint.steps(run_dir)) == int(first[0])
    assert int(first[0]) % 10 == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_when_one_of_two_processes_dies_or_hangs_the_other_ends_and_a_restart_resumes(
    victim, number, finished_experiment, tmp_path, compiled
):
    config = changed(
        finished_experiment,
        task="train",
        arm="baseline",
        workdir=str(tmp_path / "runs"),
        **{"train.steps": 100_000, "mesh.data": 2},
        **{"checkpoint.every": 10, "evaluate.every": 100_000},
    )
    run_dir = tmp_path / "runs" / "gpt_baseline"

    def newest():
        return max(checkpoint.steps(run_dir), default=0)

    def strike(processes):
        if not struck and newest():
            struck.append(time.monotonic())
            processes[victim].send_signal(number)
        if processes[1 - victim].poll() is not None:
            struck.append(time.monotonic())
            processes[victim].kill()

    struck = []
    codes, said = run_in_processes(config, tmp_path, compiled, meanwhile=strike)
    assert struck[-1] - struck[0] < AFTER
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1)
    *_, line = said[1 - victim].splitlines()
    assert line.startswith("pcagpt: another process of this run ended or cannot be re")
    assert "Traceback" not in said[1 - victim]

    def stop_when_further(processes):
        if not stopped and newest() > saved:
            stopped.append(processes[0].send_signal(signal.SIGTERM))

    saved, stopped = newest(), []
    codes, said = run_in_processes(
        config, tmp_path, compiled, meanwhile=stop_when_further
    )
    assert codes == [1, 1], "\n".join(said)
    assert f"resumes at step {saved}" in said[0]


@pytest.mark.slow
def test_two_processes_compress_and_train_further_like_one(
    finished_experiment, tmp_path, compiled
):
    def asked(name):
        source = Path(finished_experiment.workdir) / "gpt_baseline"
        run = shutil.copytree(source, tmp_path / name / "gpt_baseline")
        return changed(
            finished_experiment,
            task="compress",
            workdir=str(tmp_path / name),
            model_path=str(run),
            **{"compress.methods": "context", "compress.bands": (3,)},
            **{"compress.bits": (8,), "compress.calibration_tokens": 512},
            **{"compress.recover_ranks": (8,), "checkpoint.keep_last": 1},
        )

    def sweep(name):
        return json.loads((tmp_path / name / "compressed/sweep.json").read_text())

    codes, said = run_in_processes(
        changed(asked("two"), **{"mesh.data": 2}), tmp_path, compiled
    )
    assert codes == [0, 0], "\n".join(said)
    main.run(Settings.of(asked("one")), "a command", print_only=False)
    for part, names in {
        "rows": ("loss", "added_loss", "kl"),
        "recovered": ("val_loss", "added_at_start"),
    }.items():
        for two, one in zip(sweep("two")[part], sweep("one")[part], strict=True):
            for name in names:
                assert two[name] == pytest.approx(one[name], abs=1e-4)
