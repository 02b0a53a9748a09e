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

Any knob of the config can be set: --config.train.steps=2000. What is finished is
skipped, what was interrupted resumes.

  --print_config    show the resolved config and the plan, and stop
  --help            this text and every knob with its default
"""

import difflib
import json
import logging
import os
import shlex
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from pcagpt import config as knobs
from pcagpt import experiment, sharding
from pcagpt.corpus import describe_corpus
from pcagpt.errors import Interrupted, UserError
from pcagpt.evaluate_run import evaluate_run

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Show the resolved config and the plan, and stop."
)

PERSONS_MISTAKE = 2


def run(config: ConfigDict, command: str, print_only: bool) -> None:
    """Does what the config asks for."""
    knobs.validate(config)
    if config.distributed.enabled:
        sharding.start_processes(
            config.distributed.coordinator_address,
            config.distributed.num_processes,
            config.distributed.process_id,
        )
    if config.task == "evaluate":
        if print_only:
            print(config)
            return
        result = evaluate_run(config)
        print(json.dumps(result, indent=2))
        return
    plan = experiment.plan(config)
    if config.task != "factorize":
        corpus = describe_corpus(config.data.source, config.data.tokenizer)
        knobs.model_settings(config.model, corpus.vocab_size, "cpu")
    if print_only:
        print(config)
        print("\n".join(experiment.describe(plan, config.overwrite)))
        return
    experiment.execute(plan, config, command)


def parse(arguments: list[str]) -> list[str]:
    """absl's parsing of the command line, with errors of one line."""
    if any(argument in ("--help", "-h", "--helpfull") for argument in arguments[1:]):
        print(__doc__)
        print(knobs.base())
        sys.exit(0)
    try:
        rest = flags.FLAGS(arguments)
        if _CONFIG.value is None:
            raise UserError("no config: say --config=configs/demo.py (or --help)")
        _CONFIG.value.to_dict()  # A file that failed to load says so on first use.
        if rest[1:]:
            raise UserError(f"'{rest[1]}' is no flag: write --config.KNOB=VALUE")
        return rest
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(_explain_unreadable(error, arguments))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(_explain(error, arguments))


def _explain_unreadable(error: OSError, arguments: list[str]) -> str:
    """One line for a config file that cannot be loaded."""
    for argument in arguments[1:]:
        flag, _, value = argument.lstrip("-").partition("=")
        path = Path(value.split(":")[0])
        if flag == "config" and not path.is_file():
            known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
            return f"there is no config file {path}; here are: {known or 'none'}"
    return " ".join(str(error).split())


def _explain(error: Exception, arguments: list[str]) -> str:
    """One line for what absl or ml_collections made of a bad override."""
    known = _paths(knobs.base())
    for argument in arguments[1:]:
        name = argument.lstrip("-").split("=")[0].removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
            last = name.split(".")[-1]
            near += [k for k in known if k.split(".")[-1] == last and k not in near]
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            return f"there is no knob '{name}'{hint} (--help lists all)"
    return " ".join(str(error).split())


def _paths(config: ConfigDict, prefix: str = "") -> list[str]:
    paths = []
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            paths += _paths(value, f"{prefix}{name}.")
        else:
            paths.append(f"{prefix}{name}")
    return paths


def _fail(message: str) -> None:
    print(f"pcagpt: {message}", file=sys.stderr)
    sys.exit(PERSONS_MISTAKE)


def main(_: list[str]) -> None:
    """Runs, and turns the person's mistakes into one line and exit code 2."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("pcagpt").addHandler(logging.StreamHandler())
    logging.getLogger("pcagpt").propagate = False
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pcagpt"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache / "compilation"))
    command = shlex.join(["python", "-m", "pcagpt.main", *sys.argv[1:]])
    try:
        run(_CONFIG.value, command, _PRINT_CONFIG.value)
    except UserError as error:
        _fail(str(error))
    except Interrupted as error:
        print(f"pcagpt: {error}", file=sys.stderr)
        sys.exit(1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(
            "the device's memory is exhausted: lower train.batch_size or "
            "evaluate.batch_size, raise train.accumulation or train.loss_chunks, or "
            "lower model.block_size"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
