"""How small can the token embedding of a GPT become, and at what cost in loss?

    python -m pcagpt.main --config=configs/NAME.py [--config.KNOB=VALUE ...]

  --config=configs/demo.py                 D, A, C, B and the report; CPU, minutes
  --config=configs/experiment.py:64,128    the same at GPT-2-small size
  --config=configs/baseline.py             D: the full embedding
  --config=configs/pca_k128.py             A: factorized embedding, random blocks
  --config=configs/pca_finetune_k128.py    B: factorized embedding, D's blocks
  --config=configs/random_k128.py          C: random factors
  --config=configs/factorize.py --config.model_path=RUN_OR_NPY --config.ranks=64,128
  --config=configs/evaluate.py --config.model_path=RUN --config.split=test

What is finished is skipped, what was interrupted resumes. Exit codes: 0 done, 2 a
mistake in what was asked for (nothing was written), 1 anything else.

  --print_config    show every knob's value and what would be done, and stop
  --help            show this text
"""

import difflib
import inspect
import json
import logging
import os
import re
import runpy
import shlex
import sys
import textwrap
import traceback
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from pcagpt import config as knobs
from pcagpt.errors import Interrupted, UserError

DONE, FAILED, PERSONS_MISTAKE = 0, 1, 2

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
            print(help_text())
            return DONE
        config, print_only = parse(arguments)
        command = shlex.join(["python", "-m", "pcagpt.main", *arguments[1:]])
        run(config, command, print_only)
        return DONE
    except UserError as error:
        return _say(str(error), PERSONS_MISTAKE)
    except Interrupted as error:
        return _say(str(error), FAILED)
    except KeyboardInterrupt:
        return _say("interrupted: the same command goes on from what is saved", FAILED)
    except MemoryError:
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)
    except RuntimeError as error:  # The class of JAX's own errors.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _say(_OUT_OF_MEMORY, PERSONS_MISTAKE)


def run(config: ConfigDict, command: str, print_only: bool) -> None:
    """Does, or only describes, what the config asks for."""
    knobs.validate(config)
    # Here because they take seconds to import, and mistakes should show at once.
    from pcagpt import checkpoint, experiment, sharding
    from pcagpt.evaluate_run import evaluate_run

    if config.distributed.enabled:
        sharding.start_processes(
            config.distributed.coordinator_address,
            config.distributed.num_processes,
            config.distributed.process_id,
        )
    if config.task == "evaluate":
        run_dir, step = checkpoint.find(config.model_path)
        if print_only:
            print(listing(config))
            print(f"\nevaluate {run_dir} at step {step} on {config.split}")
        else:
            print(json.dumps(evaluate_run(config), indent=2))
        return
    plan = experiment.plan(config)
    if print_only:
        experiment.check(plan, config)
        print(
            listing(config), "", *experiment.describe(plan, config.overwrite), sep="\n"
        )
    else:
        experiment.execute(plan, config, command)


def parse(arguments: list[str]) -> tuple[ConfigDict, bool]:
    """The config, and whether it is only to be shown, of a command line.

    Raises:
      UserError: anything in it that cannot be understood.
    """
    source, words = _take_config_file(arguments)
    for word in words[1:]:
        if knob := re.match(r"--?(?:no)?config\.([^=]*)", word):
            _require_knob(knob[1])
    if source is None:
        raise UserError("no config: say --config=configs/demo.py, or --help")
    flag_values = flags.FlagValues()
    print_only = flags.DEFINE_bool(
        "print_config", False, "Show what would be done.", flag_values=flag_values
    )
    try:
        config = config_flags.DEFINE_config_dict(
            "config", _load(source), flag_values=flag_values, sys_argv=words
        )
        stray = flag_values(words)[1:]
    except flags.Error as error:
        raise _explained(error) from None
    if stray:
        raise UserError(f"'{stray[0]}' is no flag: write --config.KNOB=VALUE")
    return config.value, print_only.value


def _take_config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """What --config says, and the other arguments."""
    found, others, words = [], [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            found.append(value if equals else next(words, ""))
        else:
            others.append(word)
    if len(found) > 1:
        raise UserError(f"--config is given twice, {' and '.join(found)}: give one")
    return (found[0] if found else None), others


def _load(source: str) -> ConfigDict:
    """What get_config() of 'FILE' or 'FILE:ARGUMENT' returns."""
    path, *argument = source.split(":", 1)
    if not Path(path).is_file():
        here = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        hint = f"here are {here}" if here else "run from the repository's folder"
        raise UserError(f"there is no config file '{path}': {hint}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} defines no get_config()")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(
                f"{path} takes no ':{argument[0]}': its knobs are set by "
                "--config.KNOB=VALUE"
            )
        config = get_config(*argument)
    except UserError:
        raise
    except Exception as error:  # Whatever a person's file may raise.
        raise UserError(f"{path}, {_where_and_why(path, error)}") from None
    if not isinstance(config, ConfigDict) or config.keys() != knobs.base().keys():
        raise UserError(
            f"{path}: get_config() must return what pcagpt.config.base() gave it, with "
            "other values"
        )
    return config


def _where_and_why(path: str, error: Exception) -> str:
    """'line 4: TypeError: ...' for what executing a config file raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
    if undeclared := re.search(r'Key "(\w+)" does not exist', str(error)):
        name = undeclared[1]
        return f"line {line}: there is no knob '{name}'{_suggestion(name)}"
    reason = getattr(error, "msg", None) or error
    return f"line {line}: {type(error).__name__}: {reason}"


def _require_knob(name: str) -> None:
    """Raises UserError with the nearest names if there is no such knob."""
    if name in knobs.KNOBS:
        return
    if inside := [path for path in knobs.KNOBS if path.startswith(f"{name}.")]:
        example = knobs.override(inside[0], knobs.KNOBS[inside[0]].default)
        raise UserError(
            f"'{name}' is a section of {len(inside)} knobs: set them one by one, as in "
            f"{example}"
        )
    raise UserError(f"there is no knob '{name}'{_suggestion(name)} (--help lists all)")


def _suggestion(name: str, prefix: str = "") -> str:
    """': did you mean X or Y?' with knobs of nearly that name, or ''."""
    last_part = {path: path.split(".")[-1] for path in knobs.KNOBS}
    last = name.split(".")[-1]
    same = [path for path in knobs.KNOBS if last_part[path] == last]
    near = difflib.get_close_matches(name, knobs.KNOBS, n=3, cutoff=0.7)
    near_last = difflib.get_close_matches(last, last_part.values(), n=1, cutoff=0.7)
    near += [path for path in knobs.KNOBS if last_part[path] in near_last]
    found = [prefix + path for path in dict.fromkeys(same + near)]
    return f": did you mean {' or '.join(found[:3])}?" if found else ""


def _explained(error: flags.Error) -> UserError:
    """What absl says about a flag, in the words of knobs."""
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        flag = error.flagname
        known = ": there are --config=FILE, --config.KNOB=VALUE, --print_config, --help"
        return UserError(
            f"there is no flag --{flag}{_suggestion(flag, '--config.') or known}"
        )
    if illegal := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        return knobs.wrong_type(illegal[1], illegal[2])
    if missing := re.match(r"Missing value for flag --config\.([\w.]+)", text):
        return knobs.wrong_type(missing[1], "")
    return UserError(text)


def help_text() -> str:
    """How to call pcagpt, and every knob with its default and meaning."""
    lines, section = [__doc__.rstrip(), "", "Knobs and their defaults:"], None
    for path, knob in knobs.KNOBS.items():
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append("")
        setting = knobs.override(path, knob.default).removeprefix("--config.")
        text = f"  {setting:<40} {knob.meaning}"
        if knob.rule.words.startswith("one of"):
            text += f"; {knob.rule.words}"
        lines += textwrap.wrap(
            text, 88, subsequent_indent=" " * 43, break_on_hyphens=False
        )
    return "\n".join(lines)


def listing(config: ConfigDict) -> str:
    """Every knob's value, with the default where that is another."""
    lines = []
    for path, value in knobs.flat(config).items():
        default = knobs.KNOBS[path].default
        changed = "" if value == default else f"   (default {default!r})"
        lines.append(f"{path:<34} {value!r}{changed}")
    return "\n".join(lines)


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
    absl_logging.set_verbosity(absl_logging.ERROR)
    warnings_shown = logging.StreamHandler()
    warnings_shown.setFormatter(logging.Formatter("pcagpt: %(message)s"))
    logger = logging.getLogger("pcagpt")
    logger.addHandler(warnings_shown)
    logger.propagate = False  # Libraries put handlers of their own on the root.


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv))
