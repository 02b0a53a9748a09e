"""Stops training between two steps after Ctrl-C or another signal."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from pcagpt import process

AGREE_EVERY = 10  # steps between two exchanges among several processes


class StopRequest:
    """The first signal that asked this process to stop."""

    received = 0  # its number; 0: none

    def stops_at(self, step: int) -> int:
        """The signal to stop for before this step, the same in every process, or 0."""
        # The exchange makes the processes wait for each other, so it is rare.
        if jax.process_count() > 1 and step % AGREE_EVERY:
            return 0
        return self.agreed()

    def agreed(self) -> int:
        """The signal that any process has received, or 0.

        All processes must call this.
        """
        if jax.process_count() == 1:
            return self.received
        return int(multihost_utils.process_allgather(np.array(self.received)).max())

    def note(self, number: int, _) -> None:
        """Records a signal, and says so; a second SIGINT raises KeyboardInterrupt."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            alone = jax.process_count() == 1
            when = "after this step" if alone else f"within {AGREE_EVERY} steps"
            process.tell(f"stops {when}; another Ctrl-C stops it at once")
        self.received = self.received or number


@contextlib.contextmanager
def recorded_signals() -> Iterator[StopRequest]:
    """Records `process.STOPS` instead of ending."""
    request = StopRequest()
    with process.handled(request.note):
        yield request
