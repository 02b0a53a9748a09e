"""Two processes, joined by jax.distributed, train what one process would."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import changed, metrics, quick_environment

from pcagpt import config as knobs
from pcagpt import main
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder

pytestmark = pytest.mark.usefixtures("quick")

REPOSITORY = Path(__file__).parent.parent
SECONDS = 120


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def run_in_two_processes(config, log_dir, cache, meanwhile=lambda processes: None):
    """`python -m pcagpt.main` twice, with a device each; returns what they said.

    `meanwhile` is called with the processes, again and again, while they run.
    """
    default = knobs.flat(knobs.base())
    overrides = [
        knobs.override(path, value)
        for path, value in knobs.flat(config).items()
        if value != default[path]
    ]
    environment = quick_environment(cache)
    # Of two such flags the last counts.
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    address, processes, logs = free_address(), [], []
    try:
        for number in range(2):
            logs.append((log_dir / f"{number}.log").open("w+"))
            distributed = {
                "distributed.enabled": True,
                "distributed.coordinator_address": address,
                "distributed.num_processes": 2,
                "distributed.process_id": number,
            }
            joined = [knobs.override(*setting) for setting in distributed.items()]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pcagpt.main"]
                    + ["--config=configs/baseline.py", *overrides, *joined],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=logs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        give_up = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes):
            # One that failed leaves the other waiting for ever.
            if time.monotonic() > give_up or any(p.poll() for p in processes):
                break
            meanwhile(processes)
            time.sleep(0.1)
        for process in processes:  # The second ends soon after the first.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = []
    for log in logs:
        log.seek(0)
        said.append(log.read())
        log.close()
    return [process.returncode for process in processes], said


def test_two_processes_train_a_and_what_it_needs_as_one_does(
    finished_experiment, tmp_path, compiled
):
    config = changed(
        finished_experiment,
        task="train",
        arm="pca",
        workdir=str(tmp_path / "runs"),
        **{"model.n_embd_wte": 8, "mesh.data": 1, "mesh.fsdp": 2},
        **{"checkpoint.every": 6, "checkpoint.keep_last": 1},
    )
    codes, said = run_in_two_processes(config, tmp_path, compiled)
    assert codes == [0, 0], "\n".join(said)
    for run in ("gpt_baseline", "gpt_pca_k8"):
        one = Path(finished_experiment.workdir) / run
        two = Path(config.workdir) / run
        found, wanted = run_folder.read_result(two), run_folder.read_result(one)
        assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)
        assert found["device"].startswith("2 x")
        for line, other in zip(metrics(two), metrics(one), strict=True):
            assert (line["step"], line["split"]) == (other["step"], other["split"])
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert "A gpt_pca_k8" in said[0]
    assert "to do" not in said[1]  # the plan is told once


def test_when_one_of_two_processes_is_asked_to_stop_both_stop_at_the_same_step(
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
        if not asked and (run_dir / "metrics.jsonl").exists():
            asked.append(processes[1].pid)
            processes[1].send_signal(signal.SIGTERM)

    codes, said = run_in_two_processes(config, tmp_path, compiled, ask_the_second)
    assert asked
    assert codes == [1, 1], "\n".join(said)
    first, second = (re.findall(r"stopped at step (\d+) of 100000", s) for s in said)
    assert first == second
    assert max(checkpoint.steps(run_dir)) == int(first[0])
    assert int(first[0]) % 10 == 0


def test_two_processes_compress_and_train_on_as_one_does(
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

    codes, said = run_in_two_processes(
        changed(asked("two"), **{"mesh.data": 2}), tmp_path, compiled
    )
    assert codes == [0, 0], "\n".join(said)
    main.run(asked("one"), "a command", print_only=False)
    for part, names in {
        "rows": ("loss", "added_loss", "kl"),
        "recovered": ("val_loss", "added_at_start"),
    }.items():
        for two, one in zip(sweep("two")[part], sweep("one")[part], strict=True):
            for name in names:
                assert two[name] == pytest.approx(one[name], abs=1e-4)
