"""One training run in its folder: set up, started or resumed, trained, measured.

Start-up precedence: a checkpoint of the run itself, then what `init` imports, then
random weights.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pcagpt import trees
from pcagpt.config import model_settings
from pcagpt.data.batches import EvaluationBatches, TrainingBatches
from pcagpt.data.corpus import Corpus, text_counts
from pcagpt.data.tokenizer import tokenizer_sha256
from pcagpt.errors import Interrupted, UserError
from pcagpt.factorize import files as factor_files
from pcagpt.model import (
    GPT,
    GPTConfig,
    embedding_parameters,
    total_parameters,
    training_flops_per_token,
)
from pcagpt.run import evaluate, provenance
from pcagpt.run import folder as run_folder
from pcagpt.run import initialise as warm_start
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.opened import TrainedRun
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Progress, SilentProgress, Telemetry
from pcagpt.training import optim
from pcagpt.training.interrupt import StopRequest
from pcagpt.training.meter import Meter, Throughput, not_finite
from pcagpt.training.step import (
    StepSettings,
    Teacher,
    TrainState,
    initial_state,
    train_step,
)


@dataclasses.dataclass
class History:
    """What a run remembers across resumes, kept in each checkpoint."""

    best_val_loss: float = math.inf
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    seconds: float = 0.0  # in all, with compiling, evaluating and saving


class Training:
    """A run in its folder, from start-up to result.json."""

    def __init__(self, config: ConfigDict, record: dict, run_dir: Path, corpus: Corpus):
        """Checks all that can be checked before anything is written.

        Args:
          config: complete, with what is imported filled in.
          record: what config.json holds of it.
          run_dir: where the run's files go.
          corpus: with a training and a validation split.

        Raises:
          UserError: what was asked for does not fit the corpus, files or devices.
        """
        train, block_size = config.train, config.model.block_size
        if config.init.weights_from:
            TrainedRun.find(config.init.weights_from).check_corpus(corpus)
        self.config, self.record = config, record
        self.run_dir, self.corpus = run_dir, corpus
        self.mesh = placement.make_mesh(config.mesh.data, config.mesh.fsdp)
        placement.check_splits(config.model.n_embd, self.mesh)
        placement.check_divisible(
            "train.batch_size / train.accumulation",
            train.batch_size // train.accumulation,
            self.mesh,
        )
        placement.check_divisible(
            "evaluate.batch_size", config.evaluate.batch_size, self.mesh
        )
        settings = model_settings(config.model, corpus.vocab_size, placement.hardware())
        self.model = GPT(GPTConfig(**settings))
        self.teacher = self._trained_teacher()
        self.frozen = warm_start.frozen_patterns(config.init)
        names = {field.name for field in dataclasses.fields(optim.OptimizerConfig)}
        adamw = optim.OptimizerConfig(**{n: v for n, v in train.items() if n in names})
        self.optimizer = optim.optimizer(adamw, self.frozen)
        self.schedule = optim.learning_rate_schedule(adamw)
        self.batches = TrainingBatches(
            corpus.tokens("train"), block_size, train.batch_size, config.seed
        )
        self.validation = EvaluationBatches(
            corpus.tokens("val"), block_size, config.evaluate.batch_size
        )
        self.text_size = evaluate.TextSize.of(text_counts(corpus, "val"))
        self.score = evaluate.scorer(self.model, self.mesh, train.loss_chunks)
        self.tokens_per_step = train.batch_size * block_size
        self._check_imports()

    def _trained_teacher(self) -> tuple[GPT, dict] | None:
        """The model that `distill.teacher` names and its variables, on the host."""
        path, student = self.config.distill.teacher, self.model.config
        if not path:
            return None
        trained = TrainedRun.find(path)
        trained.check_corpus(self.corpus)
        config = trained.config(self.config.model, placement.hardware())
        if config.vocab_size != student.vocab_size:
            raise UserError(
                f"distill.teacher: {path} has {config.vocab_size} tokens, this model "
                f"{student.vocab_size}: both must have the same"
            )
        if config.block_size < student.block_size:
            raise UserError(
                f"distill.teacher: {path} reads {config.block_size} tokens at a time, "
                f"this model {student.block_size}: lower model.block_size"
            )
        return GPT(config), trained.variables(config)

    def _check_imports(self) -> None:
        """Imports into a stand-in: a file that does not fit then costs no run."""
        tokens_BT = jax.ShapeDtypeStruct((1, 1), np.int32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), tokens_BT)
        stand_in = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape),
            shapes,
        )
        self._import_into(stand_in)

    def _import_into(self, variables: dict) -> dict:
        """The variables with what `init` names put in."""
        init, params = self.config.init, variables["params"]
        if init.weights_from:
            return TrainedRun.find(init.weights_from).variables(self.model.config)
        imported = warm_start.replacements(
            init, self.model.config, params, self.config.seed
        )
        return variables | {"params": trees.replace(params, imported, source="init")}

    def run(self, label: str) -> dict:
        """Trains to the last step, resuming what is there; returns the result."""
        config, steps, began = self.config, self.config.train.steps, time.monotonic()
        with Checkpoints(self.run_dir, config.checkpoint.keep_last) as checkpoints:
            state, shardings, history = self.start(checkpoints)
            start = int(state.step)
            resumed_at = checkpoints.latest_step
            with (
                self.telemetry(resumed_at) as telemetry,
                self.progress(label, start) as progress,
                StopRequest() as stop,
            ):
                teacher = self.place_teacher(state)
                compiled_step = self.compile_step(state, shardings, teacher)
                meter = Meter(
                    telemetry,
                    progress,
                    Throughput(history.timed_tokens, history.timed_seconds),
                    self.tokens_per_step,
                    training_flops_per_token(self.model.config),
                    provenance.peak_flops(self.mesh.size),
                    config.telemetry.every,
                )
                seconds_before = history.seconds
                for step in range(start, steps + 1):
                    measured, is_best, stopping = None, False, stop.holds(step)
                    if step == steps or (
                        step % config.evaluate.every == 0 and step != resumed_at
                    ):
                        meter.flush()
                        measured = self.validate(state)
                        loss = measured.metrics["loss"]
                        if not math.isfinite(loss):
                            raise not_finite(step, f"validation loss {loss}")
                        is_best = loss < history.best_val_loss
                        history.best_val_loss = min(loss, history.best_val_loss)
                        if step != resumed_at:
                            tokens = step * self.tokens_per_step
                            telemetry.log(step, tokens, "val", measured.metrics)
                    due = step == steps or step % config.checkpoint.every == 0
                    if (due or is_best or stopping) and step != resumed_at:
                        meter.flush()
                        history.timed_tokens = meter.throughput.tokens
                        history.timed_seconds = meter.throughput.seconds
                        history.seconds = seconds_before + time.monotonic() - began
                        self.save(checkpoints, state, history, measured)
                    if step == steps:
                        break
                    if stopping:
                        checkpoints.wait()
                        raise Interrupted(
                            f"{self.run_dir.name} stopped at step {step} of {steps}, "
                            "saved: the same command goes on from there"
                        )
                    state, metrics = compiled_step(state, self.batch(step), teacher)
                    meter.hold(step + 1, metrics)
                checkpoints.wait()
                result = self.result(measured, history, compiled_step)
                telemetry.hyperparameters(_flat(config.to_dict()), _numbers(result))
        if jax.process_index() == 0:
            run_folder.write_result(self.run_dir, result, measured.window_losses)
        return result

    def start(self, checkpoints: Checkpoints) -> tuple[TrainState, Any, History]:
        """The state to go on from, on the mesh, with its shardings and history."""
        init = functools.partial(
            initial_state, self.model, self.optimizer, self.config.seed
        )
        shapes = jax.eval_shape(init)
        shardings = placement.shardings(shapes, self.mesh)
        template = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place
            ),
            shapes,
            shardings,
        )
        restored = checkpoints.restore_latest(
            template.variables, template.optimizer_item
        )
        if restored:
            variables, optimizer, meta, _ = restored
            state = TrainState.from_items(variables, optimizer)
            return state, shardings, History(**meta["history"])
        state = jax.jit(init, out_shardings=shardings)()
        variables = {"params": state.params, "constants": self.constants()}
        state = state.replace(**self._import_into(variables))
        return jax.device_put(state, shardings), shardings, History()

    def constants(self) -> dict:
        """For several bands, each token's position: as imported, or by count."""
        if len(self.model.config.bands) == 1:
            return {}
        bands, vocab_size = self.config.init.import_bands, self.model.config.vocab_size
        if bands:
            return warm_start.positions(factor_files.read_bands(bands).order)
        count_V = np.bincount(self.corpus.tokens("train"), minlength=vocab_size)
        return warm_start.positions(np.argsort(-count_V, kind="stable"))

    def place_teacher(self, state: TrainState) -> Teacher | None:
        """The teacher on the mesh, laid out for the state's order of tokens."""
        if self.teacher is None:
            return None
        order = trees.flatten(state.constants).get("embed/position_of_token")
        if order is None:
            order = np.arange(self.model.config.vocab_size)
        bands = self.model.config.bands
        teacher = Teacher.laid_out(*self.teacher, bands, np.asarray(order))
        return jax.device_put(teacher, placement.shardings(teacher, self.mesh))

    def compile_step(self, state: TrainState, shardings, teacher: Teacher | None):
        """The step compiled for this mesh and batch; it consumes the state it is given.

        Raises jax.errors.JaxRuntimeError when the device's memory does not suffice.
        """
        step = functools.partial(
            train_step,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            settings=StepSettings(
                self.config.seed,
                self.frozen,
                self.config.train.loss_chunks,
                self.config.distill.share,
            ),
        )
        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, placement.replicated(self.mesh)),
        )
        with jax.set_mesh(self.mesh):  # For `layout`, which splits rows over it.
            lowered = jitted.lower(state, self.batch(0), teacher)
            return lowered.compile(compiler_options=placement.COMPILER_OPTIONS)

    def batch(self, step: int) -> jax.Array:
        """The batch of a step, on the devices: [A, B, T + 1] int32."""
        parts = self.config.train.accumulation
        tokens_BT = self.batches.batch_at(step)
        tokens_ABT = tokens_BT.reshape(parts, -1, tokens_BT.shape[-1])
        return placement.put_batch(tokens_ABT, placement.part_sharding(self.mesh))

    def validate(self, state: TrainState) -> evaluate.Evaluation:
        """Loss over the whole validation split."""
        return evaluate.evaluate(
            self.score,
            state.variables,
            self.validation,
            self.validation.window_count,
            placement.batch_sharding(self.mesh),
            self.text_size,
        )

    def save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        history: History,
        measured: evaluate.Evaluation | None,
    ) -> None:
        """Starts a checkpoint, with its validation loss if it was measured."""
        checkpoints.save(
            int(state.step),
            state.variables,
            state.optimizer_item,
            {"history": dataclasses.asdict(history), "config": self.record},
            measured.metrics["loss"] if measured else None,
        )

    def progress(self, label: str, start: int) -> Progress:
        """The run's bar; silent on every process but the first."""
        if jax.process_index():
            return SilentProgress()
        return Progress(label, total=self.config.train.steps, start=start)

    def telemetry(self, resumed_at: int | None) -> Telemetry:
        """The run's record; silent on every process but the first."""
        if jax.process_index():
            return Telemetry.silent()
        config, plain = self.config.telemetry, self.config.to_dict()
        telemetry = Telemetry(
            self.run_dir,
            config=plain,
            run_name=self.run_dir.name,
            resume_step=resumed_at,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            wandb_project=config.wandb_project,
        )
        lines = [f"| {name} | {value} |" for name, value in _flat(plain).items()]
        table = "\n".join(["| knob | value |", "|---|---|", *lines])
        telemetry.text("config", table)
        return telemetry

    def _rank(self) -> int | None:
        """Of the table, or whose size it has in imported bands; None of others."""
        is_sized = self.config.init.import_bands or not self.model.config.band_sizes
        return self.model.config.n_embd_wte if is_sized else None

    def result(
        self, measured: evaluate.Evaluation, history: History, compiled_step
    ) -> dict:
        """What result.json holds; README.md explains each field."""
        config, model = self.config, self.model.config
        full = dataclasses.replace(model, n_embd_wte=None, band_sizes=(), band_ranks=())
        metrics = dict(measured.metrics)
        tokens_predicted = metrics.pop("tokens_predicted")
        tokenizer = self.corpus.tokenizer
        memory = compiled_step.memory_analysis()
        return {
            "run": self.run_dir.name,
            "arm": config.arm,
            "rank": self._rank(),
            "band_sizes": model.band_sizes,
            "band_ranks": [rank or 0 for rank in model.band_ranks],
            "seed": config.seed,
            "status": "done",
            "steps": config.train.steps,
            "tokens_seen": config.train.steps * self.tokens_per_step,
            "val_loss": metrics.pop("loss"),
            "best_val_loss": history.best_val_loss,
            **metrics,
            "params_total": total_parameters(model),
            "params_embedding": embedding_parameters(model),
            "compression_embedding": (
                embedding_parameters(full) / embedding_parameters(model)
            ),
            "compression_total": total_parameters(full) / total_parameters(model),
            "tokens_per_second": (
                history.timed_tokens / history.timed_seconds
                if history.timed_seconds
                else None
            ),
            "seconds": history.seconds,
            "peak_bytes": (
                memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
            ),
            "device": provenance.device(self.mesh.size),
            "versions": provenance.versions(),
            "config_sha256": run_folder.config_sha256(self.record),
            "git_commit": provenance.git_commit(),
            "protocol": {
                "split": "val",
                "window": config.model.block_size,
                "stride": config.model.block_size,
                "windows": self.validation.window_count,
                "tokens_predicted": tokens_predicted,
                "corpus": self.corpus.name,
                "tokenizer": tokenizer,
                "tokenizer_sha256": tokenizer and tokenizer_sha256(tokenizer),
            },
        }


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _numbers(result: dict) -> dict[str, float]:
    return {k: v for k, v in result.items() if isinstance(v, (int, float))}
