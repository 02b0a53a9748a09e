"""Progress on stderr: a live bar on a terminal, occasional lines in a log file."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from rich import progress
from rich.console import Console
from rich.table import Column

from pcagpt import process

LINE_SECONDS = 10.0  # minimum time between two lines of one bar in a log file

Item = TypeVar("Item")

_open_bars: list["Progress"] = []  # outermost first; they share one display


class _Console(Console):
    """A console whose reader may end before the work does."""

    def on_broken_pipe(self) -> None:
        """Goes on in silence; rich would end the process."""
        self.quiet = True


def _new_display() -> progress.Progress:
    """Makes a rich display; it is disabled if stderr cannot show live bars."""

    def text(template: str) -> progress.TextColumn:
        column = Column(no_wrap=True)
        return progress.TextColumn(template, table_column=column, markup=False)

    console = _Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal
    if not live:
        console.size = 200, 25  # Lines in a log file are not wrapped.
    bar = progress.BarColumn(None, table_column=Column(ratio=1, max_width=40))
    return progress.Progress(
        text("{task.description} "),
        *([bar] if live else []),
        text("{task.completed:,}/{task.total:,} {task.percentage:3.0f}% "),
        text("{task.fields[readings]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(compact=True),
        text("left"),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=600,  # Some steps take minutes.
        get_time=time.monotonic,
        disable=not live,
    )


class Progress:
    """Progress of counted work on stderr; a context manager.

    A terminal shows a live bar. A log file gets a line at the start, then at most one
    line in LINE_SECONDS, and one at the end. Bars can nest: an inner bar disappears at
    its end, and a log file shows it only if it takes longer than LINE_SECONDS. Only the
    first process shows progress, and only if `process.shows_progress`. `start` is the
    number of steps that are already done.
    """

    _display: progress.Progress | None = None  # stays None on other processes

    def __init__(self, label: str, total: int, start: int = 0):
        self.label, self.total, self.step = label, total, start

    def __enter__(self) -> "Progress":
        if jax.process_index() > 0 or not process.shows_progress():
            return self
        self._display = _open_bars[0]._display if _open_bars else _new_display()
        self._task = self._display.add_task(
            self.label, total=self.total, completed=self.step, readings=""
        )
        self._last_line, self._printed_step = time.monotonic(), None
        if not _open_bars:
            self._display.start()
            self._print_line()
        _open_bars.append(self)
        return self

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Shows that `step` steps are done, with the loss in nats per token."""
        self.step = step
        if self._display is None:
            return
        readings = "" if loss is None else f"loss {loss:.3f} "
        if tokens_per_second is not None:
            readings += f" {tokens_per_second:,.0f} tok/s "
        self._display.update(self._task, completed=step, readings=readings)
        if time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and counts an item after its use."""
        for step, item in enumerate(items, self.step + 1):
            yield item
            self.update(step)

    def _print_line(self) -> None:
        """Prints one line if this is a log file."""
        if self._display.disable:
            task = [task for task in self._display.tasks if task.id == self._task]
            self._display.console.print(self._display.make_tasks_table(task))
            self._last_line, self._printed_step = time.monotonic(), self.step

    def __exit__(self, *_: object) -> None:
        if self._display is None:
            return
        if self._printed_step not in (None, self.step):
            self._print_line()
        _open_bars.remove(self)
        if _open_bars:
            self._display.remove_task(self._task)
        elif not self._display.disable:
            self._display.stop()
