"""The command line called in this process, and commands found in text."""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from runs import snapshot

from pcagpt import main
from pcagpt.config import command_line
from pcagpt.config.tasks import readers_of
from pcagpt.config.unread import read_if
from pcagpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"

# Any config, shrunk to two steps of a second in all, on one device.
TINY = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "train.steps": 2,
    "train.warmup_steps": 1,
    "train.batch_size": 4,
    "train.loss_chunks": 1,
    "evaluate.batch_size": 64,
    "telemetry.tensorboard": False,
    "mesh.data": 1,
    "compress.calibration_tokens": 256,
}


LEFT_OUT = object()
# The `model` section for a model of another program, which has its own sizes.
THEIR_SIZES = {"block_size": 16} | dict.fromkeys(
    ("n_layer", "n_head", "n_embd"), LEFT_OUT
)


def tiny_knobs(config_name):
    """Those of `TINY` that the task of the config reads."""
    settings, _ = command_line.parse(["pcagpt", f"--config={CONFIGS / config_name}"])
    return {k: v for k, v in TINY.items() if settings.task in readers_of(k)[0]}


def unread(words):
    """The knobs that a command does not read beside the others of its words."""
    with contextlib.suppress(UserError):  # A test may want a wrong command.
        settings, _ = command_line.parse(["pcagpt", *words])
        found = read_if(settings, {settings.task})
        return {path for path, is_read, _ in found if not is_read}
    return set()


@dataclass(frozen=True)
class Outcome:
    """The exit code of a call, and what it printed."""

    code: int
    out: str
    err: str


def call(*arguments):
    """Runs `python -m pcagpt.main ARGUMENT...` without starting a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["pcagpt", *map(str, arguments)])
    return Outcome(code, out.getvalue(), err.getvalue())


def tiny(config_name, corpus_folder, **sections):
    """Arguments for a config of configs/ at tiny size.

    tiny("pca_k128.py", folder, train={"steps": 3}, seed=2) sets two knobs besides.
    LEFT_OUT as a value leaves a knob to the config.
    """
    given = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            given |= {f"{name}.{knob}": v for knob, v in value.items()}
        else:
            given[name] = value
    values = {"data.source": corpus_folder} | tiny_knobs(config_name) | given
    if config_name == "factorize.py":
        values = {"factorize.method": "svd"} | values
    words = {k: f"--config.{k}={v}" for k, v in values.items() if v is not LEFT_OUT}
    config = f"--config={CONFIGS / config_name}"
    left_out = unread([config, *words.values()]) - given.keys()
    return [config, *(word for knob, word in words.items() if knob not in left_out)]


def refusal(*arguments, unchanged):
    """The one line of a call that must fail for the person's mistake.

    `unchanged`: folders in which nothing may be written, changed or lost.
    """
    before = [snapshot(folder) for folder in unchanged]
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("pcagpt: "), outcome.err
    assert [snapshot(folder) for folder in unchanged] == before
    return outcome.err


def commands(text):
    """Command lines as words: those of pcagpt and its scripts, one a line of the text.

    A line that ends in a backslash goes on in the next.
    """
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pattern = r"\s*(?:\$ )?((?:python -m pcagpt\.main|bash scripts/)\b.*)"
    found = [re.fullmatch(pattern, line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]
