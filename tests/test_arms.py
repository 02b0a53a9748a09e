"""Every arm of an experiment, in bands and out: what it takes of D, and what not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import changed, execute, quick_compiles, start, status, training

from pcagpt import arms, trees
from pcagpt import config as knobs
from pcagpt.compress import sweep as compress
from pcagpt.errors import UserError
from pcagpt.factorize import files as factor_files
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.evaluate_task import evaluate_run
from pcagpt.pipeline.plan import make_plan
from pcagpt.run import folder as run_folder
from pcagpt.run.checkpoint import load_weights

pytestmark = pytest.mark.usefixtures("quick")
ARMS = [arm for arm in arms.ARMS if arm != "baseline"]
IN_BANDS = {
    "experiment.arms": ",".join(ARMS),
    "factorize.method": "freq",  # So few tokens gain from bands by this one alone.
    "factorize.bands": 3,
    "compress.calibration_tokens": 512,
}


@pytest.fixture(scope="module")
def banded(finished_experiment, compiled, tmp_path_factory):
    """The config of an experiment of all arms in bands that is done."""
    workdir = tmp_path_factory.mktemp("banded") / "runs"
    finished = Path(finished_experiment.workdir)
    shutil.copytree(finished / "gpt_baseline", workdir / "gpt_baseline")
    config = changed(finished_experiment, workdir=str(workdir), **IN_BANDS)
    with quick_compiles(compiled):
        execute(config)
    return config


@pytest.fixture
def weights(banded):
    """A function: {path: array} of a run at a step."""

    def of(run, step=0):
        path = Path(banded.workdir) / run / "ckpt" / str(step)
        variables = dict(zip(("params", "constants"), load_weights(path), strict=False))
        return trees.flatten(variables)

    return of


@pytest.fixture
def table(banded):
    """What was factorized, as it was written."""
    return factor_files.read_bands(
        factor_files.bands_path(Path(banded.workdir) / "pca_factorized", 8)
    )


def embedding(flat):
    return {path: a for path, a in flat.items() if "/embed/" in path}


def parts(flat):
    """(wte without padding rows, scale) of each band."""
    bands = sorted({path.split("/")[2] for path in embedding(flat) if "wte" in path})
    found, left = [], 97
    for band in bands:
        wte = flat[f"params/embed/{band}/wte"][:left]
        left -= len(wte)
        found.append((wte, flat.get(f"params/embed/{band}/scale_up")))
    return found


def test_every_arm_is_made_once_and_the_report_has_them_all(banded):
    names = [job.folder.name for job in make_plan(banded).jobs]
    assert names[:3] == ["gpt_baseline", "pca_factorized", "gpt_baseline_continued"]
    assert names[3:] == [
        arms.ARMS[arm].run_name.format(rank=8) for arm in ARMS if arm != "continued"
    ]
    results = json.loads((Path(banded.workdir) / "results.json").read_text())
    letters = [row["letter"] for row in results["rows"]]
    assert letters == ["D", "D+", "A", "B", "Bd", "C", "E", "F", "G"]
    questions = {item["question"] for item in results["comparisons"]}
    assert questions == {
        *("A vs C", "A vs D", "B vs A", "B vs D", "B vs D+", "Bd vs B"),
        *("A vs E", "A vs F", "A vs G"),
    }
    text = (Path(banded.workdir) / "report.md").read_text()
    assert "8, 3 bands" in text
    assert all(job.status() == "done" for job in make_plan(banded).jobs)


def test_the_table_has_the_size_of_its_rank_and_all_runs_its_bands(banded, table):
    results = json.loads((Path(banded.workdir) / "results.json").read_text())
    assert table.parameters <= 8 * (97 + 32)
    for row in results["rows"]:
        if row["letter"] in ("D", "D+"):
            assert (row["rank"], row["band_sizes"]) == (None, [])
            continue
        assert row["rank"] == 8
        assert tuple(row["band_sizes"]) == table.sizes
        assert tuple(row["band_ranks"]) == table.ranks
        assert row["params_embedding"] == table.parameters


def test_a_starts_from_the_table_its_mean_and_order_with_blocks_of_its_own(
    weights, table
):
    a, d = weights("gpt_pca_k8"), weights("gpt_baseline", 6)
    for (wte, scale), part in zip(parts(a), table.tables, strict=True):
        np.testing.assert_array_equal(wte, getattr(part, "wte", part))
        np.testing.assert_array_equal(scale, getattr(part, "scale", None))
    position = a["constants/embed/position_of_token"]
    np.testing.assert_array_equal(table.order[position], np.arange(97))
    c = weights("gpt_random_lowrank_k8")
    np.testing.assert_allclose(
        a["params/wpe"] - c["params/wpe"], [table.mean] * 16, atol=1e-6
    )
    block = "params/block_0/mlp/fc/kernel"
    np.testing.assert_array_equal(a[block], c[block])
    assert not np.allclose(a[block], d[block])


def test_b_starts_from_the_table_and_all_else_of_d(weights, table):
    b, d = weights("gpt_pca_finetune_k8"), weights("gpt_baseline", 6)
    a = weights("gpt_pca_k8")
    for path, array in embedding(a).items():
        np.testing.assert_array_equal(b[path], array)
    for path, array in d.items():
        if "/embed/" not in path and path != "params/wpe":
            np.testing.assert_array_equal(b[path], array, err_msg=path)
    np.testing.assert_allclose(b["params/wpe"], d["params/wpe"] + table.mean, atol=1e-7)


def test_the_distilled_b_starts_where_b_does_and_learns_from_d(banded, weights):
    b, distilled = weights("gpt_pca_finetune_k8"), weights("gpt_pca_distill_k8")
    for path, array in b.items():
        np.testing.assert_array_equal(distilled[path], array)
    workdir = Path(banded.workdir)
    record = run_folder.read_config(workdir / "gpt_pca_distill_k8")
    assert record["distill"]["teacher"] == str(workdir / "gpt_baseline")
    for run in ("gpt_pca_finetune_k8", "gpt_baseline_continued"):
        assert run_folder.read_config(workdir / run)["distill"]["teacher"] == ""


def test_c_shares_the_bands_and_the_order_and_no_number(weights):
    a, c = weights("gpt_pca_k8"), weights("gpt_random_lowrank_k8")
    order = "constants/embed/position_of_token"
    np.testing.assert_array_equal(a[order], c[order])
    for (one, _), (other, _) in zip(parts(a), parts(c), strict=True):
        assert one.shape == other.shape
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5
        assert other.std() == pytest.approx(0.02, rel=0.3)  # As the model makes them.


@pytest.mark.parametrize(
    ("run", "keeps"),
    [
        ("gpt_random_std_k8", lambda w, s: [np.sqrt(np.mean(w**2))]),
        (
            "gpt_random_spectrum_k8",
            lambda w, s: np.linalg.svd(w if s is None else w @ s)[1],
        ),
        ("gpt_pca_shuffled_k8", lambda w, s: np.sort(w, axis=0)),
    ],
)
def test_a_control_is_a_with_one_thing_kept(run, keeps, weights):
    a, found = weights("gpt_pca_k8"), weights(run)
    same = {path: array for path, array in a.items() if "/band_" not in path}
    for path, array in same.items():  # Blocks, mean and order too.
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    tolerance = {"rtol": 0.5} if "std" in run else {"atol": 1e-5}
    for one, other in zip(parts(a), parts(found), strict=True):
        assert not np.allclose(one[0], other[0], atol=1e-3)
        np.testing.assert_allclose(keeps(*other), keeps(*one), **tolerance)


def test_d_trained_on_starts_at_d_s_last_loss_with_b_s_budget(banded):
    results = json.loads((Path(banded.workdir) / "results.json").read_text())
    rows = {row["letter"]: row for row in results["rows"]}
    assert rows["D+"]["added_at_start"] == 0
    for name in ("tokens_seen", "learning_rate", "tokens_with_baseline"):
        assert rows["D+"][name] == rows["B"][name] == rows["Bd"][name]
    assert rows["B"]["added_at_start"] == rows["Bd"]["added_at_start"]


@pytest.mark.parametrize("run", ["gpt_pca_k8", "gpt_random_lowrank_k8"])
def test_a_run_in_bands_is_evaluated_like_any_other(run, banded):
    path = str(Path(banded.workdir) / run)
    found = evaluate_run(changed(banded, task="evaluate", model_path=path))
    assert found["loss"] == run_folder.read_result(Path(path))["val_loss"]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "continued"])
def test_an_arm_trained_alone_is_that_of_the_experiment(arm, banded):
    """Either command finds the other's run, given the same knobs."""
    config = changed(banded, task="train", arm=arm, **{"model.n_embd_wte": 8})
    (*needed, last) = make_plan(config).jobs
    assert last.folder.name == arms.ARMS[arm].run_name.format(rank=8)
    assert {job.status() for job in (*needed, last)} == {"done"}


def test_d_trained_on_alone_is_that_of_the_experiment(banded):
    assert status(changed(banded, task="train", arm="continued")) == "done"


def test_finished_runs_in_bands_outlive_their_factors(banded, tmp_path):
    workdir = shutil.copytree(banded.workdir, tmp_path / "runs")
    shutil.rmtree(workdir / "pca_factorized")
    config = changed(banded, task="train", arm="pca", workdir=str(workdir))
    assert status(changed(config, **{"model.n_embd_wte": 8})) == "done"


def test_another_number_of_bands_is_another_factorization(banded):
    config = changed(banded, **{"factorize.bands": 2})
    with pytest.raises(UserError, match="bands differ"):
        experiment.describe(make_plan(config))


def test_a_rank_too_small_for_the_bands_is_refused_before_any_arm(banded, tmp_path):
    workdir = tmp_path / "runs"
    finished = Path(banded.workdir)
    shutil.copytree(finished / "gpt_baseline", workdir / "gpt_baseline")
    config = changed(banded, workdir=str(workdir), ranks=(1,))
    with pytest.raises(UserError, match="rank 1 of 97 tokens is too small for 3 bands"):
        execute(config)
    assert sorted(path.name for path in workdir.iterdir()) == ["gpt_baseline"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"experiment.arms": "pca,svd"}, "experiment.arms holds 'svd': besides D"),
        ({"experiment.arms": "pca,baseline"}, "experiment.arms holds 'baseline'"),
        ({"experiment.arms": "pca,pca"}, "each may appear once"),
        ({"init.keep": "some"}, "init.keep is 'some': it must be one of all, std"),
    ],
)
def test_arms_that_are_none_are_refused(asked, says, tiny_config):
    with pytest.raises(UserError, match=says):
        knobs.validate(changed(tiny_config, task="experiment", **asked))


def test_what_is_kept_of_factors_needs_factors(tiny_config, tmp_path):
    config = changed(
        tiny_config, arm="random", **{"model.n_embd_wte": 8, "init.keep": "rows"}
    )
    with pytest.raises(UserError, match="import both factors, or a table in bands"):
        training(config)
    with pytest.raises(UserError, match="of bands: set init.import_bands"):
        training(changed(config, **{"init.keep": "shape"}))


def test_bands_of_another_model_are_refused(banded, tiny_config):
    folder = factor_files.bands_path(Path(banded.workdir) / "pca_factorized", 8)
    config = changed(
        tiny_config,
        arm="pca",
        **{"model.n_embd_wte": 8, "init.import_bands": str(folder)},
        **{"model.n_embd": 64},
    )
    with pytest.raises(UserError, match=r"width 32, this model's bands .* width 64"):
        execute(config)


@pytest.mark.parametrize("tying", [True, False])
def test_a_table_in_bands_is_imported_from_any_folder(
    tying, banded, tiny_config, table
):
    folder = factor_files.bands_path(Path(banded.workdir) / "pca_factorized", 8)
    config = changed(
        tiny_config,
        arm="pca",
        **{"model.n_embd_wte": 8, "init.import_bands": str(folder)},
        **{"model.n_embd_wte_scale_tying": tying, "init.import_wte_freeze": True},
    )
    (job,) = make_plan(config).jobs
    run = training(changed(job.settled(), task="train"))
    state, _ = start(run)
    flat = trees.flatten(state.params)
    for number, part in enumerate(table.tables):
        scale = getattr(part, "scale", None)
        for name in ("scale_up", "scale_down"):
            path = f"embed/band_{number}/{name}"
            there = scale is not None and (name == "scale_up" or not tying)
            assert (path in flat) == there
            if there:
                np.testing.assert_array_equal(flat[path], scale)
    assert run.frozen


def test_a_and_c_can_have_learning_rates_of_their_own(tiny_config):
    config = changed(
        tiny_config,
        task="experiment",
        **{"experiment.arms": "pca,random,pca_finetune,shuffled"},
        **{"scratch.pca_learning_rate_share": 2.0},
        **{"scratch.random_learning_rate_share": 0.25, "train.learning_rate": 1e-3},
    )
    jobs = [job for job in make_plan(config).jobs if hasattr(job.config, "train")]
    rates = {
        job.config.arm: job.config.train.learning_rate
        for job in jobs
        if job.folder.name.startswith("gpt")
    }
    assert rates == pytest.approx(
        {
            **{"baseline": 1e-3, "pca": 2e-3, "shuffled": 2e-3, "random": 2.5e-4},
            "pca_finetune": 5e-4,
        }
    )


@pytest.mark.parametrize(
    "other",
    [
        {"factorize.bands": 2},
        {"factorize.method": "kl"},
        {"factorize.singular_value_split": 0.5},
        {"compress.calibration_tokens": 256},
    ],
)
def test_a_finished_run_notices_factors_that_are_asked_for_otherwise(other, banded):
    config = changed(banded, task="train", arm="pca", **{"model.n_embd_wte": 8})
    with pytest.raises(UserError, match=r"holds another factorization"):
        experiment.describe(make_plan(changed(config, **other)))


def test_a_finished_run_is_made_anew_from_other_factors_if_asked(banded, tmp_path):
    workdir = shutil.copytree(banded.workdir, tmp_path / "runs")
    config = changed(banded, task="train", arm="pca", workdir=str(workdir))
    config = changed(config, overwrite=True, **{"model.n_embd_wte": 8})
    execute(changed(config, **{"factorize.bands": 2}))
    found = run_folder.read_config(workdir / "gpt_pca_k8")["model"]["band_sizes"]
    table = factor_files.read_bands(
        factor_files.bands_path(workdir / "pca_factorized", 8)
    )
    assert tuple(found) == table.sizes


def test_compressing_d_otherwise_leaves_its_experiment_done(banded, tmp_path):
    workdir = shutil.copytree(banded.workdir, tmp_path / "runs")
    config = changed(banded, workdir=str(workdir))
    sweep = changed(
        config,
        task="compress",
        model_path=str(workdir / "gpt_baseline"),
        **{"data.source": "", "compress.methods": "kl", "compress.bands": (1,)},
        **{"compress.bits": (), "compress.calibration_tokens": 256},
    )
    compress.compress(sweep, "a command")
    assert len(list((workdir / "gpt_baseline").glob("statistics_*"))) == 2
    assert all(job.status() == "done" for job in make_plan(config).jobs)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            {"arm": "random", "factorize.bands": 3},
            "model.band_sizes is set beside factorize.bands",
        ),
        (
            {"arm": "random", "init.import_bands": "there"},
            "model.band_sizes is set beside init.import_bands",
        ),
    ],
)
def test_bands_are_decided_in_one_place(asked, says, tiny_config):
    bands = {"model.band_sizes": (20, 77), "model.band_ranks": (8, 4)}
    with pytest.raises(UserError, match=says):
        knobs.validate(changed(tiny_config, **bands, **asked))


def test_an_experiment_takes_no_table_in_bands_from_elsewhere(tiny_config):
    config = changed(tiny_config, task="experiment", **{"init.import_bands": "there"})
    with pytest.raises(UserError, match="makes a table of its own for each rank"):
        knobs.validate(config)
