"""Token arrays -> batches: training order by grain, evaluation in the split's order.

Shapes: B batch, T block size, n tokens of the split.
"""

import operator
from collections.abc import Iterator

import grain
import numpy as np

from pcagpt.errors import UserError

IGNORED = -1  # the target where there is nothing to predict


class _Windows:
    """Windows of T + 1 tokens that start every T tokens, for grain to pick from."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self._tokens = tokens
        self._block_size = block_size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._block_size

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._block_size
        return self._tokens[start : start + self._block_size + 1].astype(np.int32)


class TrainingBatches:
    """Training batches in an order that (seed, step) alone decides.

    `tokens` is an integer array [n], also a memmap. Windows start every T tokens and
    hold T + 1, so that each of their (n - 1) // T * T transitions is trained on once
    per epoch. Each epoch is another permutation of the windows; a batch may take the
    end of one epoch and the start of the next, or more when B exceeds the epoch.
    Raises UserError when the tokens do not fill one window.
    """

    def __init__(
        self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int
    ) -> None:
        if len(tokens) <= block_size:
            raise UserError(
                f"model.block_size={block_size} needs {block_size + 1} tokens, but the "
                f"train split has {len(tokens)}: lower --config.model.block_size, or "
                "give more text as --config.data.source"
            )
        windows = _Windows(tokens, block_size)
        self.windows_per_epoch = len(windows)
        self._batches = (
            grain.MapDataset.source(windows)
            .seed(seed)
            .shuffle()
            .repeat()
            .batch(batch_size)
        )

    def batch_at(self, step: int) -> np.ndarray:
        """Return the batch of a step: int32 [B, T+1], inputs and targets overlapping.

        Costs the same at any step: no earlier batch is made.
        """
        # grain would take a slice too, or wrap a negative step around.
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self._batches[step]


class EvaluationBatches:
    """A split cut into windows that do not overlap, in order: (inputs, targets).

    Both are int32 [B, T]. Every token after the split's first is a target exactly
    once. Targets are -1 (inputs 0) where there is nothing to predict: in the tail of
    the last window, and in the rows that fill up the last batch. Raises UserError
    for fewer than two tokens.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int) -> None:
        if len(tokens) < 2:
            raise UserError(
                f"the split has {len(tokens)} tokens: at least 2 are needed to predict "
                "one from the other"
            )
        self._tokens = tokens
        self._block_size = block_size
        self._batch_size = batch_size
        self.window_count = -(-(len(tokens) - 1) // block_size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.window_count // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the batches; iterating again starts from the first."""
        for first in range(0, self.window_count, self._batch_size):
            shape = self._batch_size, self._block_size
            inputs = np.zeros(shape, np.int32)
            targets = np.full(shape, IGNORED, np.int32)
            for row in range(min(self._batch_size, self.window_count - first)):
                start = (first + row) * self._block_size
                window = self._tokens[start : start + self._block_size + 1]
                inputs[row, : len(window) - 1] = window[:-1]
                targets[row, : len(window) - 1] = window[1:]
            yield inputs, targets
