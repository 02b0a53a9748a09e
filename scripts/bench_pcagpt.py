"""The pcagpt systems of scripts/bench.py: step, training run and decoding."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from pcagpt.config import Settings
from pcagpt.config.schema import ModelSettings
from pcagpt.data.corpus import open_corpus
from pcagpt.model import GPT, GPTConfig, training_flops_per_token
from pcagpt.model.config import BLOCK_RANK, WIDTHS
from pcagpt.run.build import build_config
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.generate import cache_capacity, generate, in_compute_dtype
from pcagpt.training import loop
from pcagpt.training.setup import Setup

WARM_STEPS = 5
PROFILED_STEPS = 5
SHOWN_KERNELS = 25
MIN_STEPS = 6  # A training run does not time the steps after a save or at its end.
NO_WORK = ("ThunkExecutor", "SlinkyThreadPool", "end: ")  # idle threads on CPUs


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the models and the corpus; `rank` is that of the second model.

    bands: (rows, rank) of the bands of the third; rank 0 stands for full width.
    """

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
    bands: tuple[tuple[int, int], ...]


# Of 12 bands at k128's size, compressing GPT-2 small merged those of about one rank.
GPT2_SMALL_BANDS = ((723, 0), (602, 302), (1103, 297), (2065, 259))
GPT2_SMALL_BANDS += ((4313, 210), (9039, 149), (16870, 84), (15542, 13))
GPT2_SMALL = Size(
    50257, 1024, 12, 12, 768, 128, 32, 4_000_000, 256, 200, GPT2_SMALL_BANDS
)
QUICK_BANDS = (56, 0), (200, 64), (840, 48), (3000, 16)
QUICK = Size(4096, 128, 4, 4, 128, 32, 16, 200_000, 64, 32, QUICK_BANDS)
THIRD = {"pcagpt": ["bands"], "decode": ["packed"]}
MODEL_SIZES = ("block_size", "n_layer", "n_head", "n_embd")


def models(size: Size, system: str = "pcagpt") -> list[str]:
    """The models of a system: D, for example k128, and for some a third."""
    return ["D", f"k{size.rank}", *THIRD.get(system, ())]


def rank_of(model: str) -> int | None:
    """Rank of a model's table; None if it has none."""
    return int(model[1:]) if model.startswith("k") else None


def model_knobs(size: Size, model: str) -> dict:
    """The knobs of a model; a packed table has codes of 4 bits for all directions."""
    knobs = {name: getattr(size, name) for name in MODEL_SIZES}
    knobs["n_embd_wte"] = rank_of(model)
    if model == "bands":
        knobs["band_sizes"], knobs["band_ranks"] = zip(*size.bands, strict=True)
    if model == "packed":
        blocks = [size.n_embd // BLOCK_RANK * (bits == 4) for bits in WIDTHS]
        knobs |= {"band_sizes": (size.vocab_size,), "band_ranks": (0,)}
        knobs["band_blocks"] = tuple(blocks)
    return knobs


def config_of(size: Size, model: str) -> GPTConfig:
    """The config of a model."""
    return build_config(ModelSettings(**model_knobs(size, model)), size.vocab_size)


def flops_per_token(size: Size, model: str) -> float:
    """FLOPs per trained token, the same for pcagpt and PyTorch."""
    return training_flops_per_token(config_of(size, model))


def write_corpus(folder: Path, size: Size) -> None:
    """Writes random tokens as .bin files, about as frequent as the tokens of a text.

    The frequencies follow Zipf's law, shifted as Mandelbrot proposed: the first token
    takes 5 %, the first hundred 40 %. A batch then has about as many equal tokens as in
    training, which matters for the gradient of the lookup.
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


# All calls of pcagpt's training code are in this section.


def setup(size: Size, model: str, batch: int, folder: Path, **knobs) -> Setup:
    """The setup of a run with the default knobs at this size, on one device."""
    names = {f"model.{n}": knob for n, knob in model_knobs(size, model).items()}
    settings = Settings().replace(
        {
            **names,
            "train.batch_size": batch,
            "mesh.data": 1,
            **knobs,
        }
    )
    return Setup.of(settings, open_corpus(str(folder), folder))


def compiled_step(run: Setup) -> tuple:
    """The compiled training step, its first state and its first batch."""
    with (
        tempfile.TemporaryDirectory() as run_dir,
        Checkpoints(Path(run_dir), keep_last=1) as checkpoints,
    ):
        state, shardings, _ = loop.start(run, checkpoints)
    return loop.compile_step(run, state, shardings, None), state, run.batch(0)


def train(run: Setup) -> tuple[dict, list[float]]:
    """Trains a whole run; returns its result and the seconds that each save took."""
    waited, save = [], Checkpoints.save

    def timed_save(*arguments):
        start = time.perf_counter()
        save(*arguments)
        waited.append(time.perf_counter() - start)

    with (
        contextlib.redirect_stderr(io.StringIO()),  # The progress of the run.
        tempfile.TemporaryDirectory() as run_dir,
        mock.patch.object(Checkpoints, "save", timed_save),
    ):
        return loop.train(
            run,
            Path(run_dir),
            record={"run_id": "bench"},
            label="bench",
            check_lock=lambda: None,
            check_place=lambda: None,
        ), waited


class System:
    """One model that takes turns with others.

    devices: number of devices that it runs on. batch: sequences on each device.
    tokens_per_step: tokens that a step trains on or decodes. peak_bytes: memory of one
    device. details: further figures. rests: whether a GPU rests before its turn.
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

    def prepare(self) -> None:
        """Compiles what is measured."""

    def seconds_per_step(self, steps: int) -> float:
        """Measures one turn of this many steps."""
        raise NotImplementedError


class Step(System):
    """The compiled training step, on one batch that stays on the device."""

    name = "pcagpt"

    def mesh(self) -> dict[str, int]:
        """The knobs that split the batch over the devices."""
        return {"mesh.data": self.devices}

    def prepare(self) -> None:
        """Compiles the step and asks XLA for its memory."""
        batch = self.batch * self.devices
        run = setup(self.size, self.model, batch, self.folder, **self.mesh())
        start = time.perf_counter()
        self.step, self.state, self.tokens = compiled_step(run)
        self.details = {
            "seconds_until_compiled": time.perf_counter() - start,
            "temporary_bytes": self.step.memory_analysis().temp_size_in_bytes,
        }
        self.peak_bytes = loop.peak_bytes(self.step)

    def go(self, steps: int) -> None:
        """Dispatches the steps one after the other and waits for the last."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.tokens, None)
        jax.block_until_ready(metrics)

    def seconds_per_step(self, steps: int) -> float:
        """Mean over the steps, after a few that are not timed."""
        self.go(WARM_STEPS)
        start = time.perf_counter()
        self.go(steps)
        return (time.perf_counter() - start) / steps


class DataParallel(Step):
    """The step on all devices: each holds the whole model and its own sequences."""

    name = "data-parallel"

    devices = property(lambda self: jax.device_count())

    def prepare(self) -> None:
        """Also counts the bytes that the devices exchange."""
        super().prepare()
        exchanged = exchanged_bytes(self.step.as_text(), self.devices)
        self.details["exchanged_bytes"] = exchanged


class FullySharded(DataParallel):
    """The step on all devices: parameters and optimizer state are split as well."""

    name = "fsdp"

    def mesh(self) -> dict[str, int]:
        """Splits batch and parameters."""
        return {"mesh.data": 1, "mesh.fsdp": self.devices}


class Loop(System):
    """A whole training run per turn.

    Each step counts its share of a save. Compiling, evaluating and the first step after
    a pause are not counted.
    """

    name = "pcagpt-loop"
    rests = False  # The GPU has little to do while a run starts.

    def prepare(self) -> None:
        """Compiles nothing, because each turn trains a new run."""
        self.details = {"checkpoint_ms": []}

    def seconds_per_step(self, steps: int) -> float:
        """Trains a run of this many steps, which saves halfway and at its end."""
        knobs = {
            "train.steps": steps,
            "train.warmup_steps": 2,
            "evaluate.every": steps,
            "checkpoint.every": steps // 2,
        }
        run = setup(self.size, self.model, self.batch, self.folder, **knobs)
        result, waited = train(run)
        self.peak_bytes = result["peak_bytes"]
        self.details["checkpoint_ms"].append(1e3 * max(waited))
        step = self.tokens_per_step / result["tokens_per_second"]
        return step + max(waited) / Settings().checkpoint.every


class Decoding(System):
    """Greedy decoding as in the task `sample`, after the first token."""

    name = "decode"
    rests = False  # Decoding does not heat a GPU.

    def prepare(self) -> None:
        """Makes random weights and decodes once, which compiles."""
        size = self.size
        self.gpt = GPT(config_of(size, self.model))
        tokens_of_a_turn = size.prompt_tokens + size.decoded_tokens + 1
        shape = self.batch, cache_capacity(tokens_of_a_turn, size.block_size)
        tokens_BT = jax.ShapeDtypeStruct(shape, np.int32)
        shapes = jax.eval_shape(self.gpt.init, jax.random.key(0), tokens_BT)
        random = np.random.default_rng(0)
        weights = jax.tree.map(  # Whole numbers, such as codes, are 0.
            lambda leaf: np.array(
                0.02 * random.standard_normal(leaf.shape, np.float32), leaf.dtype
            ),
            shapes,
        )
        # `generate` uses this dtype, so it makes no second copy.
        self.variables = jax.device_put(in_compute_dtype(weights, self.gpt))
        self._seconds()
        read = functools.partial(self.gpt.apply, method="hidden", mutable="cache")
        kept = self.variables, jax.eval_shape(read, self.variables, tokens_BT)[1]
        leaves = jax.tree.leaves(kept)
        self.peak_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        self.tokens_per_step, self.flops_per_token = self.batch, None
        self.details = {"steps": size.decoded_tokens}

    def seconds_per_step(self, steps: int) -> float:
        """Mean over the decoded tokens; `Size` gives their number."""
        del steps
        self._seconds()  # A turn is short, so the GPU must not wake in it.
        return self._seconds() / self.size.decoded_tokens

    def _seconds(self) -> float:
        prompt, count = np.ones(self.size.prompt_tokens, np.int32), self.batch
        drawn = generate(
            *(self.gpt, self.variables, prompt, count),
            seed=0,
            temperature=0,
            limit=self.size.decoded_tokens + 1,
        )
        next(drawn)  # Reads the prompt.
        start = time.perf_counter()
        for _ in drawn:
            pass
        return time.perf_counter() - start


def exchanged_bytes(program: str, devices: int) -> dict[str, float]:
    """Bytes that each device receives in a compiled step, per kind of exchange.

    Assumes a ring of all devices. Counts an exchange in a loop only once.
    """
    others = devices - 1
    received = {  # per byte of the result
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
            size = count * int(bits or 8) / 8  # The dtype pred has no number.
            found[kind] += size * received[kind]
    return dict(found)


def profile(system: Step) -> str:
    """The kernels that take most of a training step, as text."""
    system.go(WARM_STEPS)
    with tempfile.TemporaryDirectory() as trace:
        with jax.profiler.trace(trace):
            system.go(PROFILED_STEPS)
        found = next(Path(trace).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(found))
    nanoseconds, calls = Counter(), Counter()
    for plane in data.planes:
        for line in plane.lines:
            on_gpu = "GPU" in plane.name and line.name.startswith("Stream")
            if not on_gpu and not line.name.startswith(
                ("tf_XLAEigen", "tf_XLAPjRtCpu")
            ):
                continue
            for event in line.events:
                if not event.name.startswith(NO_WORK):
                    name = event.name.rstrip("0123456789").rstrip("._")
                    nanoseconds[name] += event.duration_ns
                    calls[name] += 1
    total = sum(nanoseconds.values())
    title = f"{system.model}, batch {system.batch}"
    if not total:
        return f"{title}: the profiler saw no kernels"
    threads = "" if jax.default_backend() == "gpu" else ", summed over all threads"
    lines = [f"{title}: {total / PROFILED_STEPS / 1e6:.2f} ms per step{threads}"]
    for name, ns in nanoseconds.most_common(SHOWN_KERNELS):
        lines.append(
            f"{ns / PROFILED_STEPS / 1e6:9.3f} ms {ns / total:6.1%} "
            f"{calls[name] / PROFILED_STEPS:7.0f} x  {name[:90]}"
        )
    return "\n".join(lines)
