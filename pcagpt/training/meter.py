"""Reads the metrics of steps without making the device wait, and times the steps."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from pcagpt.errors import UserError
from pcagpt.json_files import check_fields
from pcagpt.model import DEVICE_KNOBS
from pcagpt.rows import Provenance
from pcagpt.run import provenance
from pcagpt.telemetry.metrics import Telemetry
from pcagpt.telemetry.progress import Progress


@dataclasses.dataclass
class History:
    """Measurements of a run that its checkpoints store, so that they survive a stop."""

    best_val_loss: float = math.inf
    # [tokens, validation loss] of each evaluation, ascending; None if the run began
    # with a version that did not store them.
    curve: list[list[float]] | None = dataclasses.field(default_factory=list)
    timed_tokens: int = 0  # of timed steps: no compiling, evaluating or saving
    timed_seconds: float = 0.0
    seconds: float = 0.0  # wall-clock, of everything
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # provenance
    # The device knobs of all sessions.
    resolved: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, stored: Any) -> "History":
        """From a checkpoint's meta, where null stands for a loss not measured yet.

        Raises UserError if it is damaged.
        """
        number = (int, float, None)
        fields = {field.name: number for field in dataclasses.fields(cls)}
        fields |= {"curve": (list, None), "made_by": (Provenance, None)}
        fields["resolved"] = (dict[str, str], None)
        check_fields(stored, fields, "the history of the checkpoint", "delete it")
        known = {name: stored[name] for name in fields if stored.get(name) is not None}
        # An unfinished run goes on in its compute dtype.
        changing = [name for name in DEVICE_KNOBS if name != "compute_dtype"]
        knobs = dict.fromkeys(changing, "unknown")
        older = {"curve": None, "made_by": provenance.UNKNOWN, "resolved": knobs}
        return cls(**older | known)

    def add(self, tokens: int, loss: float) -> None:
        """Adds an evaluation after `tokens` training tokens, unless it is there."""
        self.best_val_loss = min(loss, self.best_val_loss)
        if self.curve is not None and all(t < tokens for t, _ in self.curve[-1:]):
            self.curve.append([tokens, loss])

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed of all timed steps."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None


class NotFinite(UserError):
    """A loss or gradient (`seen`) is not finite at a step.

    is_of_start: whether no update had changed the weights before.
    """

    def __init__(self, step: int, seen: str, is_of_start: bool):
        super().__init__(f"the loss is not finite at step {step} ({seen})")
        self.is_of_start = is_of_start


class Meter:
    """Takes the metrics of each step and reads them after the next step is dispatched.

    Reading a metric waits for its step. With the delay of one step, the device works on
    the next step during this wait. It adds the time of each step to the history.
    """

    def __init__(
        self,
        history: History,
        telemetry: Telemetry,
        progress: Progress,
        *,
        every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ):
        """every: steps between logged metrics; peak_flops: per second, of all devices.

        peak_flops is None if it is unknown.
        """
        self._history, self._telemetry, self._progress = history, telemetry, progress
        self._every, self._tokens_per_step = every, tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._held: tuple[int, Mapping[str, jax.Array]] | None = None
        self._last_read: float | None = None

    def hold(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of update `step` and reads those of the update before.

        Raises NotFinite if the loss or gradient norm read is not.
        """
        self._read()
        self._held = step, metrics

    def flush(self) -> None:
        """Reads the metrics that it holds; does not time what follows."""
        self._read()
        self._last_read = None

    def _read(self) -> None:
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in metrics.items()}
        loss, norm = values["loss"], values["gradient_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            # The metrics of an update are of the weights before it.
            raise NotFinite(step, f"loss {loss}, gradient norm {norm}", step <= 1)
        speed = self._time_step()
        self._progress.update(step, loss, self._history.tokens_per_second)
        if step % self._every == 0:
            utilisation = None
            if speed is not None and self._peak_flops is not None:
                utilisation = speed * self._flops_per_token / self._peak_flops
            values |= {
                "tokens_per_second": speed,
                "flop_utilisation": utilisation,
                "device_peak_bytes": provenance.device_peak_bytes(),
            }
            self._telemetry.log(step, step * self._tokens_per_step, "train", values)

    def _time_step(self) -> float | None:
        """Tokens per second since the last reading; None right after `flush`."""
        now, before = time.perf_counter(), self._last_read
        self._last_read = now
        if before is None:
            return None
        self._history.timed_tokens += self._tokens_per_step
        self._history.timed_seconds += now - before
        return self._tokens_per_step / (now - before)
