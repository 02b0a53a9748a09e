"""Every knob matters: each is set to another value, and something else happens."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import changed, execute, job, metrics, setup, write_statistics

from pcagpt import config as knobs
from pcagpt import main
from pcagpt.config import Settings, checks, unread, validate
from pcagpt.config.tasks import RECOVERY, TASKS, readers_of
from pcagpt.errors import UserError
from pcagpt.factorization import BandFactors, FactorizedTable, factor_files
from pcagpt.model import GPT
from pcagpt.pipeline import compress as compressing
from pcagpt.pipeline import execute as pipeline
from pcagpt.pipeline import sample as sampling
from pcagpt.pipeline import tasks as pipeline_tasks
from pcagpt.pipeline.evaluate import evaluate
from pcagpt.pipeline.export import export
from pcagpt.pipeline.plan import make_plan
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run import checkpoint
from pcagpt.run.build import Hardware, build_config
from pcagpt.run.folder import read_record, write_record
from pcagpt.sharding import placement, processes
from pcagpt.training import loop, sampler
from pcagpt.training.step import initial_state

pytestmark = pytest.mark.usefixtures("quick")
TOKENS_BT = jax.ShapeDtypeStruct((8, 8), np.int32)


def shapes(config):
    """{parameter: shape} of the model."""
    model = setup(config).model
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def packed(config):
    """{constant: shape} of the model, without a run: packed tables are not trained."""
    settings = Settings.of(config).model
    model = GPT(build_config(settings, sum(settings.band_sizes)))
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    return jax.tree.map(lambda leaf: leaf.shape, variables.get("constants"))


def first_batch(config):
    """The tokens of a run's first batch."""
    return np.asarray(setup(config).batch(0)).tolist()


def imported(config):
    """Checksums of the weights that a run imports."""
    made = setup(config)
    shapes = jax.eval_shape(made.model.init, jax.random.key(0), TOKENS_BT)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    leaves = jax.tree.leaves(made.import_into(zeros)["params"])
    return [float(np.square(leaf).sum()) for leaf in leaves]


def step(config):
    """The training step, as it is handed to the compiler."""
    made = setup(config)
    init = functools.partial(
        initial_state, made.model, made.optimizer, made.settings.seed
    )
    state = jax.eval_shape(init)
    teacher = loop.place_teacher(made, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda self, **_: self.as_text())
        return loop.compile_step(
            made, state, placement.shardings(state, made.mesh), teacher
        )


def updates(config):
    """What a run's optimizer makes of some gradients."""
    optimizer, random = setup(config).optimizer, np.random.default_rng(0)
    params = {"wpe": np.ones(9, np.float32)}
    state, found = optimizer.init(params), []
    for _ in range(6):
        gradients = {"wpe": random.normal(size=9).astype(np.float32)}
        change, state = optimizer.update(gradients, state, params)
        found.append(np.asarray(change["wpe"]).tolist())
    return found


def frozen(config):
    """The parameters that are not trained."""
    return setup(config).optimizer.frozen


def attention(config):
    """The model on a GPU. JAX lowers cuDNN's attention only where it finds cuDNN."""
    model = GPT(build_config(Settings.of(config).model, 97, Hardware("gpu")))
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
        return jax.jit(model.apply).lower(variables, TOKENS_BT).as_text()
    except RuntimeError as error:
        assert str(error) == "cuDNN is not detected."
        return "cuDNN"


def plan(config):
    """The jobs with their folders, seeds and budgets."""
    return [
        (job.folder, job.settings.seed, job.settings.train, job.status().words)
        if isinstance(job, TrainJob)
        else (job.folder, job.settings.ranks, job.source)
        for job in make_plan(Settings.of(config)).jobs
    ]


def refusal(config):
    """Why a plan is not carried out."""
    try:
        pipeline.check(make_plan(Settings.of(config)))
    except UserError as error:
        return str(error)
    return None


def contradiction(config):
    """Why the knobs contradict each other."""
    try:
        validate(Settings.of(config))
    except UserError as error:
        return str(error)
    return None


def left(config):
    """What a run leaves: kept checkpoints, logged steps, kinds of files."""
    run_dir = execute(config)
    logged = [(line["split"], line["step"]) for line in metrics(run_dir)]
    kinds = {path.name.split(".")[0] for path in run_dir.iterdir()}
    return checkpoint.steps(run_dir), logged, kinds


def wandb(config):
    """What a run asks of W&B."""
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(loop.Telemetry, "__init__", lambda _, *a, **k: asked.append(a[1]))
        patch.setattr(loop.Telemetry, "begin", lambda *_: None)
        loop._telemetry(setup(config), Path("run"), {}, "", None, lambda: None)
    (wanted,) = asked
    return wanted.wandb, wanted.wandb_project


def tokens_of_a_sample(config):
    """How many tokens a run writes at an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "drawn_after", lambda *_: ())
        patch.setattr(sampler, "written", lambda *given: str(given[-1]))
        return sampler.sampler(setup(config), {})({})


def evaluation(config):
    """The loss of a finished run."""
    return evaluate(Settings.of(config))["loss"]


def evaluation_batches(config):
    """The number of batches of a validation."""
    return len(setup(config).validation.batches)


def factors(config):
    """The arrays of a factorization, by file."""
    files = execute(config).rglob("*.np[yz]")
    return {str(path): path.read_bytes() for path in files}


def exported(config):
    """The files that an export writes."""
    export(Settings.of(config))
    folder = Path(config.workdir) / "exported"
    return sorted(path.name for path in folder.rglob("*.*"))


def recovered(config):
    """The ranks that a sweep trains further."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "_recover", lambda asked, *_: found.append(asked))
        compressing.compress(Settings.of(config), "a command")
    return [settings.compress.recover_ranks for settings in found]


def samples(config):
    """The samples of a model, and how their tokens are to be drawn."""
    asked = []

    def generate(_, __, prompt, limit, **options):
        asked.append((prompt, limit, options))
        return itertools.repeat(np.full(config.sample.count, 70), limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "generate", generate)
        found = list(sampling.sample(Settings.of(config)))
    return found, str(asked)


class Planned(Exception):
    """A task has planned its work, which a test need not wait for."""


def compression(config):
    """The tables that a compression tries, or the bound that it fits."""
    asked = []

    def planned(found):
        asked.append(found)
        raise Planned

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Planned):
        patch.setattr(compressing, "sweep", lambda *given, **_: planned(given[1]))
        patch.setattr(compressing, "advise", lambda *given, **_: planned(given[1:3]))
        compressing.compress(Settings.of(config), "a command")
    return asked


def swept(config):
    """What the tables of a compression cost."""
    compressing.compress(Settings.of(config), "a command")
    path = Path(config.workdir) / "compressed" / "sweep.json"
    return [row["added_loss"] for row in json.loads(path.read_text())["rows"]]


def mesh(config):
    """The number of devices on each axis."""
    return dict(setup(config).mesh.shape)


def tokenized(config):
    """Which tokenizer a text goes through, and where the tokens are put."""
    corpus = job(config).corpus()
    return corpus.tokenizer, corpus.folder.parent


def joined_processes(config):
    """How several processes are joined."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start", lambda *a: found.append(a))
        patch.setattr(pipeline, "execute", lambda *_: None)
        main.run(Settings.of(config), "a command", print_only=False)
    return found


RANDOM = {"arm": "random", "model.n_embd_wte": 8}
BANDS = {"arm": "random", "model.band_sizes": (20, 77), "model.band_ranks": (8, 4)}
EXPERIMENT = {"task": "experiment"}
FINISHED = {"model.n_embd": 32, "model.block_size": 16}
D, A = "PLACE/finished/gpt_baseline", "PLACE/finished/gpt_pca_k8"
EVALUATE = FINISHED | {"task": "evaluate", "data.source": "", "model_path": D}
COMPRESS = EVALUATE | {
    "task": "compress",
    "ranks": (4,),
    "compress.methods": "context",
    "compress.bands": (1,),
    "compress.bits": (),
    "compress.calibration_tokens": 512,
}
FACTORIZE = {"task": "factorize", "ranks": (2,), "model_path": "PLACE/table.npy"}
KL = FACTORIZE | {"factorize.method": "kl"}
SAMPLE = FINISHED | {"task": "sample", "model_path": "PLACE/talker"}
TEXT = {"data.source": "PLACE/text"}
IMPORT = FINISHED | {
    "arm": "pca",
    "model.n_embd_wte": 8,
    "init.import_wte_npy": "PLACE/finished/pca_factorized/wte_pca_k8.npy",
    "init.import_scale_matrices_npz": (
        "PLACE/finished/pca_factorized/scale_mats_pca_k8.npz"
    ),
}
FINETUNE = IMPORT | {"arm": "pca_finetune", "init.blocks_from": A}
TAUGHT = {"arm": "pca_distill", "distill.teacher": D}
PROCESSES = {"distributed.enabled": True}
KEPT = {"checkpoint.keep_last": 9}

# {knob: (what is observed, another value, the other knobs that are set)}
KNOBS = {
    "task": (plan, "experiment", {}),
    "arm": (plan, "continued", {}),
    "workdir": (plan, "PLACE/elsewhere", {}),
    "seed": (first_batch, 2, {}),
    "overwrite": (refusal, True, {"workdir": "PLACE/finished", "seed": 7}),
    "build_prerequisites": (refusal, False, RANDOM | {"arm": "pca"}),
    "model_path": (evaluation, A, EVALUATE),
    "format": (exported, "npz", EVALUATE | {"task": "export"}),
    "split": (evaluation, "test", EVALUATE),
    "ranks": (plan, (4, 8), EXPERIMENT),
    "model.vocab_size": (shapes, 150, {}),
    "model.vocab_multiple": (shapes, 1, {}),
    "model.block_size": (shapes, 16, {}),
    "model.n_layer": (shapes, 2, {}),
    "model.n_head": (step, 4, {}),
    "model.n_embd": (shapes, 32, {}),
    "model.n_embd_wte": (shapes, 4, RANDOM),
    "model.n_embd_wte_scale_tying": (shapes, False, RANDOM),
    "model.band_sizes": (shapes, (50, 47), BANDS),
    "model.band_ranks": (shapes, (8, 0), BANDS),
    "model.band_blocks": (
        packed,
        (1, 0, 0, 0, 0, 0, 1),
        BANDS | {"model.band_sizes": (97,), "model.band_ranks": (0,)},
    ),
    "model.bias": (shapes, False, {}),
    "model.gelu": (step, "exact", {}),
    "model.dropout": (step, 0.1, {}),
    "model.compute_dtype": (step, "bfloat16", {}),
    "model.attention": (attention, "xla", {}),
    "model.kernels": (step, "triton", {}),
    "data.source": (first_batch, "PLACE/corpus", {}),
    "data.tokenizer": (tokenized, "sotu4096", TEXT),
    "data.cache_dir": (tokenized, "PLACE/elsewhere", TEXT),
    "train.steps": (updates, 12, {}),
    "train.batch_size": (first_batch, 16, {}),
    "train.accumulation": (step, 2, {}),
    "train.learning_rate": (updates, 1e-3, {}),
    "train.schedule": (updates, "linear", {}),
    "train.warmup_steps": (updates, 4, {}),
    "train.final_learning_rate_share": (updates, 0.5, {}),
    "train.weight_decay": (updates, 0.5, {}),
    "train.beta1": (updates, 0.5, {}),
    "train.beta2": (updates, 0.5, {}),
    "train.gradient_clip": (updates, 0.01, {}),
    "train.loss_chunks": (step, 1, {}),
    "scratch.pca_learning_rate_share": (plan, 0.5, EXPERIMENT),
    "scratch.random_learning_rate_share": (plan, 0.5, EXPERIMENT),
    "finetune.steps_share": (plan, 0.25, EXPERIMENT),
    "finetune.learning_rate_share": (plan, 0.25, EXPERIMENT),
    "distill.teacher": (step, A, FINETUNE | TAUGHT),
    "distill.share": (step, 0.5, FINETUNE | TAUGHT),
    "init.import_wte_npy": (imported, "PLACE/other_table.npy", IMPORT),
    "init.import_scale_matrices_npz": (imported, "PLACE/other.npz", IMPORT),
    "init.import_wte_freeze": (frozen, True, IMPORT),
    "init.import_scale_matrices_freeze": (frozen, True, IMPORT),
    "init.import_bands": (imported, "PLACE/bands", FINISHED | RANDOM),
    "init.keep": (contradiction, "std", IMPORT),
    "init.blocks_from": (imported, D, FINETUNE),
    "init.weights_from": (imported, D, FINISHED),
    "factorize.method": (factors, "pca", FACTORIZE),
    "factorize.statistics": (factors, "PLACE/other_statistics.npz", KL),
    "factorize.singular_value_split": (factors, 0.5, FACTORIZE),
    "factorize.bands": (factors, 2, FACTORIZE),
    "compress.methods": (compression, "svd,fisher", COMPRESS),
    "compress.bands": (compression, (1, 3), COMPRESS),
    "compress.bits": (compression, (4,), COMPRESS),
    "compress.calibration_tokens": (swept, 4096, COMPRESS),
    "compress.max_added_loss": (compression, 0.05, COMPRESS),
    "compress.max_params": (compression, 900, COMPRESS),
    "compress.max_bytes": (compression, 3000, COMPRESS),
    "compress.recover_ranks": (recovered, (4,), COMPRESS),
    "evaluate.every": (left, 2, KEPT),
    "evaluate.batch_size": (evaluation_batches, 16, {}),
    "evaluate.max_tokens": (swept, 320, COMPRESS),
    "sample.prompt": (samples, "The people", SAMPLE),
    "sample.tokens": (samples, 8, SAMPLE),
    "sample.count": (samples, 2, SAMPLE),
    "sample.temperature": (samples, 0, SAMPLE),
    "sample.top_k": (samples, 2, SAMPLE),
    "sample.top_p": (samples, 0.5, SAMPLE),
    "checkpoint.every": (left, 2, KEPT),
    "checkpoint.keep_last": (left, 1, KEPT),
    "telemetry.every": (left, 2, KEPT),
    "telemetry.sample_tokens": (tokens_of_a_sample, 8, TEXT),
    "telemetry.tensorboard": (left, True, KEPT),
    "telemetry.wandb": (wandb, True, {}),
    "telemetry.wandb_project": (wandb, "another", {}),
    "experiment.arms": (plan, "pca,shuffled", EXPERIMENT),
    "experiment.seeds": (plan, (1, 2), EXPERIMENT),
    "mesh.data": (mesh, 2, {}),
    "mesh.fsdp": (mesh, 2, {}),
    "distributed.enabled": (joined_processes, True, {}),
    "distributed.coordinator_address": (joined_processes, "host:1", PROCESSES),
    "distributed.num_processes": (joined_processes, 2, PROCESSES),
    "distributed.process_id": (joined_processes, 1, PROCESSES),
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
    write_record(
        talker, read_record(talker) | {"characters": [chr(32 + i) for i in range(97)]}
    )
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


def observe(by, config, values, place):
    """What is observed of a config; all write to the same folder, and leave nothing."""
    values = {
        path: value.replace("PLACE", str(place)) if isinstance(value, str) else value
        for path, value in {"workdir": "PLACE/runs", **values}.items()
    }
    found = by(changed(config, **values))
    shutil.rmtree(place / "runs", ignore_errors=True)
    return found


@pytest.fixture(scope="module")
def observed():
    """{(by, where): what was observed with a knob at its default}."""
    return {}


def test_every_knob_is_in_the_table_and_no_other():
    assert KNOBS.keys() == knobs.KNOBS.keys()


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_changes_something(knob, tiny_config, place, observed):
    by, value, where = KNOBS[knob]
    tiny_config.update_from_flattened_dict({"model.n_embd": 16, "model.block_size": 8})
    key = by, repr(where)
    if key not in observed:
        observed[key] = observe(by, tiny_config, where, place)
    changed_value = observe(by, tiny_config, where | {knob: value}, place)
    assert changed_value != observed[key]


@pytest.fixture
def reads(monkeypatch):
    """The knobs that code outside `pcagpt.config`'s checks reads, as they are read."""
    found = set()
    own = (dataclasses.__file__, checks.__file__, unread.__file__)

    def recorded(prefix):
        def get(self, name):
            if sys._getframe(1).f_code.co_filename not in own:
                found.add(prefix + name)
            return object.__getattribute__(self, name)

        return get

    for field in dataclasses.fields(Settings):
        section = type(field.default)
        if dataclasses.is_dataclass(section):
            monkeypatch.setattr(
                section, "__getattribute__", recorded(f"{field.name}."), raising=False
            )
    monkeypatch.setattr(Settings, "__getattribute__", recorded(""), raising=False)
    return found


# Every task takes these: `main` reads two of them, people give `workdir` to all
# commands, and a run that is opened compares `model` with its own.
COMMON = {"task", "workdir", "distributed", "model"}


@pytest.mark.parametrize(
    "asked",
    [
        EVALUATE,
        SAMPLE,
        {
            "task": "factorize",
            "data.source": "",
            "ranks": (4,),
            "model_path": D,
            "factorize.method": "context",
        },
        COMPRESS,
        COMPRESS | {"compress.recover_ranks": (4,), "compress.max_added_loss": 0.0},
    ],
    ids=["evaluate", "sample", "factorize", "compress", RECOVERY],
)
def test_a_task_reads_every_knob_that_it_accepts(
    asked, request, tiny_config, place, reads, tmp_path
):
    name = request.node.callspec.id
    accepted = {
        knob
        for knob in KNOBS
        if knob.partition(".")[0] not in COMMON
        and {name, name.split()[0]} & set(readers_of(knob)[0])
    }
    values = {"workdir": str(tmp_path)} | {
        path: value.replace("PLACE", str(place)) if isinstance(value, str) else value
        for path, value in asked.items()
    }
    settings = Settings.of(changed(tiny_config, **values))
    text = pipeline_tasks.do(settings, "a command")
    assert bool(text) == (name in ("evaluate", "sample"))
    assert accepted
    assert accepted - reads == set()


@pytest.mark.parametrize("knob", sorted(KNOBS.keys() - {"task"}))
def test_a_task_that_does_not_read_a_knob_refuses_it(knob):
    # The test above changes `telemetry.tensorboard` back to its default.
    value = False if knob == "telemetry.tensorboard" else KNOBS[knob][1]
    readers, _ = readers_of(knob)
    for task, needs in TASKS.items():
        given = {"task": task, "model_path": "RUN" if needs.model else "", knob: value}
        refused = contradiction(Settings().replace(given).to_dict()) or ""
        if task in readers:
            assert "can read it" not in refused
        else:
            assert refused.startswith(f"{knob} is set for ") and task in refused


def test_a_compression_reads_the_budget_only_to_train_further():
    asked = {"task": "compress", "model_path": "RUN", "finetune.steps_share": 0.5}
    with pytest.raises(UserError, match="only train, experiment, compress with compr"):
        validate(Settings().replace(asked))
    validate(Settings().replace(asked | {"compress.recover_ranks": (4,)}))


@pytest.mark.parametrize("knob", ["train.steps", "seed"])
def test_a_budget_beside_that_of_d_is_refused(knob, tiny_config, place, tmp_path):
    given = {"workdir": str(tmp_path), "compress.recover_ranks": (4,), knob: 77}
    config = changed(tiny_config, **(COMPRESS | given | {"model_path": D}))
    config.model_path = config.model_path.replace("PLACE", str(place))
    with pytest.raises(UserError, match=f"{knob} is 77, but .* with its own value"):
        compressing.compress(Settings.of(config), "a command")


@pytest.mark.parametrize("by", [shapes, step, first_batch, updates])
def test_the_same_config_shows_the_same_again(by, tiny_config, place):
    first, second = (observe(by, tiny_config, {}, place) for _ in range(2))
    assert first == second
