"""Order of training batches, and what evaluation predicts."""

import numpy as np
import pytest

from pcagpt.data.batches import EvaluationBatches, TrainingBatches
from pcagpt.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)  # the value is the position
BLOCK = 10
WINDOWS = 100


def starts(batches, steps):
    """Return the positions at which the windows of some batches start, in order."""
    return np.concatenate([batches.batch_at(step)[:, 0] for step in steps])


def predicted(batches):
    """Return the targets that count, in order, after checking them against inputs."""
    found = []
    for inputs, targets in batches:
        counts = targets >= 0
        np.testing.assert_array_equal(targets[counts], inputs[counts] + 1)
        assert (targets[~counts] == -1).all()
        found.append(targets[counts])
    return np.concatenate(found)


# Training


def test_batch_holds_whole_windows_of_consecutive_tokens():
    batch = TrainingBatches(TOKENS, BLOCK, 4, seed=0).batch_at(3)
    assert (batch.shape, batch.dtype) == ((4, BLOCK + 1), np.int32)
    assert (batch[:, 0] % BLOCK == 0).all()
    assert (np.diff(batch, axis=1) == 1).all()


def test_epoch_holds_every_window_once():
    batches = TrainingBatches(TOKENS, BLOCK, 4, seed=0)
    assert batches.windows_per_epoch == WINDOWS
    every_start = np.arange(WINDOWS) * BLOCK
    for epoch in range(3):
        order = starts(batches, range(25 * epoch, 25 * (epoch + 1)))
        np.testing.assert_array_equal(np.sort(order), every_start)


def test_epochs_differ_in_order():
    batches = TrainingBatches(TOKENS, BLOCK, 4, seed=0)
    orders = [starts(batches, range(25 * e, 25 * (e + 1))) for e in range(3)]
    assert not np.array_equal(orders[0], np.sort(orders[0]))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_epoch_coverage_holds_when_batches_straddle_epochs():
    batches = TrainingBatches(TOKENS, BLOCK, 7, seed=1)
    order = starts(batches, range(100))
    for epoch in range(7):
        window = order[epoch * WINDOWS : (epoch + 1) * WINDOWS]
        assert len(set(window.tolist())) == WINDOWS


def test_batch_of_a_step_is_the_same_in_a_fresh_run_in_any_order():
    first = TrainingBatches(TOKENS, BLOCK, 4, seed=5)
    in_order = [first.batch_at(step) for step in range(60)]
    second = TrainingBatches(TOKENS, BLOCK, 4, seed=5)
    for step in (59, 0, 31, 30, 59):
        np.testing.assert_array_equal(second.batch_at(step), in_order[step])


def test_steps_far_away_can_be_reached_at_once():
    batches = TrainingBatches(TOKENS, BLOCK, 4, seed=5)
    far = batches.batch_at(np.int64(10**9))
    assert far.shape == (4, BLOCK + 1)


def test_order_depends_on_the_seed():
    orders = [
        starts(TrainingBatches(TOKENS, BLOCK, 4, seed), range(25)) for seed in (0, 1)
    ]
    assert not np.array_equal(*orders)


def test_order_is_the_one_that_earlier_runs_had():
    order = starts(TrainingBatches(TOKENS, BLOCK, 4, seed=0), range(2))
    assert order.tolist() == [960, 770, 310, 790, 90, 700, 280, 830]


def test_batch_larger_than_the_split_takes_windows_of_later_epochs():
    batches = TrainingBatches(TOKENS[:35], BLOCK, 8, seed=0)
    assert batches.windows_per_epoch == 3
    order = batches.batch_at(0)[:, 0]
    assert set(order[:3].tolist()) == set(order[3:6].tolist()) == {0, 10, 20}


def test_tokens_beyond_int16_stay_positive():
    tokens = np.full(11, 65535, np.uint16)
    assert (TrainingBatches(tokens, BLOCK, 1, seed=0).batch_at(0) == 65535).all()


def test_tokens_that_fill_one_window_exactly_are_enough():
    batches = TrainingBatches(TOKENS[: BLOCK + 1], BLOCK, 1, seed=0)
    assert batches.windows_per_epoch == 1


@pytest.mark.parametrize("length", [0, 1, BLOCK])
def test_block_longer_than_the_data_is_refused(length):
    with pytest.raises(UserError, match=f"model.block_size=10 .*split has {length}:"):
        TrainingBatches(TOKENS[:length], BLOCK, 4, seed=0)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step"):
        TrainingBatches(TOKENS, BLOCK, 4, seed=0).batch_at(-1)


# Evaluation


@pytest.mark.parametrize("length", [2, 9, 10, 11, 12, 100, 101, 333])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_after_the_first_is_predicted_once_in_order(length, batch_size):
    batches = EvaluationBatches(TOKENS[:length], BLOCK, batch_size)
    np.testing.assert_array_equal(predicted(batches), np.arange(1, length))
    assert len(list(batches)) == len(batches)
    assert batches.window_count == -(-(length - 1) // BLOCK)


def test_evaluation_batches_have_one_shape():
    for inputs, targets in EvaluationBatches(TOKENS[:333], BLOCK, 4):
        assert inputs.shape == targets.shape == (4, BLOCK)
        assert inputs.dtype == targets.dtype == np.int32
        assert (inputs >= 0).all()


def test_rows_follow_the_windows_of_the_split():
    batches = EvaluationBatches(TOKENS[:95], BLOCK, 4)
    rows = np.concatenate([inputs for inputs, _ in batches])
    assert rows[: batches.window_count, 0].tolist() == list(range(0, 94, 10))


def test_evaluation_can_be_iterated_again():
    batches = EvaluationBatches(TOKENS, BLOCK, 4)
    np.testing.assert_array_equal(predicted(batches), predicted(batches))


@pytest.mark.parametrize("length", [0, 1])
def test_split_without_anything_to_predict_is_refused(length):
    with pytest.raises(UserError, match=f"split has {length} tokens: at least 2"):
        EvaluationBatches(TOKENS[:length], BLOCK, 4)
