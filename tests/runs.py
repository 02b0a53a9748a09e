"""Tiny runs for tests: made quickly, compared, and looked into."""

import contextlib
import dataclasses
import json
import os
import signal
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from pcagpt.config import KNOBS, Settings, override
from pcagpt.config.schema import ModelSettings
from pcagpt.config.tasks import RECOVERY, readers_of
from pcagpt.config.unread import read_if
from pcagpt.factorization import Statistics
from pcagpt.model import GPTConfig
from pcagpt.pipeline import execute as pipeline
from pcagpt.pipeline.job import Job
from pcagpt.pipeline.plan import Plan, make_plan
from pcagpt.run import calibrate
from pcagpt.run.checkpoint import FOLDER, Checkpoints, steps
from pcagpt.training import loop
from pcagpt.training.setup import Setup
from pcagpt.training.step import TrainState

BANDS = {"model.band_sizes": (10, 40, 47), "model.band_ranks": (0, 8, 4)}
TIMINGS = {"seconds", "tokens_per_second", "flop_utilisation"}


@contextlib.contextmanager
def quick_compiles(cache: Path) -> Iterator[None]:
    """Within, XLA hardly optimizes, and a program compiled before is read back."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def quick_environment(cache: Path | None = None) -> dict[str, str]:
    """For a process of its own that compiles as within `quick_compiles`."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}),
    }


def gpt_config(**values: Any) -> GPTConfig:
    """GPT-2 small in float32 without kernels, with some values set."""
    plain = {"compute_dtype": "float32", "attention": "xla", "kernels": "xla"}
    known = plain | {"vocab_size": 50257, "n_embd_wte": 0} | values
    return GPTConfig(**dataclasses.asdict(ModelSettings()) | known)


def changed(config: ConfigDict, **overrides: Any) -> ConfigDict:
    """A copy with some knobs set: changed(config, **{'train.steps': 3})."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(overrides)
    return copy


def plan(config: ConfigDict) -> Plan:
    """What a config asks for."""
    return make_plan(Settings.of(config))


def overrides(config: ConfigDict) -> list[str]:
    """The arguments that set a config's knobs, those that its task reads."""
    settings = Settings.of(config)
    reads = {config.task} | ({RECOVERY} if config.compress.recover_ranks else set())
    unread = {path for path, is_read, _ in read_if(settings, reads) if not is_read}
    return [
        override(path, value)
        for path, value in settings.flat().items()
        if value != KNOBS[path].default
        and reads & set(readers_of(path)[0])
        and path not in unread
    ]


def job(config: ConfigDict) -> Job:
    """The last job that a config asks for."""
    return plan(config).jobs[-1]


def json_of(path: Path) -> dict[str, Any]:
    """The content of a JSON file that pcagpt wrote, without its seal."""
    content = json.loads(path.read_text())
    del content["sha256"]
    return content


def described(config: ConfigDict, writes: bool = True) -> list[str]:
    """A line for each job that is needed, as the program prints it."""
    return pipeline.describe(pipeline.check(plan(config), writes))


def execute(config: ConfigDict) -> Path:
    """Does what the config asks for; returns the folder of the last job."""
    pipeline.execute(plan(config), "a command")
    return job(config).folder


def setup(config: ConfigDict) -> Setup:
    """What the run of a 'train' config trains with."""
    asked = job(config)
    return Setup.of(asked.settings, asked.corpus())


def start(setup: Setup, run_dir: Path) -> tuple[TrainState, Any]:
    """The state that a run in this folder starts from, with its shardings."""
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        state, shardings, _ = loop.start(setup, checkpoints)
    return state, shardings


def losses(config: ConfigDict, steps: int) -> list[float]:
    """The loss of a new run's first steps."""
    made = setup(config)
    state, shardings = start(made, job(config).folder)
    teacher = loop.place_teacher(made, state)
    step = loop.compile_step(made, state, shardings, teacher)
    found = []
    for number in range(steps):
        state, metrics = step(state, made.batch(number), teacher)
        found.append(float(metrics["loss"]))
    return found


def saved_state(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of a run's newest checkpoint, optimizer state and step too."""
    folder = (run_dir / FOLDER / str(max(steps(run_dir)))).absolute()
    found = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("weights", "optimizer"):
            saved = checkpointer.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), saved)
            tree = checkpointer.restore(
                folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[item + jax.tree_util.keystr(path)] = leaf
    return found


def assert_equal(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]):
    """Asserts that the arrays are the same bit for bit."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without timings."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_timings(json.loads(line)) for line in lines]


def without_timings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that two runs of one config share, at any commit."""
    left_out = TIMINGS | {"git_commit", "run_id"}
    return {name: v for name, v in values.items() if name not in left_out}


HPARAMS = "_hparams_/"


def shown(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """What TensorBoard shows of a folder: {(tag, step): its values, ideally one}.

    A file that begins at a step replaces what older files have from there on. But of
    the columns and rows of HPARAMS, which are metadata of a tag, the first ones stay.
    """
    found: dict[tuple[str, int], list[Any]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, bytes, their checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found = {
                    key: values
                    for key, values in found.items()
                    if key[1] < event.step or key[0].startswith(HPARAMS)
                }
            for value in event.summary.value:
                is_known = any(tag == value.tag for tag, _ in found)
                if not (is_known and value.tag.startswith(HPARAMS)):
                    found.setdefault((value.tag, event.step), []).append(value)
    return found


def snapshot(folder: Path) -> dict[str, int]:
    """{file: time of its last change}, to see that nothing was written.

    .pcagpt-content.json does not count: it may appear whenever tokens are read.
    """
    return {
        str(path.relative_to(folder)): path.is_file() and path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name != ".pcagpt-content.json"
    }


def signal_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal when training asks for the batch of a step."""
    batch = Setup.batch

    def batch_and_signal(self, asked):
        # Compilation also asks for batch 0.
        if asked == step:
            os.kill(os.getpid(), number)
        return batch(self, asked)

    monkeypatch.setattr(Setup, "batch", batch_and_signal)


def write_statistics(
    path: Path, vocab_size: int, width: int, seed: int = 0, **protocol: str
) -> None:
    """A file of statistics of no model in particular, unless `protocol` names one."""
    random = np.random.default_rng(seed)
    spread = random.normal(size=(2 * width, width))
    moment = spread.T @ spread / width
    found = Statistics(
        frequency=random.dirichlet(np.ones(vocab_size)),
        probability=random.dirichlet(np.ones(vocab_size)),
        hidden_mean=random.normal(size=width),
        hidden_moment=moment,
        gradient_moment=moment,
        context_moment=random.normal(size=(width, width)),
    )
    calibrate.write(path, found, protocol)
