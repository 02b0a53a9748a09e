"""Reads the metrics of steps without making the device wait, and times the steps."""

import time
from collections.abc import Mapping

import jax
import numpy as np

from pcagpt.errors import UserError
from pcagpt.run import provenance
from pcagpt.telemetry.progress import Progress
from pcagpt.telemetry.record import Telemetry


def not_finite(step: int, seen: str) -> UserError:
    """The error for a loss that is not finite after `step` updates."""
    return UserError(
        f"the loss is not finite at step {step} ({seen}): the checkpoint before it is "
        "kept; lower train.learning_rate or train.gradient_clip, then run again with "
        "--config.overwrite=True"
    )


class Throughput:
    """Tokens per second of training, without compiling, evaluating and saving."""

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens, self.seconds = tokens, seconds
        self._since: float | None = None

    def pause(self) -> None:
        """Leaves the current interval out."""
        self._since = None

    def add(self, tokens: int) -> float | None:
        """Notes the end of a step; returns its tokens per second if it was timed."""
        now, since = time.perf_counter(), self._since
        self._since = now
        if since is None:
            return None
        self.tokens += tokens
        self.seconds += now - since
        return tokens / (now - since)

    @property
    def mean(self) -> float | None:
        """Tokens per second over all timed steps."""
        return self.tokens / self.seconds if self.seconds else None


class Meter:
    """Takes the metrics of each step and reads them once the next step is dispatched.

    Args:
      telemetry: where they are logged, every `every` steps.
      progress: where they are shown.
      throughput: continued from before a resume.
      tokens_per_step: of all devices together.
      flops_per_token: of a training step.
      peak_flops: FLOP/s of all devices, or None where unknown.
      every: steps between two logged lines.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        progress: Progress,
        throughput: Throughput,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        every: int,
    ):
        self.throughput = throughput
        self._telemetry, self._progress, self._every = telemetry, progress, every
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        self._peak_flops = peak_flops
        self._held: tuple[int, Mapping[str, jax.Array]] | None = None

    def hold(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of update `step` and reads those of the update before.

        Raises:
          UserError: the loss or gradient norm read is not finite.
        """
        self._read()
        self._held = step, metrics

    def flush(self) -> None:
        """Reads the metrics it holds, and leaves what follows out of the timing."""
        self._read()
        self.throughput.pause()

    def _read(self) -> None:
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in metrics.items()}
        loss, norm = values["loss"], values["gradient_norm"]
        if not np.isfinite([loss, norm]).all():
            raise not_finite(step, f"loss {loss}, gradient norm {norm}")
        rate = self.throughput.add(self._tokens_per_step)
        self._progress.update(step, loss, self.throughput.mean)
        if step % self._every == 0:
            utilisation = None
            if rate is not None and self._peak_flops is not None:
                utilisation = rate * self._flops_per_token / self._peak_flops
            values |= {
                "tokens_per_second": rate,
                "flop_utilisation": utilisation,
                "device_peak_bytes": provenance.device_peak_bytes(),
            }
            self._telemetry.log(step, step * self._tokens_per_step, "train", values)
