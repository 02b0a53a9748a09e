"""The command line: runs the task that it asks for, and says what went wrong."""

import contextlib
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

try:
    from pcagpt import process
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    remedy = "install pcagpt again with pip, which also installs what it needs"
    if (Path(__file__).parents[1] / "scripts" / "setup.sh").is_file():
        remedy = "run 'bash scripts/setup.sh' once, then 'source .venv/bin/activate'"
    print(
        f"pcagpt: {sys.executable} has no package '{error.name}': {remedy}",
        file=sys.stderr,
    )
    sys.exit(2)
from pcagpt.errors import Interrupted, UserError, explain
from pcagpt.process import FAILED, REFUSED, SUCCEEDED

if __name__ == "__main__":
    process.end_at_signals()  # Before the other imports, which take a moment.

from pcagpt.config import Settings, command_line, validate
from pcagpt.config.tasks import TASKS

HELP = """How small can the token embedding of a GPT become, and at what cost in loss?

    python -m pcagpt.main --config=configs/NAME.py [--config.KNOB=VALUE ...]
    pcagpt NAME [--config.KNOB=VALUE ...]    the same, from any folder

  --config=configs/demo.py                 D, A, C, B and the report; CPU, minutes
  --config=configs/experiment.py:64,128    the same at GPT-2-small size
  --config=configs/gpt2_small_hour.py      and D+, in an hour on one H100
  --config=configs/baseline.py             D: the full embedding
  --config=configs/pca_k128.py             A: factorized embedding, random blocks
  --config=configs/pca_finetune_k128.py    B: factorized embedding, D's blocks
  --config=configs/random_k128.py          C: random factors
  --config=configs/recover.py --config.init.weights_from=RUN
  --config=configs/factorize.py --config.model_path=RUN_OR_NPY --config.ranks=64,128
  --config=configs/compress.py --config.model_path=RUN
  --config=configs/evaluate.py --config.model_path=RUN --config.split=test
  --config=configs/sample.py --config.model_path=RUN --config.sample.prompt=TEXT
  --config=configs/export.py --config.model_path=RUN --config.format=hf

Finished runs are skipped, interrupted runs resume. Exit codes:

   0  done
   2  a mistake in the command or its inputs, or an error of the system, such as a full
      disk; what was saved before is kept
  75  stopped by SIGUSR1 or SIGUSR2, which Slurm sends if --signal asks for a warning:
      training has saved, the same command goes on
   1  a bug; Ctrl-C, SIGTERM or a closed terminal (SIGHUP, unless nohup ignores it),
      after training has saved; another process of the same run has ended, noticed
      within a minute

  --print_config    show every knob's value and the plan, and stop
  --help            show this text
"""
_HOST_OUT_OF_MEMORY = (
    "this machine's main memory is exhausted: end other programs, or use a machine "
    "with more"
)
_GOES_ON = "; whatever is saved is kept, and the same command goes on from it"
_BEGINS_AGAIN = "; nothing of {} is saved yet, and the same command starts it again"
_DEVICE_OUT_OF_MEMORY = (
    "the device's memory is exhausted: lower evaluate.batch_size (for samples: "
    "sample.count; for statistics: train.batch_size) or raise train.loss_chunks; for a "
    "new run, also lower train.batch_size or model.block_size, or raise "
    "train.accumulation"
)
# PyTorch computes what pcagpt cannot, in fewer ways.
_TORCH_OUT_OF_MEMORY = (
    "the GPU's memory is exhausted: lower model.block_size, use a larger GPU, or the "
    "CPU, with CUDA_VISIBLE_DEVICES= before the command"
)
# {a part of the text of a RuntimeError: what to say}
_OUT_OF_MEMORY = {
    "RESOURCE_EXHAUSTED": _DEVICE_OUT_OF_MEMORY,
    "CUDA out of memory": _TORCH_OUT_OF_MEMORY,
    "CUDA error: out of memory": _TORCH_OUT_OF_MEMORY,
    "DefaultCPUAllocator": _HOST_OUT_OF_MEMORY,  # PyTorch's
}


def main(arguments: list[str]) -> int:
    """Runs a command line (program name first) and returns its exit code.

    A person's mistake and an error of the system become one line on stderr. A bug stays
    an exception, with its traceback.
    """
    settings = None

    def goes_on(error: Exception) -> str:
        if settings is None or not _resumes(settings):
            return ""
        unsaved = getattr(error, "unsaved", None)
        return _BEGINS_AGAIN.format(unsaved) if unsaved else _GOES_ON

    try:
        if any(re.fullmatch("-h|--?help(full)?", word) for word in arguments[1:]):
            _show(f"{HELP}\n{command_line.knobs_text()}")
            return SUCCEEDED
        settings, print_only = command_line.parse(arguments)
        validate(settings)
        command = shlex.join(["python", "-m", "pcagpt.main", *arguments[1:]])
        with process.interrupted_by_signals(_if_interrupted(settings)):
            run(settings, command, print_only)
        return SUCCEEDED
    except UserError as error:
        return _say(str(error), REFUSED)
    except Interrupted as error:
        return _say(str(error), process.exit_code(error.number))
    except KeyboardInterrupt:
        return _say(process.STOPPED, FAILED)
    except MemoryError as error:
        return _say(_HOST_OUT_OF_MEMORY + goes_on(error), REFUSED)
    except (OSError, ValueError, RuntimeError) as error:
        if line := explain(error):
            return _say(line + goes_on(error), REFUSED)
        # Those of JAX and PyTorch are RuntimeErrors.
        known = _OUT_OF_MEMORY if isinstance(error, RuntimeError) else {}
        if lines := [line for text, line in known.items() if text in str(error)]:
            return _say(lines[0], REFUSED)
        if "jax" in sys.modules:
            from pcagpt.sharding import processes

            if reason := processes.lost_process(error):
                process.say_others_ended(reason)
        raise


def run(settings: Settings, command: str, print_only: bool) -> None:
    """Runs the task, or only prints the plan and settings that are valid."""
    os.getcwd()  # Some packages abort if the current folder was removed.
    if settings.distributed.enabled:
        process.end_with_others()
    with process.ended_by_signals(_if_interrupted(settings)):
        # Imported here because this takes seconds: mistakes are reported before.
        try:
            import jax
        except ValueError as error:
            raise UserError(
                f"JAX refuses its environment ({error}): correct or unset the variable"
            ) from None

        from pcagpt.pipeline import tasks
        from pcagpt.sharding import processes

        if settings.distributed.enabled:
            processes.start(
                settings.distributed.coordinator_address,
                settings.distributed.num_processes,
                settings.distributed.process_id,
            )
        processes.open_devices()  # JAX swallows what its plugins raise meanwhile.
    try:
        text = tasks.preview(settings) if print_only else tasks.do(settings, command)
    except Interrupted:  # All processes stop at the same step.
        processes.leave()
        raise
    if text is not None and jax.process_index() == 0:
        _show(text)


def _if_interrupted(settings: Settings) -> str:
    """What a signal makes the command say: whether it can go on."""
    if _is_search(settings):
        return process.SEARCH_INTERRUPTED
    return process.INTERRUPTED[_resumes(settings)]


def _is_search(settings: Settings) -> bool:
    return settings.task == "compress" and bool(settings.compress.bounds)


def _resumes(settings: Settings) -> bool:
    """Whether the same command goes on from what this one saved."""
    return TASKS[settings.task].resumes and not _is_search(settings)


def _show(text: str) -> None:
    """Prints the last text of a command; a reader may end before it has read all."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def _say(message: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):  # stderr is closed.
        print(f"pcagpt: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    process.prepare()
    try:
        code = main(sys.argv)
    except Exception:  # A bug: the traceback, and no waiting.
        traceback.print_exc()
        code = FAILED
    process.end(code)
