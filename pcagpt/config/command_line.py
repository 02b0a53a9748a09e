"""Turns a command line into settings; explains its errors in terms of knobs."""

import contextlib
import difflib
import inspect
import os
import re
import runpy
import shlex
import sysconfig
import textwrap
import traceback
from decimal import Decimal
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import pcagpt
from pcagpt.config.checks import wrong_type
from pcagpt.config.knobs import PATH
from pcagpt.config.schema import KNOBS, UNSET, Settings, base, override
from pcagpt.errors import UserError

# Where the configs are in the repository, and in an installed package.
_CONFIGS = (
    Path(pcagpt.__file__).parent.parent / "configs",
    Path(sysconfig.get_path("data")) / "share/pcagpt/configs",
)
# What other trainers, such as nanoGPT and Hugging Face's, call a knob.
_SYNONYMS = {
    "train.learning_rate": "lr max_lr learning_rate",
    "train.final_learning_rate_share": "min_lr min_lr_ratio",
    "train.schedule": "lr_scheduler_type lr_schedule scheduler decay_lr",
    "train.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "train.steps": "max_iters max_steps n_steps num_steps total_steps iters",
    "train.batch_size": "per_device_train_batch_size train_batch_size",
    "train.accumulation": "gradient_accumulation_steps grad_accum",
    "train.gradient_clip": "grad_clip max_grad_norm clip clip_norm",
    "train.weight_decay": "wd",
    "train.beta1": "adam_beta1 b1",
    "train.beta2": "adam_beta2 b2",
    "model.n_embd": "d_model hidden_size width dim embed_dim n_embed emb_dim",
    "model.n_layer": "num_layers n_layers num_hidden_layers depth",
    "model.n_head": "num_heads n_heads num_attention_heads heads",
    "model.block_size": "seq_len seq_length max_seq_len context_length n_ctx "
    "n_positions max_position_embeddings context_size",
    "ranks": "rank",
    "model.n_embd_wte": "rank k",
    "model.compute_dtype": "dtype precision bf16 fp16",
    "model.dropout": "resid_pdrop embd_pdrop attn_pdrop",
    "evaluate.every": "eval_interval eval_steps eval_every",
    "evaluate.batch_size": "eval_batch_size per_device_eval_batch_size",
    "evaluate.max_tokens": "eval_iters",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_every",
    "checkpoint.keep_last": "save_total_limit keep max_to_keep",
    "telemetry.every": "log_interval logging_steps log_every",
    "telemetry.wandb": "wandb_log report_to",
    "workdir": "out_dir output_dir outdir out log_dir",
    "data.source": "dataset data_dir dataset_name data_path train_file corpus",
    "data.tokenizer": "tokenizer_name",
    "sample.prompt": "start text",
    "sample.tokens": "max_new_tokens max_tokens",
    "sample.count": "num_samples num_return_sequences",
    "model_path": "model_name_or_path init_from checkpoint_path ckpt run resume_from",
    "init.weights_from": "resume_from_checkpoint pretrained",
    "experiment.seeds": "num_seeds",
    "mesh.data": "num_devices n_devices devices",
}


def parse(arguments: list[str]) -> tuple[Settings, bool]:
    """The settings of a command line, and whether --print_config was given.

    `arguments` begin with the program name. Raises UserError for a wrong argument or
    config file.
    """
    for word in arguments:
        check_utf8(word)
    source, words = _take_config_file(arguments)
    words = _last_of_each([_plain_number(word) for word in _joined(words)])
    found = [re.match(r"--?(?:no)?config\.([^=]*)", word) for word in words[1:]]
    named = [knob[1] for knob in found if knob]
    for name in named:
        _require_knob(name)
    if source is None:
        raise UserError("no config: give --config=configs/demo.py, or --help")
    # absl's global flags would keep the values of an earlier call.
    flag_values = flags.FlagValues()
    print_only = flags.DEFINE_bool(
        "print_config", False, "Show the plan and stop.", flag_values=flag_values
    )
    loaded = _load(source)
    in_file = Settings.of(loaded).given
    try:
        config = config_flags.DEFINE_config_dict(
            "config", loaded, flag_values=flag_values, sys_argv=words
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
    for path in filter(None, paths.values()):
        check_place(path)
    chosen = settings.replace({**paths, "named": frozenset(named) - in_file})
    return chosen, print_only.value


def check_utf8(text: str) -> None:
    """Raises UserError for a text with bytes that are not UTF-8, or were not read so.

    No JSON file could hold it, nor Orbax open such a path.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        try:
            os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise UserError(f"{text!r} is not UTF-8: write it in UTF-8") from None
        raise UserError(f"this locale cannot read {text!r}: set LC_ALL=C.UTF-8")


def check_place(path: str) -> None:
    """As `check_utf8`, of where a path leads: the current folder may be odd."""
    # Other checks name a path that cannot exist.
    with contextlib.suppress(OSError, ValueError):
        place = os.path.realpath(path)
        if not os.path.isabs(path):
            try:
                check_utf8(os.getcwd())
            except UserError as error:
                words = f"the current folder: {error}, or go to another"
                raise UserError(words) from None
        check_utf8(place)


def _joined(words: list[str]) -> list[str]:
    """The words, with '--config.KNOB VALUE' written as '--config.KNOB=VALUE'."""
    joined, rest = [], iter(words)
    for word in rest:
        name = re.fullmatch(r"--?config\.(.+)", word)
        knob = KNOBS.get(name[1]) if name else None
        has_value = knob is not None and knob.type is not bool
        value = next(rest, None) if has_value else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def _last_of_each(words: list[str]) -> list[str]:
    """The words without --config.KNOB=VALUE where a later word sets the same knob.

    A list knob would otherwise get the values of both.
    """
    knobs = [re.match(r"--?config\.(.*?)=", word) for word in words]
    last = {knob[1]: place for place, knob in enumerate(knobs) if knob}
    return [
        word
        for place, (word, knob) in enumerate(zip(words, knobs, strict=True))
        if not knob or last[knob[1]] == place
    ]


def _expanded(name: str, path: str) -> str:
    """The path with ~ expanded, which the shell does not do after '='."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{name} is '{path}': there is no such home folder; write ./{path} if it "
            "is a name"
        )
    return expanded


def _plain_number(word: str) -> str:
    """Writes out a power of ten in the value of a whole number: 1e3 becomes 1000."""
    knob, equals, value = word.partition("=")
    path = re.sub(r"--?config\.", "", knob)
    is_short = re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d\d?", value)
    if path not in KNOBS or KNOBS[path].type is not int or not is_short:
        return word
    number = Decimal(value)
    is_whole = number == number.to_integral_value()
    return f"{knob}={int(number)}" if is_whole else word


def _take_config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    found, others = [], arguments[:1]
    # `pcagpt demo` is short for `pcagpt --config=demo`.
    first = "".join(arguments[1:2]).partition(":")[0]
    if _packaged(first) or (first.endswith(".py") and Path(first).is_file()):
        arguments = [arguments[0], f"--config={arguments[1]}", *arguments[2:]]
    words = iter(arguments[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            found.append(value if equals else next(words, ""))
        else:
            others.append(word)
    if len(found) > 1:
        raise UserError(f"--config is given twice, {' and '.join(found)}: give one")
    return (found[0] if found else None), others


def _packaged(name: str) -> Path | None:
    """The config of 'demo' or 'configs/demo.py', from any folder; None without one."""
    named = re.fullmatch(r"(\w+)|configs/(\w+)\.py", name)
    if not named:
        return None
    files = (folder / f"{named[1] or named[2]}.py" for folder in _CONFIGS)
    return next(filter(Path.is_file, files), None)


def _load(source: str) -> ConfigDict:
    """The result of get_config() in 'FILE' or 'FILE:ARGUMENT'."""
    path, *argument = source.split(":", 1)
    # A person's file comes first, if its name says that it is code.
    is_own = path.endswith(".py") and Path(path).is_file()
    path = str((None if is_own else _packaged(path)) or _expanded("--config", path))
    if not Path(path).is_file():
        own = sorted({p.stem for folder in _CONFIGS for p in folder.glob("*.py")})
        hint = f"give a file, or one of {', '.join(own)}"
        problem = "is not a file" if os.path.lexists(path) else "does not exist"
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
    """': did you mean X or Y?' for knobs of the same or a similar name, or ''."""
    ends = {path: path.split(".")[-1] for path in KNOBS}
    end = name.split(".")[-1]
    near = [path for path, names in _SYNONYMS.items() if end in names.split()]
    near += [path for path in KNOBS if ends[path] == end]
    if not near:
        near = difflib.get_close_matches(name, KNOBS, n=3, cutoff=0.7)
        ends_like = difflib.get_close_matches(end, ends.values(), n=1, cutoff=0.7)
        near += [path for path in KNOBS if ends[path] in ends_like]
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


def next_command(config: str, model: Path, **knobs: Any) -> str:
    """A line with the command that a person may want next, on a model.

    Leaves out `knobs`, by their paths, that say nothing: at their defaults, or as the
    config of `compress` sets them.
    """
    given = {"model_path": model, **knobs}
    words = [
        shlex.quote(override(name, value))
        for name, value in given.items()
        if str(value) != str(UNSET.get(name, KNOBS[name].default))
    ]
    called = f"python -m pcagpt.main --config=configs/{config}.py"
    return f"{config} it: {' '.join([called, *words])}"


def listing(settings: Settings) -> str:
    """The value of every knob, with its default if the two differ."""
    lines = []
    for path, value in settings.flat().items():
        default = KNOBS[path].default
        changed = "" if value == default else f"   (default {default!r})"
        lines.append(f"{path:<34} {value!r}{changed}")
    return "\n".join(lines)
