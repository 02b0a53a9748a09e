"""Every knob matters: each is set to another value, and something else happens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from runs import changed, execute, losses, metrics, start, training, write_statistics

from pcagpt import config as knobs
from pcagpt import main
from pcagpt.compress import sweep as compress
from pcagpt.errors import UserError
from pcagpt.factorize import BandFactors, FactorizedTable
from pcagpt.factorize import files as factor_files
from pcagpt.model import GPT, GPTConfig
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.evaluate_task import evaluate_run
from pcagpt.pipeline.plan import make_plan
from pcagpt.pipeline.sample_task import sample_run
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder
from pcagpt.sharding import placement
from pcagpt.training import loop as train

pytestmark = pytest.mark.usefixtures("quick")


class Shown(NamedTuple):
    """How a knob is shown to matter.

    by: what is observed of a config, which must differ between the default and `value`
    where the knobs of `where` are set. 'PLACE/...' in a value is a folder of the test.
    """

    by: Callable[[Any], Any]
    value: Any
    where: dict[str, Any] = {}


def first_losses(config):
    """In the first compiled steps of a run."""
    return losses(config, 3)


def loss_at_start(config):
    """On the validation split."""
    run = training(config)
    state, _ = start(run)
    return run.validate(state).metrics["loss"]


def updates(config):
    """That a run's optimizer makes of some gradients."""
    optimizer, random = training(config).optimizer, np.random.default_rng(0)
    params = {"wpe": np.ones(9, np.float32), "ln_f": {"bias": np.ones(9, np.float32)}}
    state, found = optimizer.init(params), []
    for _ in range(6):
        gradients = jax.tree.map(
            lambda leaf: random.normal(size=leaf.shape).astype(np.float32), params
        )
        change, state = optimizer.update(gradients, state, params)
        found.append(np.asarray(change["wpe"]).tolist())
    return found


def memory(config):
    """Bytes that the compiled step needs beside its arguments."""
    run = training(config)
    compiled = run.compile_step(*start(run), teacher=None)
    return compiled.memory_analysis().temp_size_in_bytes


def rows(config):
    """Of the token table, padding included."""
    return start(training(config))[0].params["embed"]["band_0"]["wte"].shape


def first_weights(config):
    """Checksums of the parameters that a run starts from."""
    state, _ = start(training(config))
    return [float(np.square(leaf).sum()) for leaf in jax.tree.leaves(state.params)]


def frozen(config):
    """What is kept fixed."""
    return training(config).frozen


def attention(config):
    """Whether what would be compiled for a GPU can be compiled here."""
    model = GPT(
        GPTConfig(**knobs.model_settings(config.model, 97, knobs.Hardware("gpu")))
    )
    tokens = jax.ShapeDtypeStruct((8, 8), np.int32)
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        jax.jit(model.apply).lower(variables, tokens)
    except (RuntimeError, ValueError, NotImplementedError):
        return "it is cuDNN's"
    return "it is XLA's"


def by_pallas(config):
    """Whether the model's hidden states are computed by kernels."""
    run = training(config)
    tokens = jax.ShapeDtypeStruct((8, 8), np.int32)
    variables = jax.eval_shape(run.model.init, jax.random.key(0), tokens)
    return "pallas_call" in str(jax.make_jaxpr(run.model.apply)(variables, tokens))


def plan(config):
    """The jobs with their folders, seeds and budgets."""
    return [
        (job.folder, job.config.seed, job.config.train.to_dict(), job.status())
        if isinstance(job, TrainJob)
        else (job.folder, job.ranks, job.source)
        for job in make_plan(config).jobs
    ]


def refusal(config):
    """Why a plan is not carried out."""
    try:
        experiment.check(make_plan(config), config)
    except UserError as error:
        return str(error)
    return None


def left(config):
    """What a run leaves: kept checkpoints, logged steps, kinds of files."""
    run_dir = execute(config)
    logged = [(line["split"], line["step"]) for line in metrics(run_dir)]
    kinds = {path.name.split(".")[0] for path in run_dir.iterdir()}
    return checkpoint.steps(run_dir), logged, kinds


def telemetry(config):
    """What a run asks of its telemetry."""
    asked = {}

    class Recorder:
        def __init__(self, *_, **keywords):
            asked.update(keywords)

        def text(self, *_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Telemetry", Recorder)
        training(config).telemetry(None)
    return {name: asked[name] for name in ("wandb", "wandb_project", "tensorboard")}


def evaluation(config):
    """The loss of a finished run, by the task 'evaluate'."""
    return evaluate_run(config)["loss"]


def evaluation_batches(config):
    return len(training(config).validation)


def factors(config):
    """The table and the scale matrices of a factorization."""
    folder = execute(config)
    return {path.name: path.read_bytes() for path in folder.glob("*_k*")}


def factor_names(config):
    """Of the files of a factorization."""
    return {path.name for path in execute(config).iterdir()}


def recovered(config):
    """The runs that a sweep trains on."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "compress", lambda *_: None)
        patch.setattr(experiment, "recover", lambda c: found.append(c))
        main.run(config, "a command", print_only=False)
    return [c.compress.recover_ranks for c in found]


def samples(config):
    """What a model says."""
    return sample_run(config)


def sweep(config):
    """What a sweep measured, timings apart."""
    compress.compress(config, "a command")
    path = Path(config.workdir) / "compressed" / "sweep.json"
    sweep = json.loads(path.read_text())
    assert sweep["rows"]
    return [{n: v for n, v in row.items() if n != "seconds"} for row in sweep["rows"]]


def compressed_files(config):
    """What lies in the folder of a compression."""
    compress.compress(config, "a command")
    return {path.name for path in (Path(config.workdir) / "compressed").iterdir()}


def advice(config):
    """The size and loss of an advised table."""
    compress.compress(config, "a command")
    path = Path(config.workdir) / "compressed" / "advice.json"
    chosen = json.loads(path.read_text())["chosen"]
    return chosen["params"], chosen["bytes"], chosen["added_loss"]


def mesh(config):
    return dict(training(config).mesh.shape)


def tokenized(config):
    """Which tokenizer a text goes through, and where the tokens are put."""
    corpora = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainJob, "run", lambda job: corpora.append(job.corpus()))
        execute(config)
    (corpus,) = corpora
    return corpus.tokenizer, corpus.folder.parent


def processes(config):
    """How the processes are joined."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "start_processes", lambda *a: found.append(a))
        patch.setattr(experiment, "execute", lambda *_: None)
        main.run(config, "a command", print_only=False)
    return found


RANDOM = {"arm": "random", "model.n_embd_wte": 8}
BANDED = {"arm": "random"} | {
    "model.band_sizes": (20, 77),
    "model.band_ranks": (8, 4),
}
EXPERIMENT = {"task": "experiment"}
COMPRESS = {"task": "compress", "data.source": "", "ranks": (4,)} | {
    "model_path": "PLACE/finished/gpt_baseline",
    "compress.methods": "svd,context",
    "compress.bands": (1,),
    "compress.calibration_tokens": 512,
    "model.n_embd": 32,
    "model.block_size": 16,
}
FINISHED = {"model.n_embd": 32, "model.block_size": 16}
EVALUATE = {"task": "evaluate", "data.source": ""} | {
    "model_path": "PLACE/finished/gpt_baseline",
    **FINISHED,
}
DISTILLED = {**FINISHED, "distill.teacher": "PLACE/finished/gpt_pca_k8"}
FACTORIZE = {"task": "factorize", "ranks": (2,), "model_path": "PLACE/table.npy"}
SAMPLE = FINISHED | {
    "task": "sample",
    "model_path": "PLACE/talker",
    "sample.tokens": 20,
}
OTHER = {"workdir": "PLACE/finished", "seed": 7}
TEXT = {"data.source": "PLACE/text"}
IMPORT = FINISHED | {
    "arm": "pca",
    "model.n_embd_wte": 8,
    "init.import_wte_npy": "PLACE/finished/pca_factorized/wte_pca_k8.npy",
    "init.import_scale_matrices_npz": (
        "PLACE/finished/pca_factorized/scale_mats_pca_k8.npz"
    ),
}
IN_BANDS = FINISHED | {"arm": "random", "model.n_embd_wte": 8}
DISTRIBUTED = {"distributed.enabled": True}

KNOBS = {
    "task": Shown(plan, "experiment"),
    "arm": Shown(plan, "random", {"model.n_embd_wte": 8}),
    "workdir": Shown(plan, "PLACE/elsewhere"),
    "seed": Shown(first_losses, 2),
    "overwrite": Shown(refusal, True, OTHER),
    "build_prerequisites": Shown(refusal, False, RANDOM | {"arm": "pca"}),
    "model_path": Shown(evaluation, "PLACE/finished/gpt_pca_k8", EVALUATE),
    "split": Shown(evaluation, "test", EVALUATE),
    "ranks": Shown(plan, (4, 8), EXPERIMENT),
    "model.vocab_size": Shown(loss_at_start, 120),
    "model.vocab_multiple": Shown(rows, 1),
    "model.block_size": Shown(loss_at_start, 16),
    "model.n_layer": Shown(loss_at_start, 2),
    "model.n_head": Shown(loss_at_start, 4),
    "model.n_embd": Shown(loss_at_start, 32),
    "model.n_embd_wte": Shown(loss_at_start, 4, RANDOM),
    "model.n_embd_wte_scale_tying": Shown(loss_at_start, False, RANDOM),
    "model.band_sizes": Shown(loss_at_start, (50, 47), BANDED),
    "model.band_ranks": Shown(loss_at_start, (8, 0), BANDED),
    "model.bias": Shown(first_losses, False),
    "model.dropout": Shown(first_losses, 0.1),
    "model.compute_dtype": Shown(loss_at_start, "bfloat16"),
    "model.attention": Shown(attention, "xla"),
    "model.kernels": Shown(by_pallas, "pallas"),
    "data.source": Shown(first_losses, "PLACE/corpus"),
    "data.tokenizer": Shown(tokenized, "sotu4096", TEXT),
    "data.cache_dir": Shown(tokenized, "PLACE/elsewhere", TEXT),
    "train.steps": Shown(updates, 12),
    "train.batch_size": Shown(first_losses, 16),
    "train.accumulation": Shown(first_losses, 2, {"model.dropout": 0.1}),
    "train.learning_rate": Shown(updates, 1e-3),
    "train.schedule": Shown(updates, "linear"),
    "train.warmup_steps": Shown(updates, 4),
    "train.final_learning_rate_share": Shown(updates, 0.5),
    "train.weight_decay": Shown(updates, 0.5),
    "train.beta1": Shown(updates, 0.5),
    "train.beta2": Shown(updates, 0.5),
    "train.gradient_clip": Shown(updates, 0.01),
    "train.loss_chunks": Shown(memory, 1),
    "scratch.pca_learning_rate_share": Shown(plan, 0.5, EXPERIMENT),
    "scratch.random_learning_rate_share": Shown(plan, 0.5, EXPERIMENT),
    "finetune.steps_share": Shown(plan, 0.25, EXPERIMENT),
    "finetune.learning_rate_share": Shown(plan, 0.25, EXPERIMENT),
    "init.import_wte_npy": Shown(first_weights, "PLACE/other_table.npy", IMPORT),
    "init.import_scale_matrices_npz": Shown(first_weights, "PLACE/other.npz", IMPORT),
    "init.import_wte_freeze": Shown(frozen, True, IMPORT),
    "init.import_scale_matrices_freeze": Shown(frozen, True, IMPORT),
    "init.import_bands": Shown(first_weights, "PLACE/bands", IN_BANDS),
    "init.keep": Shown(first_weights, "std", IMPORT),
    "init.blocks_from": Shown(first_weights, "PLACE/finished/gpt_baseline", IMPORT),
    "init.weights_from": Shown(first_weights, "PLACE/finished/gpt_baseline", FINISHED),
    "distill.teacher": Shown(first_losses, "PLACE/finished/gpt_pca_k8", FINISHED),
    "distill.share": Shown(first_losses, 0.5, DISTILLED),
    "factorize.method": Shown(factors, "pca", FACTORIZE),
    "factorize.statistics": Shown(
        factors,
        "PLACE/other_statistics.npz",
        FACTORIZE | {"factorize.method": "kl"},
    ),
    "factorize.bands": Shown(factor_names, 2, FACTORIZE),
    "compress.recover_ranks": Shown(recovered, (4,), COMPRESS),
    "compress.methods": Shown(sweep, "svd,fisher", COMPRESS),
    "compress.bands": Shown(sweep, (1, 3), COMPRESS),
    "compress.bits": Shown(sweep, (4,), COMPRESS),
    "compress.calibration_tokens": Shown(sweep, 4096, COMPRESS),
    "compress.max_added_loss": Shown(compressed_files, 0.05, COMPRESS),
    "compress.max_params": Shown(advice, 900, COMPRESS | {"compress.max_params": 2000}),
    "compress.max_bytes": Shown(advice, 3000, COMPRESS | {"compress.max_bytes": 5000}),
    "factorize.singular_value_split": Shown(factors, 0.5, FACTORIZE),
    "evaluate.every": Shown(left, 2),
    "evaluate.batch_size": Shown(evaluation_batches, 16),
    "evaluate.max_tokens": Shown(sweep, 100, COMPRESS),
    "checkpoint.every": Shown(left, 2, {"checkpoint.keep_last": 9}),
    "checkpoint.keep_last": Shown(left, 1),
    "telemetry.every": Shown(left, 2),
    "telemetry.tensorboard": Shown(left, True),
    "telemetry.wandb": Shown(telemetry, True),
    "telemetry.wandb_project": Shown(telemetry, "another"),
    "experiment.arms": Shown(plan, "pca,shuffled", EXPERIMENT),
    "sample.prompt": Shown(samples, "The people", SAMPLE),
    "sample.tokens": Shown(samples, 8, SAMPLE),
    "sample.count": Shown(samples, 2, SAMPLE),
    "sample.temperature": Shown(samples, 0, SAMPLE),
    "sample.top_k": Shown(samples, 2, SAMPLE),
    "experiment.seeds": Shown(plan, (1, 2), EXPERIMENT),
    "mesh.data": Shown(mesh, 2),
    "mesh.fsdp": Shown(mesh, 2),
    "distributed.enabled": Shown(processes, True),
    "distributed.coordinator_address": Shown(processes, "host:1", DISTRIBUTED),
    "distributed.num_processes": Shown(processes, 2, DISTRIBUTED),
    "distributed.process_id": Shown(processes, 1, DISTRIBUTED),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_folder, finished_experiment):
    """A folder with all that values of knobs refer to."""
    folder, random = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    shutil.copytree(finished_experiment.workdir, folder / "finished")
    shutil.copytree(corpus_folder, folder / "corpus")
    tokens = np.fromfile(folder / "corpus" / "train.bin", np.uint16)
    tokens[::-1].tofile(folder / "corpus" / "train.bin")
    (folder / "text").mkdir()
    for split in ("train", "val"):
        (folder / "text" / f"{split}.txt").write_text("one two three\n" * 40)
    talker = shutil.copytree(folder / "finished" / "gpt_baseline", folder / "talker")
    record = run_folder.read_config(talker) | {"tokenizer": "sotu4096"}
    run_folder.write_config(talker, record)
    order, rows = np.arange(97, dtype=np.int32), random.normal(size=(97, 32))
    parts = tuple(
        BandFactors(rows[part, :rank], rows[:rank])
        for part, rank in ((slice(20), 8), (slice(20, 97), 4))
    )
    factor_files.write_bands(folder / "bands", FactorizedTable(order, parts, None))
    np.save(folder / "table.npy", random.normal(size=(20, 4)))
    write_statistics(folder / "table.statistics.npz", 20, 4)
    write_statistics(folder / "other_statistics.npz", 20, 4, seed=1)
    np.save(folder / "other_table.npy", random.normal(size=(97, 8)))
    scales = random.normal(size=(8, 32))
    np.savez(folder / "other.npz", scale_up=scales, scale_down=scales)
    return folder


@pytest.fixture(scope="module")
def observed_before():
    """{(observation, where): what was observed with the knob at its default}."""
    return {}


def test_every_knob_is_in_the_table_and_no_other():
    assert KNOBS.keys() == knobs.KNOBS.keys()


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_changes_something(knob, tiny_config, place, observed_before):
    shown = KNOBS[knob]
    tiny_config.update_from_flattened_dict({"model.n_embd": 16, "model.block_size": 8})

    workdir = place / "runs"  # the same for all, as it may be part of what is observed

    def observe(values):
        values = {
            path: value.replace("PLACE", str(place)) if type(value) is str else value
            for path, value in {"workdir": str(workdir), **values}.items()
        }
        found = shown.by(changed(tiny_config, **values))
        shutil.rmtree(workdir, ignore_errors=True)
        return found

    key = shown.by, repr(shown.where)
    if key not in observed_before:
        observed_before[key] = observe(shown.where)
    assert observe(shown.where | {knob: shown.value}) != observed_before[key]
