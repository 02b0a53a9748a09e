"""Trains a run in its folder, from its start or its newest checkpoint to its result."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt.errors import Interrupted, UserError
from pcagpt.losses.deciles import means_by_decile
from pcagpt.model import (
    DEVICE_KNOBS,
    embedding_parameters,
    order_constants,
    token_order,
    total_parameters,
    training_flops_per_token,
)
from pcagpt.run import checkpoint, digests, hyperparameters, provenance
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.evaluator import Evaluation
from pcagpt.run.folder import WEIGHTS_HASH, write_result
from pcagpt.sharding import placement
from pcagpt.telemetry.metrics import Telemetry
from pcagpt.telemetry.progress import Progress
from pcagpt.training.interrupt import recorded_signals
from pcagpt.training.meter import History, Meter, NotFinite
from pcagpt.training.sampler import sampler
from pcagpt.training.setup import Setup
from pcagpt.training.step import Teacher, TrainState, initial_state, train_step


def train(
    setup: Setup,
    run_dir: Path,
    record: dict[str, Any],
    label: str,
    check_lock: Callable[[], None],
    check_place: Callable[[], None],
    command: str = "",
) -> dict:
    """Trains to the last step and writes result.json.

    Args:
      setup: what to train with.
      run_dir: the run's folder; a checkpoint in it is resumed.
      record: the content of config.json; each checkpoint gets a copy.
      label: of the progress bar.
      check_lock: called before each line of metrics.jsonl, and
      check_place: before each save, on the first process; they raise UserError if the
        folder belongs to another command now.
      command: what the person has called; the boards show it.

    Returns:
      The result. checkpoints/README.md explains its fields.

    Raises:
      NotFinite: a loss or a gradient is not finite.
      Interrupted: a signal asked to stop; the state is saved.
    """
    settings, began = setup.settings, time.monotonic()
    last_step = settings.train.steps
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(run_dir, settings.checkpoint.keep_last)
        )
        state, shardings, history = start(setup, checkpoints)
        teacher = place_teacher(setup, state)
        setup.check_unchanged()  # All imports are read now.
        resumed_at = checkpoints.latest_step  # None: the run is new
        makers = history.made_by, provenance.summary(setup.mesh.size)
        history.made_by = provenance.joined(makers)
        knobs = {name: getattr(setup.model.config, name) for name in DEVICE_KNOBS}
        history.resolved = {
            name: provenance.distinct((history.resolved.get(name, value), value))
            for name, value in knobs.items()
        }
        first_step, seconds_before = int(state.step), history.seconds
        telemetry = stack.enter_context(
            _telemetry(setup, run_dir, record, command, resumed_at, check_lock)
        )
        sample = sampler(setup, record) if telemetry.is_shown else None
        progress = stack.enter_context(Progress(label, last_step, first_step))
        stop = stack.enter_context(recorded_signals())
        compiled_step = compile_step(setup, state, shardings, teacher)
        meter = Meter(
            history,
            telemetry,
            progress,
            every=settings.telemetry.every,
            tokens_per_step=setup.tokens_per_step,
            flops_per_token=training_flops_per_token(setup.model.config),
            peak_flops=provenance.peak_flops(setup.mesh.size),
        )

        # `step` is the number of updates of `state`. Each iteration evaluates and saves
        # this state if that is due, and then makes the next update.
        for step in range(first_step, last_step + 1):
            is_last, stopping = step == last_step, stop.stops_at(step)
            is_new = step != resumed_at  # A restored state was evaluated and saved.

            # The last state is always evaluated, because a run may have been killed
            # after its last save and before its result.
            measured = None
            if is_last or (is_new and step % settings.evaluate.every == 0):
                meter.flush()
                measured = setup.validation(state.variables)
                loss = measured.metrics["loss"]
                if not math.isfinite(loss):
                    raise NotFinite(step, f"validation loss {loss}", step == 0)
            with _telling_loss(run_dir.name, step, measured):
                if measured:
                    tokens = step * setup.tokens_per_step
                    history.add(tokens, loss)
                    telemetry.log(step, tokens, "val", measured.metrics)
                    if sample and is_new:
                        telemetry.text("sample", sample(state.variables), step)

                # Step 0 is not saved: the same seed makes the same state again.
                is_due = is_last or stopping or step % settings.checkpoint.every == 0
                if is_new and step > 0 and is_due:
                    meter.flush()
                    history.seconds = seconds_before + time.monotonic() - began
                    telemetry.flush()  # A killed run goes on from here, logs no more.
                    if jax.process_index() == 0:
                        with _counting_lost_steps(step, checkpoints.latest_step):
                            check_place()
                    checkpoints.save(
                        step,
                        state.checkpoint_items,
                        {"history": dataclasses.asdict(history), "config": record},
                        measured.metrics["loss"] if measured else None,
                    )
            if is_last:
                break
            if stopping:
                checkpoints.wait()
                saved = "saved: run the same command again to continue"
                fresh = "nothing to save yet: run the same command to start again"
                raise Interrupted(
                    f"{run_dir.name} stopped at step {step} of {last_step}, "
                    f"{saved if step else fresh}",
                    stopping,
                )

            # This call returns before the device has finished. The meter reads the
            # metrics one step late, so that the device never waits for the next step.
            state, metrics = compiled_step(state, setup.batch(step), teacher)
            meter.hold(step + 1, metrics)

        with _telling_loss(run_dir.name, last_step, measured):
            checkpoints.wait()
            result = _result(setup, run_dir, record, measured, history, compiled_step)
            numbers = {k: v for k, v in result.items() if isinstance(v, (int, float))}
            telemetry.end(last_step, numbers)
            if jax.process_index() == 0:
                check_place()
                weights = digests.of_weights(checkpoint.folder_of(run_dir, last_step))
                result = {**result, WEIGHTS_HASH: weights}
                write_result(run_dir, result, measured.window_losses)
        # What comes after this run must not start.
        if number := stop.agreed():
            raise Interrupted(
                f"{run_dir.name} is done: run the same command again to continue",
                number,
            )
    return result


def start(
    setup: Setup, checkpoints: Checkpoints
) -> tuple[TrainState, TrainState, History]:
    """The first state (on the mesh), its shardings, and the history of the run.

    Precedence: the newest checkpoint, then what `init` imports, then random weights.
    """
    seed = setup.settings.seed
    init = functools.partial(initial_state, setup.model, setup.optimizer, seed)
    shardings = placement.shardings(jax.eval_shape(init), setup.mesh)
    # Each device makes only its own part, because the state may not fit on one device.
    init = jax.jit(
        init, out_shardings=shardings, compiler_options=placement.COMPILER_OPTIONS
    )
    restored = checkpoints.restore_latest(init.eval_shape().checkpoint_items)
    if restored:
        items, meta = restored
        history = History.of(meta.get("history"))
        return TrainState.from_checkpoint(**items), shardings, history
    state = init()
    variables = {"params": state.params, "constants": _constants(setup)}
    state = state.replace(**setup.import_into(variables))
    return jax.device_put(state, shardings), shardings, History()


def _constants(setup: Setup) -> dict:
    """The token order of several bands, by falling frequency if none is imported."""
    config, init = setup.model.config, setup.settings.init
    if len(config.bands) == 1 or init.weights_from or init.import_bands:
        return {}
    count_V = setup.corpus.count_tokens("train")
    missing = config.vocab_size - len(count_V)
    return order_constants(np.argsort(-np.pad(count_V, (0, missing)), kind="stable"))


def place_teacher(setup: Setup, state: TrainState) -> Teacher | None:
    """The teacher on the mesh, with its rows in the token order of the state."""
    opened, config = setup.open_teacher(), setup.model.config
    if opened is None:
        return None
    order_V = token_order(state.constants, config.vocab_size)
    teacher = Teacher.aligned(*opened, config.bands, order_V)
    return jax.device_put(teacher, placement.shardings(teacher, setup.mesh))


def compile_step(
    setup: Setup, state: TrainState, shardings: TrainState, teacher: Teacher | None
) -> jax.stages.Compiled:
    """Compiles `train_step` for the mesh and the batch; it consumes its state.

    Raises jax.errors.JaxRuntimeError if the device's memory is too small.
    """
    settings = setup.settings
    step = functools.partial(
        train_step,
        model=setup.model,
        optimizer=setup.optimizer,
        seed=settings.seed,
        loss_chunks=settings.train.loss_chunks,
        distill_share=settings.distill.share,
    )
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, placement.replicated(setup.mesh)),
    )
    # The helpers of `sharding.inside` read this mesh.
    with jax.set_mesh(setup.mesh):
        lowered = jitted.lower(state, setup.batch(0), teacher)
        return lowered.compile(compiler_options=placement.COMPILER_OPTIONS)


def peak_bytes(compiled_step: jax.stages.Compiled) -> int:
    """Memory that a compiled step needs on one device."""
    memory = compiled_step.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


@contextlib.contextmanager
def _counting_lost_steps(step: int, saved: int | None) -> Iterator[None]:
    """A UserError in this context also says what is lost if `step` is not saved."""
    try:
        yield
    except UserError as error:
        since = f"step {saved}" if saved else "the start"
        raise UserError(
            f"{error}; the {step - (saved or 0):,} steps since {since} are not saved"
        ) from None


@contextlib.contextmanager
def _telling_loss(run: str, step: int, measured: Evaluation | None) -> Iterator[None]:
    """A loss that an error in this context may keep from every file is printed."""
    try:
        yield
    except Exception:
        if measured and jax.process_index() == 0:
            loss = measured.metrics["loss"]
            print(f"{run}: val loss {loss:.4f} at step {step}", flush=True)
        raise


def _telemetry(
    setup: Setup,
    run_dir: Path,
    record: dict[str, Any],
    command: str,
    resumed_at: int | None,
    check_lock: Callable[[], None],
) -> Telemetry:
    """Opens the logs of the run, and describes it there."""
    settings = setup.settings
    telemetry = Telemetry(
        run_dir,
        settings.telemetry,
        check_lock=check_lock,
        resume_step=resumed_at,
        workdir=Path(settings.workdir),
        command=command,
        config=settings.to_dict(),
    )
    telemetry.begin(
        settings.flat(),
        hyperparameters.hyperparameters(record),
        hyperparameters.sizes(setup.model.config),
    )
    return telemetry


def _result(
    setup: Setup,
    run_dir: Path,
    record: dict[str, Any],
    measured: Evaluation,
    history: History,
    compiled_step: jax.stages.Compiled,
) -> dict[str, Any]:
    """The content of result.json."""
    settings, model = setup.settings, setup.model.config
    full = dataclasses.replace(model, n_embd_wte=0, band_sizes=(), band_ranks=())
    sizes = hyperparameters.sizes(model)
    metrics = dict(measured.metrics)
    del metrics["tokens_predicted"]  # `protocol` has it.
    count_V = setup.corpus.count_tokens("train")
    return {
        "run": run_dir.name,
        "run_id": record["run_id"],
        "arm": settings.arm,
        "rank": sizes["rank"],
        "band_sizes": model.band_sizes,
        "band_ranks": model.band_ranks,
        "seed": settings.seed,
        "status": "done",
        "steps": settings.train.steps,
        "tokens_seen": settings.train.steps * setup.tokens_per_step,
        "val_loss": metrics.pop("loss"),
        "best_val_loss": history.best_val_loss,
        "curve": history.curve,
        **metrics,
        "val_loss_by_decile": means_by_decile(
            measured.target_losses, count_V / count_V.sum()
        ),
        "params_total": sizes["params_total"],
        "params_embedding": sizes["params_embedding"],
        "compression_embedding": embedding_parameters(full) / sizes["params_embedding"],
        "compression_total": total_parameters(full) / sizes["params_total"],
        "tokens_per_second": history.tokens_per_second,
        "seconds": history.seconds,
        "peak_bytes": peak_bytes(compiled_step),
        "resolved": history.resolved,
        **history.made_by,
        "protocol": setup.validation.protocol,
    }
