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

What is finished is skipped, what was interrupted resumes. Exit codes: 0 done, 2 a
mistake in what was asked for (nothing was written), 1 anything else.

  --print_config    show every knob's value and what would be done, and stop
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
from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt.config import command_line
from pcagpt.errors import Interrupted, UserError

DONE, FAILED, PERSONS_MISTAKE = 0, 1, 2
TASKS_OF_A_MODEL = ("evaluate", "sample", "compress")

_INTERRUPTED = "interrupted: the same command goes on from what is saved"
_OUT_OF_MEMORY = (
    "the device's memory is exhausted: lower train.batch_size or evaluate.batch_size, "
    "raise train.accumulation or train.loss_chunks, or lower model.block_size"
)


def main(arguments: list[str]) -> int:
    """Does what a command line (program name first) asks for; returns the exit code.

    A person's mistake is one line on stderr, a bug is an exception.
    """
    try:
        if any(re.fullmatch("-h|--?help(full)?", word) for word in arguments[1:]):
            print(__doc__, command_line.knobs_text(), sep="\n")
            return DONE
        config, print_only = command_line.parse(arguments)
        command = shlex.join(["python", "-m", "pcagpt.main", *arguments[1:]])
        run(config, command, print_only)
        return DONE
    except UserError as error:
        return _say(str(error), PERSONS_MISTAKE)
    except Interrupted as error:
        return _say(str(error), FAILED)
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, FAILED)
    except MemoryError:
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)
    except RuntimeError as error:  # The class of JAX's own errors.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)


def run(config: ConfigDict, command: str, print_only: bool) -> None:
    """Does, or only describes, what the config asks for."""
    knobs.validate(config)
    with _ended_by_interrupt():
        # Here because it takes seconds, and mistakes should show at once.
        from pcagpt.compress.sweep import compress
        from pcagpt.pipeline import execute as experiment
        from pcagpt.pipeline.evaluate_task import evaluate_run
        from pcagpt.pipeline.plan import make_plan
        from pcagpt.pipeline.sample_task import sample_run
        from pcagpt.run import checkpoint
        from pcagpt.sharding import placement

    if config.distributed.enabled:
        placement.start_processes(
            config.distributed.coordinator_address,
            config.distributed.num_processes,
            config.distributed.process_id,
        )
    if config.task in TASKS_OF_A_MODEL:
        run_dir, step = checkpoint.find(config.model_path)
        if print_only:
            print(command_line.listing(config))
            print(f"\n{config.task} {run_dir} at step {step}")
        elif config.task == "evaluate":
            print(json.dumps(evaluate_run(config), indent=2))
        elif config.task == "sample":
            print(*sample_run(config), sep="\n---\n")
        else:
            compress(config, command)
            if config.compress.recover_ranks:
                experiment.recover(config)
        return
    plan = make_plan(config)
    if print_only:
        experiment.check(plan, config)
        print(
            command_line.listing(config),
            "",
            *experiment.describe(plan),
            sep="\n",
        )
    else:
        experiment.execute(plan, config, command)


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Within, Ctrl-C ends the process: an import might swallow a KeyboardInterrupt."""

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
    """Silences the libraries and keeps what is compiled; before they are imported."""
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
    logger.propagate = False  # Libraries put handlers of their own on the root.


def _keep_freed_memory() -> None:
    """Lets a step on a CPU have the memory of the step before.

    glibc would give large buffers back to the system each time, and get them anew with
    a page fault for every 4 KiB of them. Who has told glibc something else is heard.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_threshold, arenas = -1, -3, -8  # as <malloc.h> numbers them
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library.
        return
    # Older versions refuse such a threshold, and the rest would then do harm.
    if mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arenas, 1)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv))
