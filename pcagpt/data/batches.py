"""Token arrays -> batches. Training batches are shuffled by grain.

Shapes: B batch, T block size, n tokens of the split.
"""

import operator
from collections.abc import Iterator

import grain
import numpy as np

from pcagpt.data.token_array import TokenArray
from pcagpt.errors import UserError

IGNORED = -1  # target of positions without a prediction


class TrainingBatches:
    """Training batches; their order depends only on the seed.

    Windows have T + 1 tokens and start every T tokens, so each epoch predicts
    (n - 1) // T * T tokens once. Each epoch is a new permutation of the windows. A
    batch may hold the end of one epoch and the start of the next.

    Raises:
      UserError: the split is too short for one window.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenArray,
        block_size: int,
        batch_size: int,
        seed: int,
    ):
        if len(tokens) <= block_size:
            raise UserError(
                f"model.block_size={block_size} needs {block_size + 1} tokens, but the "
                f"train split has {len(tokens)}: give more text as "
                "--config.data.source, or a model of lower --config.model.block_size"
            )
        windows = _Windows(tokens, block_size)
        self.windows_per_epoch = len(windows)
        dataset = grain.MapDataset.source(windows).seed(seed).shuffle()
        self._batches = dataset.repeat().batch(batch_size)

    def batch_at(self, step: int) -> np.ndarray:
        """The batch of a step, int32 [B, T + 1]: inputs [:, :-1], targets [:, 1:].

        The cost does not depend on the step, because it makes no earlier batch.
        """
        # grain would also accept a slice, and count a negative step from the end.
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self._batches[step].astype(np.int32)


class _Windows:
    """The windows of T + 1 tokens of an epoch; grain asks for one at a time."""

    def __init__(self, tokens: np.ndarray | TokenArray, block_size: int):
        self._tokens, self._block_size = tokens, block_size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._block_size

    def __getitem__(self, number: int) -> np.ndarray:
        start = number * self._block_size
        return self._tokens[start : start + self._block_size + 1]


class EvaluationBatches:
    """A split in order, as windows that do not overlap.

    Iterating yields (inputs, targets), both int32 [B, T]. Every token of the split
    after the first is a target exactly once. The padding at the end of the last window
    and of the last batch has the target -1 and the input 0. With `max_tokens`, only the
    first `max_tokens` targets are used. There must be at least two tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenArray,
        block_size: int,
        batch_size: int,
        max_tokens: int = 0,
    ):
        self.is_cut = 0 < max_tokens < len(tokens) - 1
        self._tokens, self._block_size, self._batch_size = (
            tokens,
            block_size,
            batch_size,
        )
        # The first token is not a target.
        self.target_count = max_tokens if self.is_cut else len(tokens) - 1
        self.window_count = -(-self.target_count // block_size)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.window_count // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = self._batch_size * self._block_size
        for start in range(0, len(self) * size, size):
            found = self._tokens[start : min(start + size, self.target_count) + 1]
            padded = np.full(size + 1, IGNORED, np.int32)
            padded[: len(found)] = found
            inputs_BT = padded[:-1].reshape(self._batch_size, -1)
            targets_BT = padded[1:].reshape(self._batch_size, -1)
            yield np.where(targets_BT == IGNORED, 0, inputs_BT), targets_BT
