"""Stops training between two steps after SIGINT or SIGTERM."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

AGREE_EVERY = 10  # steps between two exchanges of requests between processes


class StopRequest:
    """Records SIGINT and SIGTERM, so that training can stop after the current step.

    A context manager. A second SIGINT raises KeyboardInterrupt at once. It has no
    effect outside the main thread.
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

    def stops_at(self, step: int) -> bool:
        """Whether to stop before this step; every process gets the same answer."""
        if jax.process_count() == 1:
            return self.received
        # The exchange makes the processes wait for each other, so it is rare.
        if step % AGREE_EVERY:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.received)).any())

    def _note(self, number, _) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
