"""Does the task that the settings name, or shows what it would do."""

import json

import jax

from pcagpt.compression.original import platform_of
from pcagpt.config import Settings
from pcagpt.config.command_line import listing
from pcagpt.config.tasks import TASKS
from pcagpt.errors import UserError, explain
from pcagpt.export.source import open_source
from pcagpt.json_files import strict
from pcagpt.pipeline import estimate, execute
from pcagpt.pipeline.compress import compress, preview_compress
from pcagpt.pipeline.compress_plan import decide_effort
from pcagpt.pipeline.compress_table import compress_table, decided, preview_table
from pcagpt.pipeline.evaluate import evaluate
from pcagpt.pipeline.export import export
from pcagpt.pipeline.job import Kind
from pcagpt.pipeline.plan import make_plan
from pcagpt.pipeline.sample import sample
from pcagpt.run.trained import Run
from pcagpt.sharding import placement


def do(settings: Settings, command: str) -> str | None:
    """Does the task; returns its text, if it has one. Reports show `command`."""
    return DOES[settings.task](settings, command)


def preview(settings: Settings) -> str:
    """The value of every knob, and a line for each thing that the task would do.

    Writes only caches. Raises UserError as the task would, as far as this shows early.
    If the workdir is not writable, a line says so: it may be mounted later.
    """
    is_table = settings.task == "compress" and settings.is_of_bare_table
    if is_table:
        settings = decided(settings)
    writes = TASKS[settings.task].writes
    if TASKS[settings.task].makes_jobs:
        needed = execute.check(make_plan(settings), writes=False)
        lines = execute.describe(needed)
        to_do = [job for job, (kind, _) in needed.items() if kind != Kind.DONE]
        flops = [amount for job in to_do if (amount := job.flops())]
        if flops:
            mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
            lines.append(estimate.of_training(len(flops), sum(flops), mesh.size))
        writes = any(kind != Kind.DONE for kind, _ in needed.values())
    elif settings.task == "export":
        source = open_source(settings)
        step = source.identity.get("step")
        at_step = "" if step is None else f" at step {step}"
        lines = [f"export {source.folder}{at_step} as {settings.format}"]
    elif is_table:
        lines = preview_table(settings)
    elif TASKS[settings.task].model:
        run = Run.asked(settings)
        lines = [f"{settings.task} {run.folder} at step {run.step}"]
        if settings.task == "compress":
            settings = decide_effort(settings, platform_of(run), run.table_shape)
            asked = settings.replace({"model": run.model_settings(settings.model)})
            lines += preview_compress(asked, run)
    else:
        raise ValueError(f"no preview for the task {settings.task}")
    if writes:
        try:
            execute.check_workdir(settings.workdir)
        except (UserError, OSError) as error:
            lines.append(f"this command would stop: {explain(error) or error}")
    return "\n".join([listing(settings), "", *lines])


def _execute(settings: Settings, command: str) -> None:
    execute.execute(make_plan(settings), command)


def _compress(settings: Settings, command: str) -> None:
    of = compress_table if settings.is_of_bare_table else compress
    of(settings, command)


def _evaluate(settings: Settings, _: str) -> str:
    return json.dumps(strict(evaluate(settings)), indent=2, allow_nan=False)


def _sample(settings: Settings, _: str) -> str:
    texts: list[str] = []
    try:
        texts.extend(sample(settings))
    except KeyboardInterrupt:
        if texts and jax.process_index() == 0:
            print(_between(texts), flush=True)
        raise
    return _between(texts)


def _between(texts: list[str]) -> str:
    return "\n---\n".join(texts)


DOES = {
    "train": _execute,
    "experiment": _execute,
    "factorize": _execute,
    "compress": _compress,
    "evaluate": _evaluate,
    "sample": _sample,
    "export": lambda settings, _: export(settings),
}
