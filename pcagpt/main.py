"""How small can the token embedding of a GPT become, and at what cost in loss?

    python -m pcagpt.main --config=configs/NAME.py [--config.KNOB=VALUE ...]

  --config=configs/demo.py                 D, A, C, B and the report; CPU, minutes
  --config=configs/experiment.py:64,128    the same at GPT-2-small size
  --config=configs/baseline.py             D: the full embedding
  --config=configs/pca_k128.py             A: factorized embedding, random blocks
  --config=configs/pca_finetune_k128.py    B: factorized embedding, D's blocks
  --config=configs/random_k128.py          C: random factors
  --config=configs/recover.py --config.init.weights_from=RUN
  --config=configs/factorize.py --config.model_path=RUN_OR_NPY --config.ranks=64,128
  --config=configs/compress.py --config.model_path=RUN
  --config=configs/evaluate.py --config.model_path=RUN --config.split=test
  --config=configs/sample.py --config.model_path=RUN --config.sample.prompt=TEXT

Finished runs are skipped, and interrupted runs resume. Exit codes: 0 done, 2 a mistake
in the command or its inputs (nothing was written), 1 anything else.

  --print_config    show every knob's value and the plan, and stop
  --help            show this text
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import logging as absl_logging

from pcagpt.config import Settings, command_line, validate
from pcagpt.config.schema import RUN_TASKS
from pcagpt.errors import Interrupted, UserError

DONE, FAILED, PERSONS_MISTAKE = 0, 1, 2

_INTERRUPTED = "interrupted: run the same command again to continue"
_OUT_OF_MEMORY = (
    "the device's memory is exhausted: lower train.batch_size or evaluate.batch_size, "
    "raise train.accumulation or train.loss_chunks, or lower model.block_size"
)


def main(arguments: list[str]) -> int:
    """Runs a command line (program name first) and returns its exit code.

    A person's mistake becomes one line on stderr. A bug raises its exception, so that
    its traceback is shown.
    """
    try:
        if any(re.fullmatch("-h|--?help(full)?", word) for word in arguments[1:]):
            print(__doc__, command_line.knobs_text(), sep="\n")
            return DONE
        settings, print_only = command_line.parse(arguments)
        command = shlex.join(["python", "-m", "pcagpt.main", *arguments[1:]])
        run(settings, command, print_only)
        return DONE
    except UserError as error:
        return _say(str(error), PERSONS_MISTAKE)
    except Interrupted as error:
        return _say(str(error), FAILED)
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, FAILED)
    except MemoryError:
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)
    except RuntimeError as error:  # JAX's own errors derive from it.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)


def run(settings: Settings, command: str, print_only: bool) -> None:
    """Runs the task, or only prints the settings and the plan."""
    validate(settings)
    with _ended_by_interrupt():
        # These imports take seconds, so mistakes in the settings are reported first.
        import jax

        from pcagpt.compress.effort import decide_effort
        from pcagpt.pipeline import execute
        from pcagpt.pipeline.compress import compress
        from pcagpt.pipeline.evaluate import evaluate
        from pcagpt.pipeline.plan import make_plan
        from pcagpt.pipeline.sample import sample
        from pcagpt.run import checkpoint
        from pcagpt.sharding import placement

    if settings.distributed.enabled:
        placement.start_processes(
            settings.distributed.coordinator_address,
            settings.distributed.num_processes,
            settings.distributed.process_id,
        )
    lines: list[str] = []
    if print_only:
        if settings.task == "compress":  # Shows the values that replace 0 and empty.
            settings = decide_effort(settings, jax.default_backend())
        lines = [command_line.listing(settings), ""]
        if settings.task in RUN_TASKS:
            run_dir, step = checkpoint.find(settings.model_path)
            lines.append(f"{settings.task} {run_dir} at step {step}")
        else:
            plan = make_plan(settings)
            lines += execute.describe(execute.check(plan, settings))
    elif settings.task == "compress":
        compress(settings, command)
    elif settings.task == "evaluate":
        lines.append(json.dumps(evaluate(settings), indent=2))
    elif settings.task == "sample":
        lines.append("\n---\n".join(sample(settings)))
    else:
        execute.execute(make_plan(settings), settings, command)
    if lines and jax.process_index() == 0:
        print(*lines, sep="\n")


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Makes Ctrl-C end the process at once.

    A KeyboardInterrupt is not enough, because some libraries catch it while they are
    imported.
    """

    def end(*_):
        os.write(sys.stderr.fileno(), f"pcagpt: {_INTERRUPTED}\n".encode())
        os._exit(FAILED)

    try:
        before = signal.signal(signal.SIGINT, end)
    except ValueError:  # Only the main thread may set handlers.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str, exit_code: int) -> int:
    print(f"pcagpt: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def prepare_process() -> None:
    """Silences libraries and caches compiled programs; call before importing jax."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(cache / "pcagpt" / "compilation")
    )
    _keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.ERROR)
    warnings_shown = logging.StreamHandler()
    warnings_shown.setFormatter(logging.Formatter("pcagpt: %(message)s"))
    logger = logging.getLogger("pcagpt")
    logger.addHandler(warnings_shown)
    logger.propagate = False  # Libraries add their own handlers to the root logger.


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, so that each step on a CPU reuses it.

    By default glibc returns large buffers to the system after each step, and every 4
    KiB of the next buffers then cost a page fault. If the environment has variables of
    glibc, this function does nothing.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_threshold, arenas = -1, -3, -8  # Numbers of <malloc.h>.
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library.
        return
    # Older versions reject this threshold. Without it, the other options make it worse.
    if mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arenas, 1)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv))
