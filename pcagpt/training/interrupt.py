"""Stops training between two steps after Ctrl-C or another signal."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from pcagpt.process import STOPS

AGREE_EVERY = 10  # steps between two exchanges among several processes


class StopRequest:
    """Records SIGINT and `STOPS` instead of ending; a second SIGINT ends at once.

    A context manager. A second SIGINT raises KeyboardInterrupt at once. It has no
    effect outside the main thread.
    """

    def __init__(self):
        self.received = 0  # number of the first signal; 0: none
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        try:
            for number in (signal.SIGINT, *STOPS):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # Only the main thread may set handlers.
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stops_at(self, step: int) -> int:
        """The signal to stop for before this step, the same in every process, or 0."""
        if jax.process_count() == 1:
            return self.received
        # The exchange makes the processes wait for each other, so it is rare.
        if step % AGREE_EVERY:
            return 0
        return int(multihost_utils.process_allgather(np.array(self.received)).max())

    def _note(self, number, _) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
