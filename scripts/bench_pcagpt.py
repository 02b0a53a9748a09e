"""What scripts/bench.py measures of pcagpt: the step, the loop around it, decoding."""

import dataclasses
import functools
import json
import math
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from pcagpt import config as knobs
from pcagpt.model import GPTConfig, training_flops_per_token
from pcagpt.pipeline.plan import make_plan
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.generate import generate, in_compute_dtype, places
from pcagpt.telemetry.record import SilentProgress
from pcagpt.training.loop import Training

WARM_STEPS = 5
PROFILED_STEPS = 5
LEAST_RUN = 6  # steps: a training run times none before a save, and none after
SHOWN_KERNELS = 25
NO_WORK = ("ThunkExecutor", "SlinkyThreadPool", "end: ")  # of threads on CPUs


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the models and the corpus; `rank` is what the second model's table has."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    rank: int
    batch: int
    corpus_tokens: int
    prompt_tokens: int
    decoded_tokens: int


GPT2_SMALL = Size(50257, 1024, 12, 12, 768, 128, 32, 4_000_000, 256, 200)
QUICK = Size(4096, 128, 4, 4, 128, 32, 16, 200_000, 64, 32)


def models(size: Size) -> tuple[str, str]:
    """Their names: D, and as in k128."""
    return "D", f"k{size.rank}"


def rank_of(model: str) -> int | None:
    """Of the model's table; None for the full one."""
    return None if model == "D" else int(model.removeprefix("k"))


def exchanged_bytes(program: str, devices: int) -> dict[str, float]:
    """Bytes that each device receives in a compiled step, by the kind of exchange.

    As in a ring of all devices; what is in a loop is counted once.
    """
    others = devices - 1
    received = {  # of each byte of the result
        "all-reduce": 2 * others / devices,
        "reduce-scatter": others,
        "all-gather": others / devices,
        "all-to-all": others / devices,
        "collective-permute": 1,
    }
    found = Counter()
    for results, kind in re.findall(
        rf"= (.*) ({'|'.join(received)})(?:-done)?\(", program
    ):
        for bits, axes in re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", results):
            count = math.prod(map(int, axes.split(","))) if axes else 1
            size = count * int(bits or 8) / 8  # pred has no number
            found[kind] += size * received[kind]
    return dict(found)


def flops_per_token(size: Size, model: str) -> float:
    """Of training, whoever does it."""
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    sizes = {name: getattr(size, name) for name in names}
    return training_flops_per_token(GPTConfig(**sizes, n_embd_wte=rank_of(model)))


def write_corpus(folder: Path, size: Size) -> None:
    """Random tokens about as frequent as those of text, as a folder of token files.

    By Zipf's law, shifted as Mandelbrot has it: the first takes 5 % of all, the first
    hundred 40 %; the lookup's gradient meets as many equal tokens as in training.
    """
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(2, size.vocab_size + 2)
    frequency /= frequency.sum()
    validation = size.block_size * 16 + 1
    for split, count in (("train", size.corpus_tokens), ("val", validation)):
        tokens = random.choice(size.vocab_size, count, p=frequency)
        tokens.astype(np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": size.vocab_size}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")


def training(size: Size, model: str, batch: int, folder: Path, **overrides):
    """A run with the default knobs, not begun."""
    config = knobs.base()
    config.arm = "baseline" if model == "D" else "random"
    config.data.source = str(folder)
    config.workdir = tempfile.mkdtemp(dir=folder)
    for name in ("block_size", "n_layer", "n_head", "n_embd"):
        config.model[name] = getattr(size, name)
    config.model.n_embd_wte = rank_of(model)
    config.train.batch_size = batch
    config.mesh.data = 1
    config.update_from_flattened_dict(overrides)
    job = make_plan(config).jobs[-1]
    return Training(job.settled(), job.record(), job.folder, job.corpus())


class System:
    """One model that takes turns with others.

    devices: that it runs on; batch: sequences of each; seconds_per_step: measures so
    many steps; tokens_per_step: that one step takes in, or that decoding puts out;
    peak_bytes: of one device; details: further figures; rests: whether a GPU cools down
    before its turn.
    """

    name: str
    devices = 1
    rests = True

    def __init__(self, size: Size, model: str, batch: int, folder: Path):
        self.size, self.model, self.batch, self.folder = size, model, batch, folder
        self.tokens_per_step = batch * self.devices * size.block_size
        self.flops_per_token = flops_per_token(size, model)
        self.peak_bytes, self.details = None, {}
        self.prepare()


class Step(System):
    """The compiled training step on one batch that stays on the device."""

    name = "pcagpt"

    def mesh(self) -> dict[str, int]:
        """The knobs that lay the step out over the devices."""
        return {"mesh.data": 1}

    def prepare(self) -> None:
        """Compiles it."""
        batch = self.batch * self.devices
        run = training(self.size, self.model, batch, self.folder, **self.mesh())
        with Checkpoints(run.run_dir, keep_last=1) as checkpoints:
            self.state, shardings, _ = run.start(checkpoints)
        self.step = run.compile_step(self.state, shardings, None)
        self.tokens = run.batch(0)
        memory = self.step.memory_analysis()
        self.peak_bytes = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        self.details = {"temporary_bytes": memory.temp_size_in_bytes}

    def go(self, steps: int) -> None:
        """So many steps, one dispatched after the other."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.tokens, None)
        jax.block_until_ready(metrics)

    def seconds_per_step(self, steps: int) -> float:
        """Of so many steps, after a few that are not timed."""
        self.go(WARM_STEPS)
        start = time.perf_counter()
        self.go(steps)
        return (time.perf_counter() - start) / steps


class DataParallel(Step):
    """The step on all devices, each with a whole model and rows of its own."""

    name = "data-parallel"

    devices = property(lambda self: jax.device_count())

    def prepare(self) -> None:
        """As of one device; says also what the devices exchange."""
        super().prepare()
        exchanged = exchanged_bytes(self.step.as_text(), self.devices)
        self.details["exchanged_bytes"] = exchanged

    def mesh(self) -> dict[str, int]:
        """The batch alone is split."""
        return {"mesh.data": self.devices}


class FullySharded(DataParallel):
    """The step on all devices, each with a share of parameters and moments, too."""

    name = "fsdp"

    def mesh(self) -> dict[str, int]:
        """Batch and matrices are split."""
        return {"mesh.data": 1, "mesh.fsdp": self.devices}


class Loop(System):
    """A whole training run, as `python -m pcagpt.main` makes it.

    Each round is a new run. A checkpoint's stall is shared out over the steps that lie
    between two by default. Compiling and evaluating do not count, nor does the first
    step after a pause.
    """

    name = "pcagpt-loop"
    rests = False  # It begins with seconds in which a GPU has little to do.

    def prepare(self) -> None:
        """Nothing: each round starts from the beginning."""
        self.details = {"checkpoint_ms": []}

    def seconds_per_step(self, steps: int) -> float:
        """Of a run of so many steps that saves half way and at its end."""
        run = training(
            self.size,
            self.model,
            self.batch,
            self.folder,
            **{
                "train.steps": steps,
                "train.warmup_steps": 2,
                "evaluate.every": steps,
                "checkpoint.every": steps // 2,
            },
        )
        stalls = []

        def timed_save(*arguments):
            start = time.perf_counter()
            type(run).save(run, *arguments)
            stalls.append(time.perf_counter() - start)

        run.save = timed_save
        run.progress = lambda *_: SilentProgress()
        run.run_dir.mkdir(parents=True)
        try:
            result = run.run("bench")
        finally:
            shutil.rmtree(run.run_dir.parent)
        self.peak_bytes = result["peak_bytes"]
        # The first save is of the start: nothing else waits for it.
        stall = max(stalls[1:])
        self.details["checkpoint_ms"].append(1e3 * stall)
        step = self.tokens_per_step / result["tokens_per_second"]
        return step + stall / knobs.KNOBS["checkpoint.every"].default


class Decoding(System):
    """Greedy generation of tokens, as the task 'sample' does it, beyond the first."""

    name = "decode"
    rests = False  # No GPU gets hot from it.

    def prepare(self) -> None:
        """Makes up weights and begins to decode."""
        self.gpt = training(self.size, self.model, self.batch, self.folder).model
        size = self.size
        known = size.prompt_tokens + WARM_STEPS + size.decoded_tokens  # after a round
        shape = self.batch, places(known, size.block_size)
        tokens_BT = jax.ShapeDtypeStruct(shape, np.int32)
        shapes = jax.eval_shape(self.gpt.init, jax.random.key(0), tokens_BT)
        random = np.random.default_rng(0)
        weights = jax.tree.map(
            lambda leaf: 0.02 * random.standard_normal(leaf.shape, leaf.dtype), shapes
        )
        # As they are decoded with, so that no second copy is made.
        self.variables = jax.device_put(in_compute_dtype(weights, self.gpt))
        self.begin()
        read = functools.partial(self.gpt.apply, method="hidden", mutable="cache")
        kept = self.variables, jax.eval_shape(read, self.variables, tokens_BT)[1]
        leaves = jax.tree.leaves(kept)
        self.peak_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        self.tokens_per_step, self.flops_per_token = self.batch, None
        self.details = {"steps": self.size.decoded_tokens}

    def begin(self) -> None:
        """Reads the prompt and decodes a few tokens, which may take compiling."""
        prompt = np.ones(self.size.prompt_tokens, np.int32)
        self.drawn = generate(
            self.gpt, self.variables, prompt, self.batch, seed=0, temperature=0
        )
        for _ in range(WARM_STEPS):
            jax.block_until_ready(next(self.drawn))

    def seconds_per_step(self, steps: int) -> float:
        """Of the tokens behind the prompt, as many as the size says."""
        del steps
        self.begin()
        start = time.perf_counter()
        for _ in range(self.size.decoded_tokens):
            tokens_B = next(self.drawn)
        jax.block_until_ready(tokens_B)
        return (time.perf_counter() - start) / self.size.decoded_tokens


def profile(system: Step) -> str:
    """The kernels of the training step that take most of its time, for people."""
    system.go(WARM_STEPS)
    with tempfile.TemporaryDirectory() as trace:
        with jax.profiler.trace(trace):
            system.go(PROFILED_STEPS)
        found = next(Path(trace).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(found))
    nanoseconds, calls = Counter(), Counter()
    for plane in data.planes:
        for line in plane.lines:
            is_kernels = "GPU" in plane.name and line.name.startswith("Stream")
            is_cpu_work = line.name.startswith(("tf_XLAEigen", "tf_XLAPjRtCpu"))
            if is_kernels or is_cpu_work:
                for event in line.events:
                    if event.name.startswith(NO_WORK):
                        continue
                    name = event.name.rstrip("0123456789").rstrip("._")
                    nanoseconds[name] += event.duration_ns
                    calls[name] += 1
    total = sum(nanoseconds.values())
    of_what = f"{system.model}, batch {system.batch}"
    if not total:
        return f"{of_what}: the profiler saw no kernels"
    threads = "" if jax.default_backend() == "gpu" else " of all threads together"
    lines = [f"{of_what}: {total / PROFILED_STEPS / 1e6:.2f} ms a step{threads}"]
    lines += [
        f"{ns / PROFILED_STEPS / 1e6:9.3f} ms {ns / total:6.1%} "
        f"{calls[name] / PROFILED_STEPS:7.0f} x  {name[:90]}"
        for name, ns in nanoseconds.most_common(SHOWN_KERNELS)
    ]
    return "\n".join(lines)
