"""Commands that are started together on one workdir, as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    assert_equal,
    changed,
    execute,
    job,
    metrics,
    overrides,
    quick_environment,
    saved_state,
    without_timings,
)

from pcagpt.run import checkpoint
from pcagpt.run.folder import read_record, read_result

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

REPOSITORY = Path(__file__).parent.parent
SECONDS = 300  # a limit for a busy machine


@pytest.fixture
def started(compiled, tmp_path):
    """A function: starts `python -m pcagpt.main`; its output goes into `.log`."""
    processes = []

    def start(config, config_file="baseline.py"):
        log = tmp_path / f"{len(processes)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pcagpt.main"]
                + [f"--config=configs/{config_file}", *overrides(config)],
                cwd=REPOSITORY,
                env=quick_environment(compiled),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_until(holds, process):
    give_up = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < give_up, process.log.read_text()
        time.sleep(0.01)


def no_lock_is_left(workdir):
    return not [name for name in os.listdir(workdir) if ".lock." in name]


def test_arms_started_together_make_what_they_share_once(tiny_config, started):
    ranked = {"model.n_embd_wte": 8}
    a = changed(tiny_config, arm="pca", **ranked)
    b = changed(tiny_config, arm="pca_finetune", **ranked)
    processes = [started(a), started(b), started(a)]
    for process in processes:
        process.wait(SECONDS)
    said = [process.log.read_text() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, "\n".join(said)
    lines = [line for text in said for line in text.splitlines()]
    for name, done in (
        ("gpt_baseline", "6/6 100%"),
        ("gpt_pca_k8", "6/6 100%"),
        ("gpt_pca_finetune_k8", "3/3 100%"),
        ("factorizing", "rank 8"),
    ):
        found = [line for line in lines if name in line and done in line]
        assert len(found) == 1, "\n".join(lines)
    assert any("waiting for" in line and "gpt_baseline" in line for line in lines)
    workdir = Path(tiny_config.workdir)
    assert no_lock_is_left(workdir)
    wanted = changed(tiny_config, workdir=str(workdir.parent / "straight"))
    for config in (a, b):
        straight = execute(changed(config, workdir=wanted.workdir))
        found = job(config).folder
        assert_equal(saved_state(found), saved_state(straight))
        assert metrics(found) == metrics(straight)
        assert read_result(found)["run_id"] == read_record(found)["run_id"]


def test_who_waits_for_a_killed_command_goes_on_from_what_it_saved(
    tiny_config, started, tmp_path
):
    config = changed(
        tiny_config,
        **{"train.steps": 100, "checkpoint.every": 10, "evaluate.every": 50},
    )
    run_dir, holder = job(config).folder, started(config)
    wait_until(lambda: max(checkpoint.steps(run_dir), default=0) >= 10, holder)
    holder.send_signal(signal.SIGSTOP)  # It holds the folder and comes no further.
    stopped_at = max(checkpoint.steps(run_dir))
    assert stopped_at < 100
    record = json.loads((run_dir / "config.json").read_text())

    other = started(changed(config, **{"train.learning_rate": 0.1}))
    assert other.wait(SECONDS) == 2
    assert "was trained with another config: train.learn" in other.log.read_text()

    waiting = [started(config), started(config)]
    for process in waiting:
        wait_until(lambda p=process: "waiting for" in p.log.read_text(), process)
    waiting[0].send_signal(signal.SIGINT)
    assert waiting[0].wait(SECONDS) == 1
    assert "interrupted" in waiting[0].log.read_text().splitlines()[-1]
    assert json.loads((run_dir / "config.json").read_text()) == record

    holder.kill()
    assert waiting[1].wait(SECONDS) == 0, waiting[1].log.read_text()
    assert no_lock_is_left(run_dir.parent)
    assert read_record(run_dir)["run_id"] == record["run_id"]
    straight = execute(changed(config, workdir=str(tmp_path / "straight")))
    assert_equal(saved_state(run_dir), saved_state(straight))
    assert metrics(run_dir) == metrics(straight)
    found, wanted = (without_timings(read_result(d)) for d in (run_dir, straight))
    assert found == wanted
