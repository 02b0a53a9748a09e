"""Order of training batches, and what evaluation predicts."""

import os

import numpy as np
import pytest

from pcagpt.data.batches import EvaluationBatches, TrainingBatches
from pcagpt.data.content import content_of
from pcagpt.data.token_array import TokenArray
from pcagpt.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)  # the value is the position
BLOCK_RANK = 10
WINDOWS = 100


def starts(batches, steps):
    """Positions at which the windows of some batches start, in order."""
    return np.concatenate([batches.batch_at(step)[:, 0] for step in steps])


# Training


def test_batch_holds_whole_windows_of_consecutive_tokens():
    batch = TrainingBatches(TOKENS, BLOCK_RANK, 4, seed=0).batch_at(3)
    assert (batch.shape, batch.dtype) == ((4, BLOCK_RANK + 1), np.int32)
    assert (batch[:, 0] % BLOCK_RANK == 0).all()
    assert (np.diff(batch, axis=1) == 1).all()


def test_every_epoch_holds_every_window_once_in_another_order():
    batches = TrainingBatches(TOKENS, BLOCK_RANK, 7, seed=1)  # batches straddle epochs
    assert batches.windows_per_epoch == WINDOWS
    orders = starts(batches, range(100)).reshape(7, WINDOWS)
    every_start = np.arange(WINDOWS) * BLOCK_RANK
    np.testing.assert_array_equal(np.sort(orders), np.tile(every_start, (7, 1)))
    assert len({tuple(order) for order in [*orders, every_start]}) == 8


def test_order_depends_on_the_seed_and_is_that_of_earlier_runs():
    first, second = (
        starts(TrainingBatches(TOKENS, BLOCK_RANK, 4, seed), range(2))
        for seed in (0, 1)
    )
    assert first.tolist() == [960, 770, 310, 790, 90, 700, 280, 830]
    assert first.tolist() != second.tolist()


def test_batch_of_a_step_is_the_same_in_a_fresh_run_in_any_order():
    first = TrainingBatches(TOKENS, BLOCK_RANK, 4, seed=5)
    in_order = [first.batch_at(step) for step in range(60)]
    second = TrainingBatches(TOKENS, BLOCK_RANK, 4, seed=5)
    for step in (59, 0, 31, 30, 59):
        np.testing.assert_array_equal(second.batch_at(step), in_order[step])


def test_any_later_step_can_be_reached_at_once_but_no_negative_step():
    batches = TrainingBatches(TOKENS, BLOCK_RANK, 4, seed=5)
    assert batches.batch_at(np.int64(10**9)).shape == (4, BLOCK_RANK + 1)
    with pytest.raises(ValueError, match="step"):
        batches.batch_at(-1)


def test_batch_larger_than_the_split_takes_windows_of_later_epochs():
    batches = TrainingBatches(TOKENS[:35], BLOCK_RANK, 8, seed=0)
    assert batches.windows_per_epoch == 3
    order = batches.batch_at(0)[:, 0]
    assert set(order[:3].tolist()) == set(order[3:6].tolist()) == {0, 10, 20}


def test_one_window_is_enough_and_large_ids_stay_positive():
    tokens = np.full(BLOCK_RANK + 1, 65535, np.uint16)
    assert (TrainingBatches(tokens, BLOCK_RANK, 1, seed=0).batch_at(0) == 65535).all()


@pytest.mark.parametrize("length", [0, 1, BLOCK_RANK])
def test_block_longer_than_the_data_is_refused(length):
    with pytest.raises(UserError, match=f"model.block_size=10 .*split has {length}:"):
        TrainingBatches(TOKENS[:length], BLOCK_RANK, 4, seed=0)


# Evaluation


@pytest.mark.parametrize("length", [2, 10, 11, 12, 95, 333])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_after_the_first_is_predicted_once_in_order(length, batch_size):
    batches = EvaluationBatches(TOKENS[:length], BLOCK_RANK, batch_size)
    assert batches.window_count == -(-(length - 1) // BLOCK_RANK)
    for _ in range(2):  # iterating again starts from the first batch
        inputs, targets = map(np.concatenate, zip(*batches, strict=True))
        assert inputs.shape == targets.shape == (len(batches) * batch_size, BLOCK_RANK)
        assert inputs.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(targets[targets >= 0], np.arange(1, length))
        np.testing.assert_array_equal(inputs[targets >= 0], np.arange(length - 1))
        assert (targets[targets < 0] == -1).all() and (inputs[targets < 0] == 0).all()
        # Row i is window i.
        rows = inputs[: batches.window_count, 0]
        assert rows.tolist() == list(range(0, length - 1, BLOCK_RANK))


def test_no_token_after_the_last_wanted_one_is_predicted():
    batches = EvaluationBatches(TOKENS[:333], BLOCK_RANK, 2, max_tokens=13)
    targets = np.concatenate([targets for _, targets in batches])
    np.testing.assert_array_equal(targets[targets >= 0], np.arange(1, 14))


# Token files while they are read.


def test_a_token_array_gives_the_ids_of_its_file(tmp_path):
    ids = np.arange(3000, dtype="<u2")
    ids.tofile(tmp_path / "train.bin")
    found = TokenArray(tmp_path / "train.bin", ids.dtype)
    assert len(found) == 3000
    for part in (slice(None), slice(5, 9), slice(-4, None), slice(2990, 4000)):
        np.testing.assert_array_equal(found[part], ids[part])
    np.testing.assert_array_equal(np.asarray(found, np.int32), ids)
    (tmp_path / "train.bin").unlink()
    np.testing.assert_array_equal(found[:3], ids[:3])  # It stays open.


@pytest.mark.parametrize("highest", [70_000, 60_000])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_hash_of_an_open_file_is_that_of_its_content(tmp_path, dtype, highest):
    path = tmp_path / "train.bin"
    np.array([5, min(highest, np.iinfo(dtype).max), 0] * 99, dtype).tofile(path)
    content = content_of(path, tmp_path)
    is_narrow = dtype == "<u4" and highest < 1 << 16
    wanted = content.narrow_sha256 if is_narrow else content.sha256
    assert TokenArray(path, np.dtype(dtype)).sha256() == wanted


def test_a_token_file_that_became_shorter_ends_in_one_line(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(100_000, dtype="<u2").tofile(path)
    batches = TrainingBatches(TokenArray(path, np.dtype("<u2")), 64, 4, seed=1)
    os.truncate(path, 20)
    with pytest.raises(UserError, match=r"train.bin became shorter while"):
        batches.batch_at(0)
