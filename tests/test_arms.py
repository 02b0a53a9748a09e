"""Every arm of an experiment, in several bands: what it takes from D, and what not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import (
    changed,
    described,
    execute,
    job,
    plan,
    quick_compiles,
    setup,
    start,
    write_statistics,
)

from pcagpt import arms, trees
from pcagpt.config import Settings
from pcagpt.errors import UserError
from pcagpt.factorization import BandFactors, FactorizedTable, Factorizer, factor_files
from pcagpt.json_files import write_json
from pcagpt.pipeline.compress import compress
from pcagpt.pipeline.evaluate import evaluate
from pcagpt.run import calibrate, initialise
from pcagpt.run.checkpoint import load_weights, save_weights
from pcagpt.run.folder import read_record, read_result, write_record
from pcagpt.run.identity import identity

pytestmark = pytest.mark.usefixtures("quick")
ARMS = [arm for arm in arms.ARMS if arm != "baseline"]
RANKED = [arm for arm in ARMS if arm != "continued"]
IN_BANDS = {
    "experiment.arms": ",".join(ARMS),
    "factorize.method": "freq",  # With so few tokens, bands help no other method.
    "factorize.bands": 3,
    "compress.calibration_tokens": 512,
}


def alone(config, arm, **knobs):
    """The config of one arm of an experiment."""
    rank = {} if arm == "continued" else {"model.n_embd_wte": 8}
    return changed(config, task="train", arm=arm, **rank, **knobs)


@pytest.fixture(scope="module")
def planned(finished_experiment, compiled, tmp_path_factory):
    """An experiment of all arms in bands; D and its factorization are done."""
    workdir = tmp_path_factory.mktemp("banded") / "runs"
    finished = Path(finished_experiment.workdir)
    shutil.copytree(finished / "gpt_baseline", workdir / "gpt_baseline")
    config = changed(finished_experiment, workdir=str(workdir), **IN_BANDS)
    model_path = str(workdir / "gpt_baseline")
    with quick_compiles(compiled):
        execute(changed(config, task="factorize", model_path=model_path))
    return config


@pytest.fixture(scope="module")
def starts(planned, compiled, tmp_path_factory):
    """A function: {path: array} of what an arm starts from."""
    known = {}

    def of(arm):
        if arm not in known:
            with quick_compiles(compiled):
                state, _ = start(
                    setup(alone(planned, arm)), tmp_path_factory.mktemp(arm)
                )
            flat = trees.flatten(state.variables)
            known[arm] = {path: np.asarray(leaf) for path, leaf in flat.items()}
        return known[arm]

    return of


@pytest.fixture
def trained(planned):
    """{path: array} of D."""
    return trees.flatten(load_weights(Path(planned.workdir) / "gpt_baseline"))


def bands_of(config):
    return factor_files.bands_path(Path(config.workdir) / "pca_factorized", 8)


@pytest.fixture
def table(planned):
    """What was factorized, as it was written."""
    return factor_files.read_bands(bands_of(planned))


def parts(flat):
    """(wte without padding rows, scale) of each band."""
    bands = sorted({path.split("/")[2] for path in flat if "/band_" in path})
    found, left = [], 97
    for band in bands:
        wte = flat[f"params/embed/{band}/wte"][:left]
        left -= len(wte)
        found.append((wte, flat.get(f"params/embed/{band}/scale_up")))
    return found


# Where each arm starts


def test_a_starts_from_the_table_its_mean_and_order_with_blocks_of_its_own(
    starts, trained, table
):
    a, c = starts("pca"), starts("random")
    for (wte, scale), band in zip(parts(a), table.bands, strict=True):
        np.testing.assert_array_equal(wte, band.wte)
        np.testing.assert_array_equal(scale, band.scale)
    position = a["constants/embed/position_of_token"]
    np.testing.assert_array_equal(table.order[position], np.arange(97))
    np.testing.assert_allclose(
        a["params/wpe"] - c["params/wpe"], [table.mean] * 16, atol=1e-6
    )
    block = "params/block_0/mlp/fc/kernel"
    np.testing.assert_array_equal(a[block], c[block])
    assert not np.allclose(a[block], trained[block])


def test_b_starts_from_the_table_and_all_other_weights_of_d(starts, trained, table):
    a, b = starts("pca"), starts("pca_finetune")
    for path, array in a.items():
        if "/embed/" in path:
            np.testing.assert_array_equal(b[path], array)
    for path, array in trained.items():
        if "/embed/" not in path and path != "params/wpe":
            np.testing.assert_array_equal(b[path], array, err_msg=path)
    np.testing.assert_allclose(
        b["params/wpe"], trained["params/wpe"] + table.mean, atol=1e-7
    )


def test_the_distilled_b_starts_where_b_does_and_learns_from_d(planned, starts):
    for path, array in starts("pca_finetune").items():
        np.testing.assert_array_equal(starts("pca_distill")[path], array)
    baseline = str(Path(planned.workdir) / "gpt_baseline")
    teachers = {arm: job(alone(planned, arm)).settings.distill.teacher for arm in ARMS}
    assert teachers == dict.fromkeys(ARMS, "") | {"pca_distill": baseline}


def test_d_trained_further_starts_as_d(starts, trained):
    found = starts("continued")
    assert found.keys() == trained.keys()
    for path, array in trained.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_c_shares_the_bands_and_the_order_and_no_number(starts):
    a, c = starts("pca"), starts("random")
    order = "constants/embed/position_of_token"
    np.testing.assert_array_equal(a[order], c[order])
    for (one, _), (other, _) in zip(parts(a), parts(c), strict=True):
        assert one.shape == other.shape
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5
        assert other.std() == pytest.approx(0.02, rel=0.3)  # As the model makes them.


@pytest.mark.parametrize(
    ("arm", "keeps"),
    [
        ("random_std", lambda w, s: [np.sqrt(np.mean(w**2))]),
        (
            "random_spectrum",
            lambda w, s: np.linalg.svd(w if s is None else w @ s)[1],
        ),
        ("shuffled", lambda w, s: np.sort(w, axis=0)),
    ],
)
def test_a_control_keeps_one_property_of_the_factors_of_a(arm, keeps, starts):
    a, found = starts("pca"), starts(arm)
    same = {path: array for path, array in a.items() if "/band_" not in path}
    for path, array in same.items():  # Blocks, mean and order too.
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    tolerance = {"rtol": 0.5} if arm == "random_std" else {"atol": 1e-5}
    for one, other in zip(parts(a), parts(found), strict=True):
        assert not np.allclose(one[0], other[0], atol=1e-3)
        np.testing.assert_allclose(keeps(*other), keeps(*one), **tolerance)


@pytest.mark.parametrize("tying", [True, False])
def test_a_table_in_bands_is_imported_from_any_folder(
    tying, planned, tiny_config, table, tmp_path
):
    given = {"init.import_bands": str(bands_of(planned)), "model.n_embd_wte": 8}
    given |= {"model.n_embd_wte_scale_tying": tying, "init.import_wte_freeze": True}
    config = changed(tiny_config, arm="pca", **given)
    assert len(plan(config).jobs) == 1
    made = setup(config)
    state, _ = start(made, tmp_path / "run")
    flat = trees.flatten(state.params)
    for number, band in enumerate(table.bands):
        for name in ("scale_up", "scale_down"):
            path = f"embed/band_{number}/{name}"
            exists = band.scale is not None and (name == "scale_up" or not tying)
            assert (path in flat) == exists
            if exists:
                np.testing.assert_array_equal(flat[path], band.scale)
    assert made.optimizer.frozen


# What is planned


def test_all_arms_are_planned_once_after_d_and_its_factorization(planned):
    jobs = plan(planned).jobs
    names = [job.folder.name for job in jobs]
    assert names[:3] == ["gpt_baseline", "pca_factorized", "gpt_baseline_continued"]
    assert names[3:] == [arms.ARMS[arm].run_name.format(rank=8) for arm in RANKED]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trained_alone_is_that_of_the_experiment(arm, planned):
    """Either command finds the other's run, given the same knobs."""
    (*needed, run) = plan(alone(planned, arm)).jobs
    (same,) = (job for job in plan(planned).jobs if job.folder == run.folder)
    assert identity(run.record()) == identity(same.record())
    assert {job.status().words for job in needed} == {"done"}


@pytest.mark.parametrize("arm", ["baseline", "continued", "pca"])
def test_a_full_table_has_no_scale_matrices_to_tie(arm, planned):
    untied = changed(planned, **{"model.n_embd_wte_scale_tying": False})
    assert plan(untied).jobs[0].status().words == "done"  # D
    rank = 8 if arm == "pca" else None
    made = (
        job(changed(config, task="train", arm=arm, **{"model.n_embd_wte": rank}))
        for config in (planned, untied)
    )
    one, other = (identity(run.record()) for run in made)
    assert (one == other) == (arm != "pca")


def test_a_and_c_can_have_learning_rates_of_their_own(planned):
    shares = {"scratch.pca_learning_rate_share": 2.0, "train.learning_rate": 1e-3}
    shares |= {"scratch.random_learning_rate_share": 0.25}
    _, factorization, *_ = jobs = plan(changed(planned, **shares)).jobs
    found = {
        job.settings.arm: job.settings.train.learning_rate
        for job in jobs
        if job is not factorization
    }
    controls = ("pca", "shuffled", "random_std", "random_spectrum")
    assert found == pytest.approx(
        {**dict.fromkeys(controls, 2e-3), "baseline": 1e-3, "random": 2.5e-4}
        | dict.fromkeys(("continued", "pca_finetune", "pca_distill"), 5e-4)
    )


# What is done


@pytest.fixture
def finished(planned, tmp_path):
    """The config of A in bands, with a folder that looks finished."""
    workdir = shutil.copytree(planned.workdir, tmp_path / "runs")
    config = alone(planned, "pca", workdir=str(workdir))
    run = job(config)
    write_record(run.folder, run.record())
    write_json(run.folder / "result.json", {"status": "done"})
    save_weights(run.folder, {"params": {"wpe": np.zeros(1)}, "constants": {}})
    return config


def test_a_finished_run_in_bands_outlives_its_factors(finished):
    assert job(finished).status().words == "done"
    shutil.rmtree(Path(finished.workdir) / "pca_factorized")
    assert job(finished).status().words == "done"


@pytest.mark.parametrize(
    "other",
    [
        {"factorize.bands": 2},
        {"factorize.method": "kl"},
        {"factorize.singular_value_split": 0.5},
        {"compress.calibration_tokens": 256},
    ],
)
def test_a_finished_run_notices_other_factorize_settings(other, finished):
    assert len(described(finished)) == 1
    with pytest.raises(UserError, match=r"holds another factorization"):
        described(changed(finished, **other))
    lines = described(changed(finished, overwrite=True, **other))
    assert lines[1].endswith("  to do")


# What is refused


def test_a_rank_too_small_for_the_bands_is_refused_before_any_arm(planned, tmp_path):
    workdir = tmp_path / "runs"
    baseline = Path(planned.workdir) / "gpt_baseline"
    shutil.copytree(baseline, workdir / "gpt_baseline")
    config = changed(planned, workdir=str(workdir), ranks=(1,))
    with pytest.raises(UserError, match="rank 1 of 97 tokens is too small for 3 bands"):
        execute(config)
    assert sorted(path.name for path in workdir.iterdir()) == ["gpt_baseline"]


def test_init_keep_needs_imported_factors(tiny_config, tmp_path):
    table = tmp_path / "table.npy"
    np.save(table, np.ones((97, 8)))
    given = {"model.n_embd_wte": 8, "init.import_wte_npy": str(table)}
    config = changed(tiny_config, arm="shuffled", **given)
    with pytest.raises(UserError, match="import both factors, or a table in bands"):
        setup(config)


def test_the_arm_alone_decides_what_is_kept(planned, tiny_config):
    """Otherwise a run would have the letter and the folder of another arm."""
    for config in (planned, changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8})):
        config = changed(config, **{"init.keep": "std"})
        for planned_job in plan(config).jobs:
            found = planned_job.settings
            if planned_job.folder.name.startswith("gpt_"):
                wanted = arms.ARMS[found.arm].keep
                wanted = "shape" if found.arm == "random" else wanted
                assert found.init.keep == wanted


def test_a_frozen_scale_needs_a_band_with_a_rank(tiny_config, tmp_path):
    random = np.random.default_rng(0)
    band = BandFactors(random.normal(size=(97, 32)), None)
    table = FactorizedTable.of_one_band(band)
    factor_files.write_bands(tmp_path / "full", table)
    given = {"init.import_bands": str(tmp_path / "full"), "model.n_embd_wte": 32}
    given["init.import_scale_matrices_freeze"] = True
    with pytest.raises(UserError, match="all its bands have full width: leave it out"):
        execute(changed(tiny_config, arm="pca", **given))
    assert not Path(tiny_config.workdir).exists()


def test_bands_of_another_model_are_refused(planned, tiny_config):
    given = {"init.import_bands": str(bands_of(planned)), "model.n_embd_wte": 8}
    config = changed(tiny_config, arm="pca", **given, **{"model.n_embd": 64})
    with pytest.raises(UserError, match=r"width 32, but this model has .* width 64"):
        execute(config)


def one_band(rank, folder):
    """A folder with a table of one band: of this rank, or of full width for None."""
    random, width = np.random.default_rng(0), rank or 32
    scale = rank and random.normal(size=(rank, 32))
    band = BandFactors(random.normal(size=(97, width)), scale)
    factor_files.write_bands(folder, FactorizedTable.of_one_band(band))
    return str(folder)


@pytest.mark.parametrize("arm", ["pca", "random"])
@pytest.mark.parametrize(
    ("rank", "given", "right"), [(4, 8, 4), (4, 3, 4), (None, 24, 25), (4, None, 4)]
)
def test_bands_of_another_size_than_the_rank_in_the_name_are_refused(
    rank, given, right, arm, tiny_config, tmp_path
):
    named = {"init.import_bands": one_band(rank, tmp_path / "bands")}
    config = changed(tiny_config, arm=arm, **named, **{"model.n_embd_wte": given})
    with pytest.raises(UserError, match=f"rank {right}: set .*n_embd_wte={right}$"):
        described(config)
    (line,) = described(changed(config, **{"model.n_embd_wte": right}))
    assert f"_k{right} " in line and line.endswith("to do")


@pytest.mark.parametrize("bands", [2, 3, 7])
def test_bands_that_were_made_for_a_rank_are_of_this_size(bands, tmp_path):
    """Also where all bands have full width, because the rank is high."""
    random = np.random.default_rng(0)
    table_VD = random.normal(size=(60, 24)) * random.exponential(size=(60, 1))
    write_statistics(tmp_path / "statistics.npz", 60, 24)
    statistics = calibrate.read(tmp_path / "statistics.npz", None)
    make = Factorizer(table_VD.astype(np.float32), "freq", statistics)
    for rank in range(6, 25):
        folder = tmp_path / f"bands_{rank}"
        factor_files.write_bands(folder, make.of_rank(rank, bands)[0])
        asked = {"init.import_bands": str(folder), "model.n_embd_wte": rank}
        initialise.check_rank(Settings().replace(asked))


def test_a_run_in_bands_keeps_its_rank_when_it_is_trained_further(planned, tmp_path):
    workdir = shutil.copytree(planned.workdir, tmp_path / "runs")
    a = execute(alone(planned, "pca", workdir=str(workdir)))
    one = {"init.weights_from": str(a), "factorize.bands": 1, "factorize.method": "svd"}
    further = changed(planned, task="train", arm="pca_finetune", **one)
    b = execute(changed(further, workdir=str(workdir)))
    assert [read_result(run)["rank"] for run in (a, b)] == [8, 8]


# The whole experiment


@pytest.fixture(scope="module")
def banded(planned, compiled):
    """The config of the experiment when all is trained and reported."""
    with quick_compiles(compiled):
        execute(planned)
    return planned


@pytest.fixture
def rows(banded):
    """{letter: row of results.json}."""
    results = json.loads((Path(banded.workdir) / "results.json").read_text())
    return {row["letter"]: row for row in results["rows"]}


@pytest.mark.slow
def test_the_report_has_all_arms_and_all_comparisons(banded, rows, table):
    assert list(rows) == ["D", "D+", "A", "B", "Bd", "C", "E", "F", "G"]
    results = json.loads((Path(banded.workdir) / "results.json").read_text())
    questions = {item["question"] for item in results["comparisons"]}
    assert questions == {
        *("A vs C", "A vs D", "B vs A", "B vs D", "B vs D+", "Bd vs B"),
        *("A vs E", "A vs F", "A vs G"),
    }
    text = (Path(banded.workdir) / "report.md").read_text()
    assert "8, 3 bands" in text and "Rank 8 keeps" not in text
    ranks = ", ".join(map(str, table.ranks))
    note = " (0: full width)" if 0 in table.ranks else ""
    assert f"size of rank 8 has bands of the ranks {ranks}{note}." in text
    assert all(job.status().words == "done" for job in plan(banded).jobs)


@pytest.mark.slow
def test_the_table_has_the_size_of_its_rank_and_all_runs_its_bands(rows, table):
    assert table.parameters <= 8 * (97 + 32)
    for letter, row in rows.items():
        if letter in ("D", "D+"):
            assert (row["rank"], row["band_sizes"]) == (None, [])
            continue
        assert row["rank"] == 8
        assert tuple(row["band_sizes"]) == table.sizes
        assert tuple(row["band_ranks"]) == table.ranks
        assert row["params_embedding"] == table.parameters


@pytest.mark.slow
def test_d_trained_further_starts_at_d_s_last_loss_with_b_s_budget(rows):
    assert rows["D+"]["added_at_start"] == 0
    for name in ("tokens_seen", "learning_rate", "tokens_with_baseline"):
        assert rows["D+"][name] == rows["B"][name] == rows["Bd"][name]
    assert rows["B"]["added_at_start"] == rows["Bd"]["added_at_start"]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["gpt_pca_k8", "gpt_random_lowrank_k8"])
def test_a_run_in_bands_is_evaluated_like_any_other(run, banded):
    path = Path(banded.workdir) / run
    config = changed(banded, task="evaluate", model_path=str(path))
    found = evaluate(Settings.of(config))
    assert found["loss"] == read_result(path)["val_loss"]


@pytest.mark.slow
def test_overwrite_trains_a_finished_run_again_from_other_factors(banded, tmp_path):
    workdir = shutil.copytree(banded.workdir, tmp_path / "runs")
    config = alone(banded, "pca", workdir=str(workdir), overwrite=True)
    execute(changed(config, **{"factorize.bands": 2}))
    found = read_record(workdir / "gpt_pca_k8")["model"]["band_sizes"]
    assert tuple(found) == factor_files.read_bands(bands_of(config)).sizes


@pytest.mark.slow
def test_compressing_d_with_other_settings_leaves_its_experiment_done(banded, tmp_path):
    workdir = shutil.copytree(banded.workdir, tmp_path / "runs")
    config = changed(banded, workdir=str(workdir))
    asked = {"data.source": "", "compress.methods": "kl", "compress.bands": (1,)}
    asked |= {"compress.bits": (), "compress.calibration_tokens": 256}
    baseline = workdir / "gpt_baseline"
    compressed = changed(config, task="compress", model_path=str(baseline), **asked)
    before = set(baseline.glob("statistics_*"))
    compress(Settings.of(compressed), "a command")
    assert before and len(set(baseline.glob("statistics_*")) - before) == 1
    assert all(job.status().words == "done" for job in plan(config).jobs)
