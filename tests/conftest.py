"""Eight fake CPU devices, and what several tests need: a tiny corpus and config.

The tests of kernels also run on a GPU: JAX_PLATFORMS=cuda pytest tests/test_kernels.py
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests on each core leave none to NumPy's threads, which would wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import fcntl
import json
import logging
import signal
from pathlib import Path

import numpy as np
import pytest
from command_line import call, tiny
from runs import execute, quick_compiles

from pcagpt.config import base

VOCAB_SIZE = 97

# A shell's background job ignores SIGINT. The programs that tests start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A function that makes a folder once for all the processes of a test session.

    shared(name, make) calls make(folder) in the first process that asks. The others
    wait for it and get the same folder, so no test may change anything there.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make) -> Path:
        folder, done = root / f"shared_{name}", root / f"shared_{name}.done"
        with (root / f"shared_{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.write_text("\n".join(files_in(folder)))
            if name in ("finished", "trained"):
                RUNS[folder] = done.read_text().splitlines()
        return folder

    return made


RUNS = {}  # {shared folder of runs: its files}


def files_in(folder):
    """The paths of everything in a folder."""
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def runs_stay(request):
    """Fails a test that leaves other files in a shared folder of runs.

    Statistics that it left there would spare the next test to measure them.
    """
    yield
    for folder, files in RUNS.items():
        if changed := set(files_in(folder)) ^ set(files):
            RUNS[folder] = files_in(folder)  # The next tests are not to blame.
            pytest.fail(f"copy {folder} first: {request.node.name} changes {changed}")


@pytest.fixture(scope="session")
def corpus_folder(shared):
    """A folder of .bin files of 97 token ids, Zipf-like, with some order to learn."""
    return shared("corpus", write_corpus)


def write_corpus(folder):
    """Writes the files of `corpus_folder`."""
    random = np.random.default_rng(0)
    for split, length in (("train", 6001), ("val", 1003), ("test", 901)):
        tokens = np.minimum(random.zipf(1.3, length) - 1, VOCAB_SIZE - 1)
        tokens[1::2] = (tokens[::2][: len(tokens[1::2])] * 3 + 1) % VOCAB_SIZE
        tokens.astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))


@pytest.fixture
def soon():
    """Fails a test that waits for half a minute, as for the writer of a named pipe."""

    def fail(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def said(caplog, monkeypatch):
    """A function that returns all warnings so far."""
    # The command line switches the logger's propagation off.
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    caplog.set_level(logging.WARNING, "pcagpt")
    return lambda: [r.message for r in caplog.records if r.name.startswith("pcagpt")]


@pytest.fixture
def tiny_config(corpus_folder, tmp_path):
    """The base config shrunk to seconds, on one device; a copy for every test."""
    config = base()
    config.workdir = str(tmp_path / "runs")
    config.data.source = str(corpus_folder)
    shrink(config)
    return config


def shrink(config):
    """Lowers sizes, steps and intervals of any config in place; returns it."""
    config.model.n_layer = 1
    config.model.n_head = 2
    config.model.n_embd = 32
    config.model.block_size = 16
    if config.model.n_embd_wte is not None:
        config.model.n_embd_wte = 8
    config.ranks = (8,)
    config.train.steps = 6
    config.train.warmup_steps = 2
    config.train.batch_size = 8
    config.evaluate.batch_size = 64
    config.evaluate.every = 3
    config.checkpoint.every = 3
    config.telemetry.every = 1
    config.telemetry.tensorboard = False
    config.finetune.steps_share = 0.5
    config.mesh.data = 1
    return config


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs that the tests of this process share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def quick(compiled):
    """Compiles with little optimization, and each program once."""
    with quick_compiles(compiled):
        yield


@pytest.fixture(scope="session")
def finished_experiment(corpus_folder, compiled, shared):
    """The config of a tiny experiment that is done: D, A, C and B at rank 8.

    All checkpoints are there: 3 and 6 (B: 3). Copy its workdir to change it.
    """
    config = shrink(base())
    config.task = "experiment"
    config.data.source = str(corpus_folder)
    config.checkpoint.keep_last = 10

    def make(folder):
        config.workdir = str(folder / "runs")
        with quick_compiles(compiled):
            execute(config)

    config.workdir = str(shared("finished", make) / "runs")
    return config


@pytest.fixture(scope="session")
def trained(corpus_folder, compiled, shared):
    """The folder of a finished baseline of width 16, with checkpoints 1 and 2.

    Copy it to change it.
    """

    def make(folder):
        kept = {"every": 1, "keep_last": 3}
        arguments = tiny("baseline.py", corpus_folder, workdir=folder, checkpoint=kept)
        with quick_compiles(compiled):
            outcome = call(*arguments)
        assert outcome.code == 0, outcome

    return shared("trained", make) / "gpt_baseline"
