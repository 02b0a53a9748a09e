"""What a run starts from: imported factors, another run's blocks, and freezing."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import assert_equal, changed, execute, training

from pcagpt import trees
from pcagpt.errors import UserError
from pcagpt.factorize import files as factor_files
from pcagpt.model import GPT, GPTConfig
from pcagpt.run import checkpoint
from pcagpt.run import initialise as warm_start
from pcagpt.run.checkpoint import Checkpoints

MODEL = GPTConfig(
    vocab_size=97, block_size=16, n_layer=1, n_head=2, n_embd=32, n_embd_wte=8
)
NOTHING = {
    "import_wte_npy": "",
    "import_scale_matrices_npz": "",
    "import_wte_freeze": False,
    "import_scale_matrices_freeze": False,
    "import_bands": "",
    "keep": "all",
    "blocks_from": "",
    "weights_from": "",
}


def leaves(run_dir, step):
    """{path: array} of a checkpoint."""
    return trees.flatten(checkpoint.load_weights(run_dir / "ckpt" / str(step))[0])


def template(config=MODEL):
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def refusal(config=MODEL, **init):
    """The one line with which an import is refused."""
    with pytest.raises(UserError) as caught:
        warm_start.replacements(NOTHING | init, config, template(config), seed=1)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def factors(tmp_path):
    """Writes table.npy and scales.npz; returns the knobs that import them."""

    def write(table=None, **scales):
        random = np.random.default_rng(0)
        table = random.normal(size=(97, 8)) if table is None else table
        up = random.normal(size=(8, 32)).astype(np.float32)
        np.save(tmp_path / "table.npy", table)
        np.savez(tmp_path / "scales.npz", **{"scale_up": up, "scale_down": up} | scales)
        return {
            "import_wte_npy": str(tmp_path / "table.npy"),
            "import_scale_matrices_npz": str(tmp_path / "scales.npz"),
        }

    return write


# Where A and B start


def test_a_starts_exactly_at_the_imported_factors_with_blocks_of_its_own(
    finished_experiment,
):
    workdir = Path(finished_experiment.workdir)
    start = leaves(workdir / "gpt_pca_k8", 0)
    factorized = workdir / "pca_factorized"
    table = np.load(factorized / "wte_pca_k8.npy")
    np.testing.assert_array_equal(start["embed/band_0/wte"][:97], table)
    assert not start["embed/band_0/wte"][97:].any()
    scales = np.load(factorized / "scale_mats_pca_k8.npz")
    np.testing.assert_array_equal(start["embed/band_0/scale_up"], scales["scale_up"])
    assert "embed/band_0/scale_down" not in start  # tied: one leaf
    baseline = leaves(workdir / "gpt_baseline", 6)
    kernel = "block_0/attn/qkv/kernel"
    assert not np.array_equal(start[kernel], baseline[kernel])


def test_a_and_c_start_from_the_same_random_blocks(finished_experiment):
    workdir = Path(finished_experiment.workdir)
    a, c = (
        {
            path: leaf
            for path, leaf in leaves(workdir / run, 0).items()
            if not path.startswith("embed/")
        }
        for run in ("gpt_pca_k8", "gpt_random_lowrank_k8")
    )
    assert_equal(a, c)


def test_b_starts_with_the_factors_and_every_other_weight_of_d(finished_experiment):
    workdir = Path(finished_experiment.workdir)
    start = leaves(workdir / "gpt_pca_finetune_k8", 0)
    baseline = leaves(workdir / "gpt_baseline", 6)
    others = [path for path in start if not path.startswith("embed/")]
    assert {path.split("/")[0] for path in others} == {"wpe", "block_0", "ln_f"}
    assert_equal(
        {path: start[path] for path in others}, {p: baseline[p] for p in others}
    )
    a = leaves(workdir / "gpt_pca_k8", 0)
    np.testing.assert_array_equal(start["embed/band_0/wte"], a["embed/band_0/wte"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["svd", "pca"])
def test_b_at_full_rank_starts_at_the_loss_of_d(method, finished_experiment, tmp_path):
    d_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    workdir = tmp_path / "runs"
    execute(
        changed(
            finished_experiment,
            task="factorize",
            ranks=(32,),
            model_path=str(d_dir),
            workdir=str(workdir),
            **{"factorize.method": method, "factorize.singular_value_split": 0.5},
        )
    )
    shutil.copytree(d_dir, workdir / "gpt_baseline")
    run = training(
        changed(
            finished_experiment,
            task="train",
            arm="pca_finetune",
            workdir=str(workdir),
            **{"model.n_embd_wte": 32},
        )
    )
    with Checkpoints(run.run_dir, keep_last=1) as checkpoints:
        state, _, _ = run.start(checkpoints)
    found = run.validate(state)
    wanted = np.load(d_dir / "val_window_losses.npy")
    np.testing.assert_allclose(found.window_losses, wanted, rtol=2e-5)


def test_the_mean_of_a_centred_factorization_goes_into_every_position(factors):
    mean = np.arange(32, dtype=np.float32)
    init = NOTHING | factors(mean=mean)
    start = template() | {"wpe": np.ones((16, 32), np.float32)}
    found = warm_start.replacements(init, MODEL, start, seed=1)
    np.testing.assert_array_equal(found["wpe"], np.tile(1 + mean, (16, 1)))


def test_the_mean_is_added_to_the_positions_taken_from_another_run(
    finished_experiment, factors
):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    mean = np.arange(32, dtype=np.float32)
    init = NOTHING | factors(mean=mean) | {"blocks_from": str(run_dir)}
    found = warm_start.replacements(init, MODEL, template(), seed=1)
    np.testing.assert_array_equal(found["wpe"], leaves(run_dir, 6)["wpe"] + mean)


def test_blocks_can_be_taken_from_any_checkpoint(finished_experiment):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    init = NOTHING | {"blocks_from": str(run_dir / "ckpt" / "3")}
    found = warm_start.replacements(init, MODEL, template(), seed=1)
    assert len(found) == len(trees.flatten(template())) - 2
    wanted = leaves(run_dir, 3)
    assert_equal(found, {path: wanted[path] for path in found})
    fingerprints = [
        warm_start.fingerprints(NOTHING | {"blocks_from": str(run_dir / below)})
        for below in ("", "ckpt/3", "ckpt/6")
    ]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_a_table_for_the_baseline_is_imported_at_full_width(factors):
    dense = dataclasses.replace(MODEL, n_embd_wte=None)
    table = np.random.default_rng(0).normal(size=(97, 32)).astype(np.float16)
    init = NOTHING | {"import_wte_npy": factors(table)["import_wte_npy"]}
    found = warm_start.replacements(init, dense, template(dense), seed=1)
    assert list(found) == ["embed/band_0/wte"]
    assert found["embed/band_0/wte"].shape == (128, 32)
    np.testing.assert_array_equal(found["embed/band_0/wte"][:97], table)


# Freezing


FREEZES = {
    "import_wte_freeze": {"wte"},
    "import_scale_matrices_freeze": {"scale_up", "scale_down"},
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("freeze", FREEZES)
def test_a_freeze_keeps_exactly_its_leaves_through_a_run(freeze, tiny_config, factors):
    tiny_config.update_from_flattened_dict(
        {"arm": "pca", "model.n_embd_wte": 8, "model.n_embd_wte_scale_tying": False}
        | {"checkpoint.keep_last": 9, "train.weight_decay": 0.5}
        | {f"init.{name}": path for name, path in factors().items()}
        | {f"init.{freeze}": True}
    )
    run_dir = execute(tiny_config)
    before, after = leaves(run_dir, 0), leaves(run_dir, 6)
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == {f"embed/band_0/{name}" for name in FREEZES[freeze]}


def test_a_freeze_without_its_import_is_refused():
    for freeze, imported in (
        ("import_wte_freeze", "import_wte_npy"),
        ("import_scale_matrices_freeze", "import_scale_matrices_npz"),
    ):
        with pytest.raises(UserError, match=rf"init.{freeze} is on but .*{imported}"):
            warm_start.frozen_patterns(NOTHING | {freeze: True})
    assert warm_start.frozen_patterns(NOTHING) == ()


# What does not fit


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.zeros((97, 9)), r"(97, 9), this model's table is (97, 8)"),
        (np.zeros((128, 8)), r"(128, 8), this model's table is (97, 8)"),
        (np.zeros((97, 8), np.int32), "has dtype int32: floating point is needed"),
        (np.full((97, 8), np.nan), "holds nan at (0, 0): all must be finite"),
        (np.zeros(97), "has shape (97,): 2 dimensions are needed"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, words, factors):
    message = refusal(import_wte_npy=factors(table)["import_wte_npy"])
    assert "table.npy" in message
    assert words in message


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (
            {"scale_up": np.zeros((9, 32)), "scale_down": np.zeros((9, 32))},
            "is (9, 32), this model's scale matrices are (8, 32)",
        ),
        ({"scale_down": np.zeros((7, 32))}, "scale_down (7, 32)"),
        ({"scale_down": np.zeros((8, 32))}, "two different scale matrices and this"),
        ({"scale_up": np.zeros((8, 32), int)}, "'scale_up' has dtype int64"),
        ({"scale_up": np.full((8, 32), np.inf)}, "'scale_up' holds inf at (0, 0)"),
        ({"mean": np.zeros(31)}, "mean (31,)"),
        ({"mean": np.full(32, np.nan)}, "'mean' holds nan at (0,)"),
    ],
)
def test_scale_matrices_that_do_not_fit_are_refused(scales, words, factors):
    path = factors(**scales)["import_scale_matrices_npz"]
    message = refusal(import_scale_matrices_npz=path)
    assert "scales.npz" in message
    assert words in message


def test_scale_matrices_without_one_of_the_two_are_refused(tmp_path):
    np.savez(tmp_path / "half.npz", scale_up=np.zeros((8, 32)))
    message = refusal(import_scale_matrices_npz=str(tmp_path / "half.npz"))
    assert "half.npz has no array 'scale_down', only ['scale_up']" in message


def test_two_different_scale_matrices_go_into_an_untied_model(factors):
    untied = dataclasses.replace(MODEL, n_embd_wte_scale_tying=False)
    down = np.full((8, 32), 2.0)
    init = NOTHING | factors(scale_down=down)
    found = warm_start.replacements(init, untied, template(untied), seed=1)
    np.testing.assert_array_equal(found["embed/band_0/scale_down"], down)
    assert not np.array_equal(found["embed/band_0/scale_up"], down)


@pytest.mark.parametrize("content", [None, b"", b"no array", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["import_wte_npy", "import_scale_matrices_npz"])
def test_missing_and_damaged_files_are_refused(name, content, tmp_path):
    path = tmp_path / f"given.{name[-3:]}"
    if content is not None:
        path.write_bytes(content)
    message = refusal(**{name: str(path)})
    assert str(path) in message
    wanted = "does not exist" if content is None else "is not a readable array file"
    assert wanted in message


def test_an_archive_is_no_table_and_a_table_no_archive(factors):
    files = factors()
    table, scales = files["import_wte_npy"], files["import_scale_matrices_npz"]
    assert "is not a .npy file" in refusal(import_wte_npy=scales)
    assert "is not a .npz file" in refusal(import_scale_matrices_npz=table)


def test_scale_matrices_for_a_model_without_are_refused(factors):
    dense = dataclasses.replace(MODEL, n_embd_wte=None)
    path = factors()["import_scale_matrices_npz"]
    message = refusal(dense, import_scale_matrices_npz=path)
    assert "has no scale matrices: set model.n_embd_wte=8" in message


def test_files_of_one_table_are_refused_by_a_model_of_several_bands(factors):
    banded = dataclasses.replace(MODEL, band_sizes=(10, 87), band_ranks=(8, 4))
    message = refusal(banded, **factors())
    assert "this model has 2 bands: leave model.band_sizes empty" in message


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n_layer": 2}, "lacks 'block_1/"),
        ({"bias": False}, "bias"),
        ({"block_size": 8}, "'wpe' has shape (16, 32), this model needs (8, 32)"),
        ({"n_embd": 16}, "give both models the same model.* sizes"),
        ({"n_head": 4}, "has 2 attention heads, this model 4: set model.n_head=2"),
    ],
)
def test_blocks_of_another_model_are_refused(other, words, finished_experiment):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    message = refusal(dataclasses.replace(MODEL, **other), blocks_from=str(run_dir))
    assert "init.blocks_from" in message
    assert str(run_dir) in message
    assert words in message


def test_more_blocks_than_the_model_has_are_refused(finished_experiment, monkeypatch):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    deeper = template(dataclasses.replace(MODEL, n_layer=2))
    monkeypatch.setattr(checkpoint, "load_weights", lambda _: (deeper, {}, 6))
    message = refusal(blocks_from=str(run_dir))
    assert f"init.blocks_from={run_dir} holds 'block_1/" in message
    assert "the two models differ in model.n_layer" in message


def test_blocks_of_no_run_are_refused(tmp_path):
    message = refusal(blocks_from=str(tmp_path / "nothing"))
    assert "nothing does not exist: give the folder of a run" in message


@pytest.mark.usefixtures("quick")
def test_an_import_that_does_not_fit_leaves_an_overwritten_run_as_it_was(
    tiny_config, factors
):
    given = factors()
    tiny_config.update_from_flattened_dict(
        {"arm": "pca", "model.n_embd_wte": 8}
        | {f"init.{name}": path for name, path in given.items()}
    )
    run_dir = execute(tiny_config)
    before = leaves(run_dir, 6)
    factors(np.zeros((97, 4)))
    with pytest.raises(UserError, match="this model's table is"):
        execute(changed(tiny_config, overwrite=True))
    assert_equal(leaves(run_dir, 6), before)
    assert (run_dir / "result.json").exists()


def test_the_files_of_a_factorization_are_what_is_imported(finished_experiment):
    folder = Path(finished_experiment.workdir) / "pca_factorized"
    init = NOTHING | {
        "import_wte_npy": str(factor_files.table_path(folder, 8)),
        "import_scale_matrices_npz": str(factor_files.scale_path(folder, 8)),
    }
    found = warm_start.replacements(init, MODEL, template(), seed=1)
    assert found.keys() == {"embed/band_0/wte", "embed/band_0/scale_up"}
    prints = warm_start.fingerprints(init)
    assert prints.keys() == {"import_wte_npy", "import_scale_matrices_npz"}
    assert len(set(prints.values())) == 2
