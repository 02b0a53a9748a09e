"""What each released version left behind is read and resumed by this one.

fixtures/run_0_1.tar.xz was made by version 0.1. Each release adds its own:

    python tests/test_older_versions.py /tmp/run_0_2
    tar -C /tmp -cJf tests/fixtures/run_0_2.tar.xz run_0_2
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIGS, call, tiny
from runs import metrics, saved_state

import pcagpt
from pcagpt.factorization import factor_files
from pcagpt.report.read import read_row
from pcagpt.run import folder
from pcagpt.run.checkpoint import steps

pytestmark = pytest.mark.usefixtures("quick")

LEFT = sorted((Path(__file__).parent / "fixtures").glob("run_*.tar.xz"))
SETTINGS = {
    "model": {"n_embd": 4, "block_size": 8, "vocab_multiple": 1},
    "train": {"steps": 4},
    "evaluate": {"batch_size": 64, "every": 2},
    "checkpoint": {"every": 2},
    "telemetry": {"tensorboard": False, "every": 1},
}


COMMANDS = {
    "gpt_baseline": ["baseline.py"],
    "gpt_pca_k2": ["pca_k128.py", "--config.model.n_embd_wte=2"],
}


def command(run, place):
    """The arguments that make a run, beside a corpus, and what it needs."""
    config, *own = COMMANDS[run]
    workdir = place / "checkpoints"
    return [*tiny(config, place / "corpus", workdir=workdir, **SETTINGS), *own]


def make(place):
    """Writes a corpus, D, its factorization and A."""
    (place / "corpus").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, length in (("train", 1200), ("val", 300)):
        ids = random.integers(0, 13, length, np.uint16)
        ids.tofile(place / "corpus" / f"{split}.bin")
    (place / "corpus" / "meta.json").write_text(json.dumps({"vocab_size": 13}))
    outcome = call(*command("gpt_pca_k2", place))
    assert outcome.code == 0, outcome


@pytest.fixture(params=LEFT, ids=lambda path: path.name)
def left(request, tmp_path):
    """The folder that a version left."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param.name.partition(".")[0]


def lines(run_dir):
    """Step, split and loss of each line of the run's metrics."""
    return [(m["step"], m["split"], m["loss"]) for m in metrics(run_dir)]


def test_there_is_a_run_of_each_released_version():
    assert [path.name for path in LEFT] == ["run_0_1.tar.xz"]


@pytest.mark.parametrize("run", COMMANDS)
def test_a_run_is_evaluated_to_its_stored_loss(run, left):
    run_dir = left / "checkpoints" / run
    source = f"--config.data.source={left / 'corpus'}"
    asked = f"--config.model_path={run_dir}"
    outcome = call(f"--config={CONFIGS / 'evaluate.py'}", source, asked)
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    stored = folder.read_result(run_dir)
    assert result["loss"] == pytest.approx(stored["val_loss"], rel=1e-6)
    assert result["is_own_corpus"]
    assert folder.read_window_losses(run_dir).sum(0)[0] > 0


def test_its_command_finds_all_of_it_done_and_its_factors_are_read(left):
    before = {p: p.stat().st_mtime_ns for p in left.rglob("*") if p.is_file()}
    outcome = call(*command("gpt_pca_k2", left))
    assert outcome.code == 0, outcome
    assert "done" in outcome.out
    assert "to do" not in outcome.out
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    factors = left / "checkpoints" / factor_files.FOLDER
    table = factor_files.read_table(factor_files.table_path(factors, 2))
    scales = factor_files.read_scale_matrices(factor_files.scale_path(factors, 2))
    assert (table.shape, scales.scale_up.shape) == ((13, 2), (2, 4))
    assert factor_files.read_spectrum(factors).shape == (4,)


@pytest.mark.parametrize("run", COMMANDS)
def test_a_run_resumes_from_an_earlier_checkpoint_to_the_same_end(run, left):
    run_dir = left / "checkpoints" / run
    wanted, seen = saved_state(run_dir), lines(run_dir)
    assert steps(run_dir) == [2, 4]
    shutil.rmtree(run_dir / "ckpt" / "4")
    (run_dir / "result.json").unlink()
    outcome = call(*command(run, left))
    assert outcome.code == 0, outcome
    assert "resumes at step 2" in outcome.out
    # Its checkpoint knows no losses; only the log has the first ones.
    assert folder.read_result(run_dir)["curve"] is None
    result = folder.read_result(run_dir)
    assert result["versions"]["pcagpt"] == f"unknown, {pcagpt.__version__}"
    assert result["versions"]["grain"].startswith("unknown, ")
    assert result["resolved"]["kernels"].startswith("unknown, ")
    losses = [loss for _, split, loss in seen if split == "val"]
    curve = np.array(read_row(run_dir)["curve"])
    assert curve[:, 1] == pytest.approx(losses, rel=1e-5)
    found = saved_state(run_dir)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():  # Made by another version of XLA.
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6)
    for now, then in zip(lines(run_dir), seen, strict=True):
        assert now[:2] == then[:2]
        assert now[2] == pytest.approx(then[2], rel=1e-5)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
