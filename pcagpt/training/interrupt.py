"""Stopping between two steps when the person or the cluster asks."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

AGREE_EVERY = 10  # steps between two times that several processes compare notes


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying; a second SIGINT is obeyed at once.

    A context manager; outside the main thread it notes nothing.
    """

    def __init__(self):
        self.received = False
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # Only the main thread may set handlers.
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def holds(self, step: int) -> bool:
        """Whether to stop before this step; the same answer on every process."""
        if jax.process_count() == 1:
            return self.received
        if step % AGREE_EVERY:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.received)).any())

    def _note(self, number, _) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
