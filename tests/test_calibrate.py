"""Statistics of a model on text: what they are, their file, who measures them."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import changed

from pcagpt import array_files
from pcagpt.compression.original import Original
from pcagpt.config import Settings
from pcagpt.data.batches import TrainingBatches
from pcagpt.errors import UserError
from pcagpt.factorization import Statistics
from pcagpt.run import calibrate
from pcagpt.run.trained import Run
from pcagpt.sharding import processes

pytestmark = pytest.mark.usefixtures("quick")
VOCAB_SIZE = 97


@pytest.fixture
def original(finished_experiment, tmp_path):
    finished = Path(finished_experiment.workdir) / "gpt_baseline"
    run = shutil.copytree(finished, tmp_path / "gpt_baseline")
    asked = {"data.source": "", "compress.calibration_tokens": 512}
    asked |= {"task": "compress", "model_path": str(run)}
    settings = Settings.of(changed(finished_experiment, **asked))
    return Original.of(Run.open(run), settings)


def test_statistics_are_what_a_naive_pass_over_the_text_finds(original):
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16) % VOCAB_SIZE
    frequency = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
    found = calibrate.collect(
        original.model.gpt,
        original.model.variables,
        frequency,
        [tokens],
        original.model.mesh,
        2,
    )
    variables, table = {"params": original.run.weights["params"]}, original.table_VD

    @jax.jit
    def hidden(x):
        return original.model.gpt.apply(variables, x, 16, method="contextualize")

    x = table[tokens.reshape(-1)]
    h = np.asarray(hidden(x), np.float64)
    logits = h @ table.T
    p = np.asarray(jax.nn.softmax(logits))
    for name, wanted in {
        "frequency": frequency,
        "probability": p.mean(axis=0),
        "hidden_mean": h.mean(axis=0),
        "hidden_moment": h.T @ h / 64,
        "context_moment": h.T @ (p @ table) / 64,
    }.items():
        np.testing.assert_allclose(
            getattr(found, name), wanted, rtol=1e-4, atol=1e-5, err_msg=name
        )
    keys = jax.random.split(jax.random.key(0), 64)
    draw = jax.jit(jax.vmap(jax.random.categorical))
    drawn = draw(keys, jax.numpy.asarray(logits, "float32"))

    def loss(x):
        log_p = jax.nn.log_softmax(hidden(x) @ table.T)
        return -log_p[np.arange(64), drawn].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(x), np.float64)
    np.testing.assert_allclose(
        found.gradient_moment, gradient.T @ gradient / 64, rtol=1e-3, atol=1e-5
    )


def test_the_first_process_decides_whether_statistics_are_known(original, monkeypatch):
    """Another process may see a file that has just appeared, and would not measure."""
    deciding, known = [], calibrate._known

    def from_first(decide):
        deciding.append(True)
        found = decide()
        deciding.clear()
        return found

    def decided(*arguments):
        assert deciding
        return known(*arguments)

    monkeypatch.setattr(calibrate, "_known", decided)
    monkeypatch.setattr(processes, "from_first", from_first)
    measured = original.statistics
    monkeypatch.setattr(calibrate, "collect", pytest.fail)
    found = dataclasses.replace(original).statistics
    for array, wanted in zip(found, measured, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_damaged_statistics_are_named_before_they_are_measured_again(original, said):
    measured = original.statistics
    (path,) = original.run.folder.glob("statistics_*.npz")
    path.write_bytes(path.read_bytes()[:100])
    found = dataclasses.replace(original).statistics
    for array, wanted in zip(found, measured, strict=True):
        np.testing.assert_array_equal(array, wanted)
    (line,) = [line for line in said() if str(path) in line]
    assert line.endswith("the statistics in it are not used")
    calibrate.read(path)


@pytest.mark.parametrize(
    ("part", "sizes"), [(0, [4, 4, 4]), (1, [1] * 9), (3, [3, 1, 3, 1, 1])]
)
def test_a_model_that_takes_parts_of_batches_reads_no_more_text_than_asked(
    part, sizes, original, tmp_path
):
    found, read = original.statistics, []

    def measure(_, parts):
        read.extend(parts)
        return found

    how = {"window": 16, "tokens": 9 * 16 - 3, "batch_size": 4, "part": part}
    calibrate.statistics(
        *(original.run, original.corpus, measure, tmp_path / "kept"),
        compute_dtype="float32",
        tables=lambda: [original.table_VD],
        **how,
    )
    assert [len(part_BT) for part_BT in read] == sizes
    batches = TrainingBatches(original.corpus.tokens("train"), 16, 4, calibrate.SEED)
    whole = np.concatenate([batches.batch_at(step)[:, :-1] for step in range(3)])
    np.testing.assert_array_equal(np.concatenate(read), whole[: sum(sizes)])
    (path,) = (tmp_path / "kept").iterdir()
    _, protocol = calibrate._read(path)
    assert protocol["tokens"] == 16 * sum(sizes)


@pytest.mark.parametrize("part", [0, 3])
def test_a_short_text_is_read_once(part, original, tmp_path):
    found, read = original.statistics, []

    def measure(_, parts):
        read.extend(np.concatenate(list(parts)))
        return found

    train = original.corpus.tokens("train")
    calibrate.statistics(
        *(original.run, original.corpus, measure, tmp_path),
        compute_dtype="float32",
        tables=lambda: [original.table_VD],
        **{"window": 16, "tokens": 9 * len(train), "batch_size": 4, "part": part},
    )
    windows = (len(train) - 1) // 16
    starts = {tuple(window) for window in read[:windows]}
    assert starts == {tuple(train[16 * at : 16 * at + 16]) for at in range(windows)}
    assert len(read) == (windows if part else -(-windows // 4) * 4)


def test_statistics_are_read_back_and_damaged_ones_refused(tmp_path):
    shapes = [(3,), (3,), (2,), (2, 2), (2, 2), (2, 2)]
    shares = [np.array([0.2, 0.3, 0.5]), np.array([0.5, 0, 0.5])]
    moments = [np.full(shape, i, float) for i, shape in enumerate(shapes)][2:]
    statistics = Statistics(*shares, *moments)
    path = tmp_path / "statistics.npz"
    calibrate.write(path, statistics, {"tokens": 5})
    found = calibrate.read(path)
    for array, wanted in zip(found, statistics, strict=True):
        np.testing.assert_array_equal(array, wanted)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="is not a readable array file"):
        calibrate.read(path)
    for name, bad, says in (
        ("hidden_mean", np.array([np.nan, 1]), "cannot be statistics"),
        ("probability", np.array([-1.0, 1, 1]), "cannot be statistics"),
        ("probability", np.array([5.0, 1, 2]), "its sum is 8, it must be 1"),
        ("frequency", np.zeros(3), "'frequency' must hold a share for each token"),
        ("hidden_moment", 1e300 * np.eye(2), "cannot be statistics"),
        ("gradient_moment", -np.eye(2), "cannot be statistics"),
        ("hidden_moment", np.ones((2, 3)), r"must be float64 \(2, 2\)"),
        ("hidden_mean", np.array([3.0, 1]), "changed or damaged"),
    ):
        path.write_bytes(whole)
        array_files.write_npz(path, **array_files.read_npz(path) | {name: bad})
        with pytest.raises(UserError, match=says):
            calibrate.read(path)
