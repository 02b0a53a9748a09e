"""Turns a command line into settings; explains its errors in terms of knobs."""

import difflib
import inspect
import os
import re
import runpy
import textwrap
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from pcagpt.config.checks import wrong_type
from pcagpt.config.knobs import PATH
from pcagpt.config.schema import KNOBS, Settings, base, override
from pcagpt.errors import UserError


def parse(arguments: list[str]) -> tuple[Settings, bool]:
    """The settings of a command line, and whether --print_config was given.

    `arguments` begin with the program name. Raises UserError for a wrong argument or
    config file.
    """
    for word in arguments:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            raise UserError(
                f"{word!r} is no UTF-8: write it in UTF-8, with LANG=C.UTF-8"
            )
    source, words = _take_config_file(arguments)
    for word in words[1:]:
        if knob := re.match(r"--?(?:no)?config\.([^=]*)", word):
            _require_knob(knob[1])
    if source is None:
        raise UserError("no config: give --config=configs/demo.py, or --help")
    # absl's global flags would keep the values of an earlier call.
    flag_values = flags.FlagValues()
    print_only = flags.DEFINE_bool(
        "print_config", False, "Show the plan and stop.", flag_values=flag_values
    )
    try:
        config = config_flags.DEFINE_config_dict(
            "config", _load(source), flag_values=flag_values, sys_argv=words
        )
        stray = flag_values(words)[1:]
    except flags.Error as error:
        raise _explained(error) from None
    if stray:
        raise UserError(f"'{stray[0]}' is not a flag: write --config.KNOB=VALUE")
    settings = Settings.of(config.value)
    paths = {
        path: _expanded(path, value)
        for path, value in settings.flat().items()
        if KNOBS[path].rule is PATH
    }
    return settings.replace(paths), print_only.value


def _expanded(name: str, path: str) -> str:
    """The path with ~ as the shell expands it, which it does not after '='."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{name} is '{path}': there is no such home folder; write ./{path} if it "
            "is a name"
        )
    return expanded


def _take_config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
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
    """The result of get_config() in 'FILE' or 'FILE:ARGUMENT'."""
    path, *argument = source.split(":", 1)
    path = _expanded("--config", path)
    if not Path(path).is_file():
        here = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        hint = f"there are {here}" if here else "run from the repository's folder"
        problem = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"config file '{path}' {problem}: {hint}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} defines no get_config()")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(
                f"{path} takes no ':{argument[0]}': set --config.KNOB=VALUE instead"
            )
        config = get_config(*argument)
    except UserError:
        raise
    except Exception as error:  # A person's file may raise anything.
        raise UserError(f"{path}, {_where_and_why(path, error)}") from None
    if not isinstance(config, ConfigDict) or config.keys() != base().keys():
        raise UserError(
            f"{path}: get_config() must return pcagpt.config.base(), with other values"
        )
    return config


def _where_and_why(path: str, error: Exception) -> str:
    """Place and reason of an error in a config file: 'line 4: TypeError: ...'."""
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
    if name in KNOBS:
        return
    if inside := [path for path in KNOBS if path.startswith(f"{name}.")]:
        example = override(inside[0], KNOBS[inside[0]].default)
        raise UserError(f"'{name}' is a section: set its knobs, as in {example}")
    raise UserError(f"there is no knob '{name}'{_suggestion(name)} (--help lists all)")


def _suggestion(name: str, prefix: str = "") -> str:
    """': did you mean X or Y?' for knobs with a similar name, or ''."""
    ends = {path: path.split(".")[-1] for path in KNOBS}
    end = name.split(".")[-1]
    near_ends = difflib.get_close_matches(end, ends.values(), n=1, cutoff=0.7)
    near = [path for path in KNOBS if ends[path] == end]
    near += difflib.get_close_matches(name, KNOBS, n=3, cutoff=0.7)
    near += [path for path in KNOBS if ends[path] in near_ends]
    found = [prefix + path for path in dict.fromkeys(near)]
    return f": did you mean {' or '.join(found[:3])}?" if found else ""


def _explained(error: flags.Error) -> UserError:
    """Rewords an error of absl about flags as one about knobs."""
    if isinstance(error, flags.UnrecognizedFlagError):
        flag = error.flagname
        known = ": use --config=FILE, --config.KNOB=VALUE, --print_config or --help"
        return UserError(
            f"there is no flag --{flag}{_suggestion(flag, '--config.') or known}"
        )
    text = " ".join(str(error).split())
    if illegal := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        return wrong_type(illegal[1], illegal[2])
    if missing := re.match(r"Missing value for flag --config\.([\w.]+)", text):
        return wrong_type(missing[1], "")
    return UserError(text)


def knobs_text() -> str:
    """Every knob with its default and meaning, for --help."""
    lines, section = ["Knobs and their defaults:"], None
    for path, knob in KNOBS.items():
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append("")
        setting = override(path, knob.default).removeprefix("--config.")
        text = f"  {setting:<40} {knob.meaning}"
        if knob.rule.words.startswith("one of"):
            text += f"; {knob.rule.words}"
        lines += textwrap.wrap(
            text, 88, subsequent_indent=" " * 43, break_on_hyphens=False
        )
    return "\n".join(lines)


def listing(settings: Settings) -> str:
    """The value of every knob, with its default if the two differ."""
    lines = []
    for path, value in settings.flat().items():
        default = KNOBS[path].default
        changed = "" if value == default else f"   (default {default!r})"
        lines.append(f"{path:<34} {value!r}{changed}")
    return "\n".join(lines)
