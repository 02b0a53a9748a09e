"""The graph of runs: what is planned, made, skipped and reported."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import (
    changed,
    execute,
    snapshot,
    without_timings,
)

from pcagpt import config as knobs
from pcagpt.errors import UserError
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.plan import make_plan
from pcagpt.pipeline.train_job import TrainJob
from pcagpt.run import folder as run_folder

RESULT_FIELDS = {
    *("run", "arm", "rank", "seed", "status", "steps", "tokens_seen", "seconds"),
    *("val_loss", "perplexity", "word_perplexity", "bits_per_byte"),
    *("ln_f_cosine", "ln_f_cosine_p05", "ln_f_cosine_d"),
    *("params_total", "params_embedding"),
    *("compression_embedding", "compression_total"),
    *("tokens_per_second", "peak_bytes", "device", "versions"),
    *("config_sha256", "git_commit", "protocol"),
}
PROTOCOL_FIELDS = {
    *("split", "window", "stride", "tokens_predicted", "windows"),
    *("tokenizer", "tokenizer_sha256"),
}
RUNS = (
    "gpt_baseline",
    "gpt_pca_k8",
    "gpt_random_lowrank_k8",
    "gpt_pca_finetune_k8",
)


def names(config):
    """The folders of the planned jobs, in order."""
    return [job.folder.name for job in make_plan(config).jobs]


def job_of(config, name):
    (job,) = (
        job
        for job in make_plan(config).jobs
        if isinstance(job, TrainJob) and job.folder.name == name
    )
    return job


def budget(config, name):
    train = job_of(config, name).config.train
    return train.steps, train.warmup_steps, train.learning_rate


@pytest.fixture
def planned(tiny_config):
    return changed(tiny_config, task="experiment")


@pytest.fixture
def results(finished_experiment):
    """{run: result.json} of the four."""
    workdir = Path(finished_experiment.workdir)
    return {run: run_folder.read_result(workdir / run) for run in RUNS}


# Plans


def test_an_experiment_makes_d_the_factorization_a_c_and_b_in_this_order(planned):
    assert names(planned) == [
        "gpt_baseline",
        "pca_factorized",
        "gpt_pca_k8",
        "gpt_random_lowrank_k8",
        "gpt_pca_finetune_k8",
    ]
    assert make_plan(planned).reported == RUNS


def test_several_ranks_share_one_baseline_and_one_factorization(planned):
    planned.ranks = (4, 16)
    assert names(planned) == [
        "gpt_baseline",
        "pca_factorized",
        *("gpt_pca_k4", "gpt_random_lowrank_k4", "gpt_pca_finetune_k4"),
        *("gpt_pca_k16", "gpt_random_lowrank_k16", "gpt_pca_finetune_k16"),
    ]
    factorization = make_plan(planned).jobs[1]
    assert factorization.ranks == (4, 16)
    assert factorization.source == Path(planned.workdir) / "gpt_baseline"
    models = [job_of(planned, name).config.model for name in names(planned)[2:]]
    assert [model.n_embd_wte for model in models] == [4, 4, 4, 16, 16, 16]


def test_a_run_is_planned_after_what_it_needs(tiny_config):
    needed = {
        "baseline": ["gpt_baseline"],
        "random": ["gpt_random_lowrank_k8"],
        "pca": ["gpt_baseline", "pca_factorized", "gpt_pca_k8"],
        "pca_finetune": ["gpt_baseline", "pca_factorized", "gpt_pca_finetune_k8"],
    }
    for arm, wanted in needed.items():
        rank = {} if arm == "baseline" else {"model.n_embd_wte": 8}
        assert names(changed(tiny_config, arm=arm, **rank)) == wanted


def test_a_run_whose_imports_are_given_needs_nothing_else(tiny_config):
    given = {"init.import_wte_npy": "table.npy", "model.n_embd_wte": 8}
    assert names(changed(tiny_config, arm="pca", **given)) == ["gpt_pca_k8"]
    finetuned = changed(tiny_config, arm="pca_finetune", **given)
    assert names(finetuned) == ["gpt_baseline", "gpt_pca_finetune_k8"]
    finetuned.init.blocks_from = "somewhere"
    assert names(finetuned) == ["gpt_pca_finetune_k8"]


def test_in_an_experiment_b_gets_its_share_of_the_budget(planned):
    planned.update_from_flattened_dict(
        {"train.steps": 1000, "train.warmup_steps": 100, "train.learning_rate": 4e-3}
        | {"finetune.steps_share": 0.2, "finetune.learning_rate_share": 0.25}
    )
    for name in ("gpt_baseline", "gpt_pca_k8", "gpt_random_lowrank_k8"):
        assert budget(planned, name) == (1000, 100, 4e-3)
    assert budget(planned, "gpt_pca_finetune_k8") == (200, 20, 1e-3)


def test_b_on_its_own_plans_what_the_experiment_does(tiny_config):
    b = changed(
        tiny_config,
        arm="pca_finetune",
        **{"model.n_embd_wte": 8, "train.steps": 1000, "train.warmup_steps": 100},
        **{"train.learning_rate": 4e-3},
        **{"finetune.steps_share": 0.2, "finetune.learning_rate_share": 0.25},
    )
    assert budget(b, "gpt_baseline") == (1000, 100, 4e-3)
    assert budget(b, "gpt_pca_finetune_k8") == (200, 20, 1e-3)


def test_b_trained_alone_is_the_b_of_the_experiment(finished_experiment):
    """Either command finds the other's run, given the same knobs."""
    b = changed(finished_experiment, task="train", arm="pca_finetune")
    b.model.n_embd_wte = 8
    assert job_of(b, "gpt_pca_finetune_k8").status() == "done"


def test_the_baseline_of_any_arm_is_plain(tiny_config):
    arm = changed(
        tiny_config,
        arm="pca",
        **{"model.n_embd_wte": 8, "init.import_wte_freeze": True},
    )
    baseline = job_of(arm, "gpt_baseline").config
    assert (baseline.arm, baseline.model.n_embd_wte) == ("baseline", None)
    assert baseline.init == knobs.base().init


def test_what_is_imported_and_frozen_in_an_experiment_does_not_touch_d_and_c(planned):
    planned.init.import_wte_npy = "given.npy"
    planned.init.import_wte_freeze = True
    for name in ("gpt_baseline", "gpt_random_lowrank_k8"):
        assert job_of(planned, name).config.init == knobs.base().init
    for name in ("gpt_pca_k8", "gpt_pca_finetune_k8"):
        init = job_of(planned, name).config.init
        assert (init.import_wte_npy, init.import_wte_freeze) == ("given.npy", True)


def test_every_seed_gets_runs_of_its_own(planned):
    planned.experiment.seeds = (1, 5)
    plan = make_plan(planned)
    plain = names(changed(planned, **{"experiment.seeds": ()}))
    assert names(planned) == [*plain, *(f"{name}_seed5" for name in plain)]
    assert plan.reported == (*RUNS, *(f"{run}_seed5" for run in RUNS))
    b = job_of(planned, "gpt_pca_finetune_k8_seed5").config
    assert b.seed == 5
    assert b.init.blocks_from == f"{planned.workdir}/gpt_baseline_seed5"
    assert b.init.import_wte_npy.startswith(f"{planned.workdir}/pca_factorized_seed5/")


def test_planning_writes_nothing(planned):
    experiment.describe(make_plan(planned))
    assert not Path(planned.workdir).exists()


# The finished experiment


def test_every_result_has_all_its_fields_and_finite_losses(results):
    for run, result in results.items():
        assert result.keys() >= RESULT_FIELDS
        assert result["protocol"].keys() >= PROTOCOL_FIELDS
        assert (result["run"], result["status"], result["seed"]) == (run, "done", 1)
        assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]))
        assert 3 < result["val_loss"] < math.log(97) + 0.1
        assert result["versions"].keys() >= {"jax", "flax", "optax", "python"}
        assert len(result["config_sha256"]) == 64
        assert result["seconds"] > 0
        assert result["tokens_per_second"] > 0
        assert result["peak_bytes"] > 0


def test_results_hold_what_each_arm_is_and_was_trained_on(results):
    found = {
        run: [r[name] for name in ("arm", "rank", "steps", "tokens_seen")]
        for run, r in results.items()
    }
    assert found == {
        "gpt_baseline": ["baseline", None, 6, 6 * 8 * 16],
        "gpt_pca_k8": ["pca", 8, 6, 6 * 8 * 16],
        "gpt_random_lowrank_k8": ["random", 8, 6, 6 * 8 * 16],
        "gpt_pca_finetune_k8": ["pca_finetune", 8, 3, 3 * 8 * 16],
    }


def test_results_count_real_rows_and_compare_with_the_full_table(results):
    full, low = 97 * 32, 97 * 8 + 8 * 32
    assert results["gpt_baseline"]["params_embedding"] == full
    assert results["gpt_baseline"]["compression_total"] == 1
    a = results["gpt_pca_k8"]
    assert a["params_embedding"] == low
    assert a["compression_embedding"] == pytest.approx(full / low)
    total = results["gpt_baseline"]["params_total"]
    assert a["params_total"] == total - full + low
    assert a["compression_total"] == pytest.approx(total / a["params_total"])


def test_results_state_the_protocol(results):
    protocol = results["gpt_pca_k8"]["protocol"]
    assert protocol["split"] == "val"
    assert protocol["window"] == protocol["stride"] == 16
    assert protocol["tokens_predicted"] == 1002
    assert protocol["windows"] == 63
    assert protocol["tokenizer"] is None


def test_window_losses_add_up_to_the_loss(finished_experiment, results):
    for run in RUNS:
        losses = run_folder.read_window_losses(Path(finished_experiment.workdir) / run)
        assert losses.shape == (63, 2)
        nats, targets = losses.sum(axis=0)
        assert targets == 1002
        assert nats / targets == pytest.approx(results[run]["val_loss"], rel=1e-12)


def test_the_report_holds_the_four_runs(finished_experiment, results):
    workdir = Path(finished_experiment.workdir)
    written = json.loads((workdir / "results.json").read_text())
    losses = {row["run"]: row["val_loss"] for row in written["rows"]}
    assert losses == {run: result["val_loss"] for run, result in results.items()}
    assert "a command" in (workdir / "report.md").read_text()
    assert "<html" in (workdir / "report.html").read_text()
    assert list((workdir / "plots").glob("*.png"))


@pytest.mark.usefixtures("quick")
def test_repeating_a_finished_experiment_trains_nothing(finished_experiment, tmp_path):
    again = changed(finished_experiment, workdir=str(tmp_path / "again"))
    shutil.copytree(finished_experiment.workdir, again.workdir)
    folders = [Path(again.workdir) / name for name in (*RUNS, "pca_factorized")]
    before = [snapshot(folder) for folder in folders]
    (Path(again.workdir) / "report.md").unlink()
    execute(again)
    assert [snapshot(folder) for folder in folders] == before
    assert (Path(again.workdir) / "report.md").exists()


@pytest.mark.usefixtures("quick")
def test_an_experiment_makes_only_what_is_missing(finished_experiment, tmp_path):
    again = changed(finished_experiment, workdir=str(tmp_path / "again"))
    shutil.copytree(finished_experiment.workdir, again.workdir)
    workdir = Path(again.workdir)
    shutil.rmtree(workdir / "gpt_random_lowrank_k8")
    kept = [workdir / run for run in RUNS if "random" not in run]
    before = [snapshot(folder) for folder in kept]
    execute(again)
    assert [snapshot(folder) for folder in kept] == before
    found, wanted = (
        run_folder.read_result(Path(root) / "gpt_random_lowrank_k8")
        for root in (workdir, finished_experiment.workdir)
    )
    assert without_timings(found) == without_timings(wanted)


# Prerequisites


def test_a_missing_baseline_is_refused_with_its_command_when_builds_are_off(
    tiny_config,
):
    config = changed(
        tiny_config, arm="pca", build_prerequisites=False, **{"model.n_embd_wte": 8}
    )
    with pytest.raises(UserError) as caught:
        execute(config)
    message = str(caught.value)
    assert "gpt_baseline is not trained and build_prerequisites is off" in message
    command = "python -m pcagpt.main --config=configs/baseline.py"
    assert f"it with: {command}" in message
    assert f"--config.workdir={config.workdir}" in message
    assert "\n" not in message
    assert not Path(config.workdir).exists()


@pytest.mark.usefixtures("quick")
def test_a_finished_baseline_is_used_whatever_its_budget_was(
    finished_experiment, tiny_config
):
    workdir = Path(tiny_config.workdir)
    source = Path(finished_experiment.workdir) / "gpt_baseline"
    shutil.copytree(source, workdir / "gpt_baseline")
    before = snapshot(workdir / "gpt_baseline")
    config = changed(
        tiny_config,
        arm="pca",
        **{"model.n_embd_wte": 8, "train.steps": 2, "train.learning_rate": 1e-3},
    )
    run_dir = execute(config)
    assert run_folder.read_result(run_dir)["steps"] == 2
    assert snapshot(workdir / "gpt_baseline") == before


def test_runs_of_other_tokens_are_not_reported_together(tiny_config, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(tiny_config.data.source, folder)
    tiny_config.data.source = str(folder)
    execute(tiny_config)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[:-100].tofile(folder / "train.bin")
    with pytest.raises(UserError, match="gpt_baseline was trained on other tokens"):
        execute(changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8}))
    assert not (Path(tiny_config.workdir) / "gpt_pca_k8").exists()
