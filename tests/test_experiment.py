"""The graph of runs: what is planned, made, skipped and reported."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import (
    changed,
    described,
    execute,
    json_of,
    plan,
    snapshot,
    without_timings,
)

from pcagpt.arms import ARMS
from pcagpt.config import Settings, checks
from pcagpt.config.schema import DistillSettings, InitSettings
from pcagpt.errors import UserError
from pcagpt.json_files import write_json
from pcagpt.losses.deciles import frequency_deciles
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.report.read import read_row
from pcagpt.run import lock
from pcagpt.run.folder import read_result, read_window_losses
from pcagpt.run.lock import Lock
from pcagpt.run.trained import Run

RESULT_FIELDS = {
    *("run", "arm", "rank", "seed", "status", "steps", "tokens_seen", "seconds"),
    *("val_loss", "val_loss_by_decile"),
    *("perplexity", "word_perplexity", "bits_per_byte"),
    *("ln_f_cosine", "ln_f_cosine_p05", "ln_f_cosine_d"),
    *("params_total", "params_embedding"),
    *("compression_embedding", "compression_total"),
    *("tokens_per_second", "peak_bytes", "device", "versions"),
    *("git_commit", "protocol", "resolved"),
}
RUNS = (
    "gpt_baseline",
    "gpt_pca_k8",
    "gpt_random_lowrank_k8",
    "gpt_pca_finetune_k8",
)


def names(config):
    """The folders of the planned jobs, in order."""
    return [job.folder.name for job in plan(config).jobs]


def job_of(config, name):
    (job,) = (job for job in plan(config).jobs if job.folder.name == name)
    return job


def budget(config, name):
    train = job_of(config, name).settings.train
    return train.steps, train.warmup_steps, train.learning_rate


@pytest.fixture
def planned(tiny_config):
    return changed(tiny_config, task="experiment")


@pytest.fixture
def results(finished_experiment):
    """{run: result.json} of the four."""
    workdir = Path(finished_experiment.workdir)
    return {run: read_result(workdir / run) for run in RUNS}


@pytest.fixture
def copied(finished_experiment, tmp_path):
    """The config of a copy of the finished experiment."""
    workdir = shutil.copytree(finished_experiment.workdir, tmp_path / "copy")
    return changed(finished_experiment, workdir=str(workdir))


# Plans


def test_an_experiment_makes_d_the_factorization_a_c_and_b_in_this_order(planned):
    assert names(planned) == [
        "gpt_baseline",
        "pca_factorized",
        "gpt_pca_k8",
        "gpt_random_lowrank_k8",
        "gpt_pca_finetune_k8",
    ]
    assert plan(planned).reported == RUNS
    assert not Path(planned.workdir).exists()


def test_several_ranks_share_one_baseline_and_one_factorization(planned):
    planned.ranks = (4, 16)
    assert names(planned) == [
        "gpt_baseline",
        "pca_factorized",
        *("gpt_pca_k4", "gpt_random_lowrank_k4", "gpt_pca_finetune_k4"),
        *("gpt_pca_k16", "gpt_random_lowrank_k16", "gpt_pca_finetune_k16"),
    ]
    baseline, factorization, *arms = plan(planned).jobs
    assert factorization.settings.ranks == (4, 16)
    assert factorization.source == baseline.folder
    ranks = [job.settings.model.n_embd_wte for job in arms]
    assert ranks == [4, 4, 4, 16, 16, 16]


def test_a_run_is_planned_after_what_it_needs(tiny_config):
    needed = {
        "baseline": ["gpt_baseline"],
        "random": ["gpt_random_lowrank_k8"],
        "pca": ["gpt_baseline", "pca_factorized", "gpt_pca_k8"],
        "pca_finetune": ["gpt_baseline", "pca_factorized", "gpt_pca_finetune_k8"],
        "continued": ["gpt_baseline", "gpt_baseline_continued"],
    }
    for arm, wanted in needed.items():
        rank = {} if wanted[-1].startswith("gpt_base") else {"model.n_embd_wte": 8}
        assert names(changed(tiny_config, arm=arm, **rank)) == wanted


def test_a_run_with_given_imports_needs_no_other_job(tiny_config):
    given = {"init.import_wte_npy": "table.npy", "model.n_embd_wte": 8}
    assert names(changed(tiny_config, arm="pca", **given)) == ["gpt_pca_k8"]
    finetuned = changed(tiny_config, arm="pca_finetune", **given)
    assert names(finetuned) == ["gpt_baseline", "gpt_pca_finetune_k8"]
    finetuned.init.blocks_from = "somewhere"
    assert names(finetuned) == ["gpt_pca_finetune_k8"]


def test_b_gets_its_share_of_the_budget_in_an_experiment_and_alone(planned):
    planned.update_from_flattened_dict(
        {"train.steps": 1000, "train.warmup_steps": 100, "train.learning_rate": 4e-3}
        | {"finetune.steps_share": 0.2, "finetune.learning_rate_share": 0.25}
    )
    for name in ("gpt_baseline", "gpt_pca_k8", "gpt_random_lowrank_k8"):
        assert budget(planned, name) == (1000, 100, 4e-3)
    alone = {"task": "train", "arm": "pca_finetune", "model.n_embd_wte": 8}
    for config in (planned, changed(planned, **alone)):
        assert budget(config, "gpt_baseline") == (1000, 100, 4e-3)
        assert budget(config, "gpt_pca_finetune_k8") == (200, 20, 1e-3)


def test_b_trained_alone_is_the_b_of_the_experiment(finished_experiment):
    """Either command finds the other's run, given the same knobs."""
    b = changed(finished_experiment, task="train", arm="pca_finetune")
    b.model.n_embd_wte = 8
    assert job_of(b, "gpt_pca_finetune_k8").status().words == "done"


def test_the_baseline_of_any_arm_is_plain(tiny_config):
    given = {"init.import_wte_freeze": True, "distill.share": 0.5}
    config = changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8}, **given)
    baseline = job_of(config, "gpt_baseline").settings
    assert (baseline.arm, baseline.model.n_embd_wte) == ("baseline", None)
    assert baseline.init == InitSettings()
    assert baseline.distill == DistillSettings()


def test_imports_and_freezes_of_an_experiment_do_not_touch_d_and_c(planned):
    planned.init.import_wte_npy = "given.npy"
    planned.init.import_wte_freeze = True
    for name in ("gpt_baseline", "gpt_random_lowrank_k8"):
        assert job_of(planned, name).settings.init == InitSettings()
    for name in ("gpt_pca_k8", "gpt_pca_finetune_k8"):
        init = job_of(planned, name).settings.init
        assert (init.import_wte_npy, init.import_wte_freeze) == ("given.npy", True)


def test_every_seed_gets_runs_of_its_own(planned):
    planned.experiment.seeds = (1, 5)
    plain = names(changed(planned, **{"experiment.seeds": ()}))
    assert names(planned) == [*plain, *(f"{name}_seed5" for name in plain)]
    assert plan(planned).reported == (*RUNS, *(f"{run}_seed5" for run in RUNS))
    b = job_of(planned, "gpt_pca_finetune_k8_seed5").settings
    assert b.seed == 5
    assert b.init.blocks_from == f"{planned.workdir}/gpt_baseline_seed5"
    assert b.init.import_wte_npy.startswith(f"{planned.workdir}/pca_factorized_seed5/")


# The finished experiment


def test_every_result_has_all_its_fields_and_finite_losses(results):
    for run, result in results.items():
        assert result.keys() >= RESULT_FIELDS
        assert (result["run"], result["status"], result["seed"]) == (run, "done", 1)
        assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]))
        assert 3 < result["val_loss"] < math.log(97) + 0.1
        assert result["versions"].keys() >= {"jax", "flax", "optax", "python"}
        for name in ("seconds", "tokens_per_second", "peak_bytes"):
            assert result[name] > 0


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
    d, a = results["gpt_baseline"], results["gpt_pca_k8"]
    assert (d["params_embedding"], a["params_embedding"]) == (full, low)
    assert a["params_total"] == d["params_total"] - full + low
    assert a["compression_embedding"] == pytest.approx(full / low)
    assert a["compression_total"] == pytest.approx(
        d["params_total"] / a["params_total"]
    )
    assert d["compression_total"] == 1


def test_results_state_the_protocol_and_the_values_of_auto(results):
    result = results["gpt_pca_k8"]
    protocol = result["protocol"]
    assert protocol.pop("corpus").endswith("corpus")
    assert len(protocol.pop("tokens_sha256")) == 64
    assert protocol == {
        **{"split": "val", "window": 16, "stride": 16, "windows": 63},
        **{"tokens_predicted": 1002, "tokenizer": None, "tokenizer_sha256": None},
    }
    wanted = {"compute_dtype": "float32", "attention": "xla", "kernels": "xla"}
    assert result["resolved"] == wanted


def test_window_losses_add_up_to_the_loss(finished_experiment, results):
    for run in RUNS:
        losses = read_window_losses(Path(finished_experiment.workdir) / run)
        assert losses.shape == (63, 2)
        nats, targets = losses.sum(axis=0)
        assert targets == 1002
        assert nats / targets == pytest.approx(results[run]["val_loss"], rel=1e-12)


def test_losses_by_decile_are_means_over_targets_of_equally_frequent_tokens(
    finished_experiment, results, corpus_folder
):
    train, val = (
        np.fromfile(corpus_folder / f"{split}.bin", np.uint16)
        for split in ("train", "val")
    )
    # As in sweeps: the deciles of the whole training text.
    decile_V = frequency_deciles(np.bincount(train, minlength=97) / len(train))
    windows = [val[start : start + 17] for start in range(0, len(val) - 1, 16)]
    for run in RUNS:
        model, variables = Run.open(Path(finished_experiment.workdir) / run).load(
            Settings.of(finished_experiment).model
        )
        losses = []
        for window in windows:
            logits = np.asarray(model.apply(variables, window[None, :-1]), np.float64)
            logits = logits.reshape(len(window) - 1, -1)[:, :97]
            own = logits[np.arange(len(logits)), window[1:]]
            losses += list(np.log(np.exp(logits).sum(1)) - own)
        found = results[run]["val_loss_by_decile"]
        for decile, of_it in enumerate(decile_V[val[1:]] == np.arange(10)[:, None]):
            wanted = np.mean(losses, where=of_it) if of_it.any() else None
            assert found[decile] == (wanted and pytest.approx(wanted, rel=1e-5))
        assert sum(mean is not None for mean in found) > 5


def test_the_report_holds_the_four_runs(finished_experiment, results):
    workdir = Path(finished_experiment.workdir)
    written = json.loads((workdir / "results.json").read_text())
    losses = {row["run"]: row["val_loss"] for row in written["rows"]}
    assert losses == {run: result["val_loss"] for run, result in results.items()}
    assert "a command" in (workdir / "report.md").read_text()
    assert "<html" in (workdir / "report.html").read_text()
    assert list((workdir / "plots").glob("*.png"))


def test_repeating_a_finished_experiment_only_reports_it_again(copied, capfd):
    workdir = Path(copied.workdir)
    folders = [workdir / name for name in (*RUNS, "pca_factorized")]
    before = [snapshot(folder) for folder in folders]
    (workdir / "report.md").unlink()
    execute(copied)
    assert [snapshot(folder) for folder in folders] == before
    assert (workdir / "report.md").exists()
    lines = capfd.readouterr().out.splitlines()
    jobs, (report, *arms, following) = lines[:5], lines[5:]
    assert [line.split()[-1] for line in jobs] == ["done"] * 5
    assert report == f"report: {workdir / 'report.html'}"
    assert [line[0] for line in arms] == ["D", "A", "B", "C"]
    assert following.startswith("sample it: ")


@pytest.mark.usefixtures("quick")
def test_a_report_names_the_runs_that_another_one_showed(copied, capfd):
    workdir = Path(copied.workdir)
    execute(changed(copied, ranks=(4,)))
    said = f"the report in {workdir} no longer shows"
    (line,) = [one for one in capfd.readouterr().out.splitlines() if said in one]
    assert line.endswith(f", or repeat, with --config.workdir={workdir}, a command")
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    shown = {row["folder"] for row in rows}
    names = line.removeprefix(f"{said} ").partition(", which stay there: ")[0]
    assert set(names.split(", ")) == {run for run in RUNS if run.endswith("k8")}
    assert shown.isdisjoint(names.split(", "))
    both = changed(copied, ranks=(4, 8))
    capfd.readouterr()
    execute(both)
    assert "no longer shows" not in capfd.readouterr().out


def test_only_the_first_process_prints(copied, capfd, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    execute(copied)
    assert capfd.readouterr() == ("", "")


def test_a_report_waits_until_that_of_another_command_is_whole(copied, monkeypatch):
    other = Lock(Path(copied.workdir) / "report.html")
    assert other.attempt() is None
    names = ("results.json", "plots", "report.md", "report.html")
    paths = [Path(copied.workdir) / name for name in names]

    def is_renewed():
        return [path.stat().st_ino for path in paths] != before

    def say(line):
        if line.startswith(f"waiting for {paths[-1]}: process "):
            assert not is_renewed()
            other.release()

    before = [path.stat().st_ino for path in paths]
    monkeypatch.setattr(lock.process, "say", say)
    execute(copied)
    assert other._released.is_set() and is_renewed()
    assert not [*paths[0].parent.glob(".*")]


@pytest.mark.usefixtures("quick")
def test_an_experiment_makes_only_what_is_missing(copied, results):
    workdir = Path(copied.workdir)
    shutil.rmtree(workdir / "gpt_random_lowrank_k8")
    kept = [workdir / run for run in RUNS if "random" not in run]
    before = [snapshot(folder) for folder in kept]
    execute(copied)
    assert [snapshot(folder) for folder in kept] == before
    found = read_result(workdir / "gpt_random_lowrank_k8")
    wanted = results["gpt_random_lowrank_k8"]
    assert without_timings(found) == without_timings(wanted)


@pytest.mark.usefixtures("quick")
def test_an_arm_that_is_only_declared_is_planned_trained_and_reported(
    copied, monkeypatch
):
    arm = dataclasses.replace(
        ARMS["shuffled"],
        letter="H",
        title="a new arm",
        run_name="gpt_new_k{rank}",
    )
    monkeypatch.setitem(ARMS, "new", arm)
    monkeypatch.setattr(checks, "OTHER_ARMS", (*checks.OTHER_ARMS, "new"))
    config = changed(copied, **{"experiment.arms": "pca,new"})
    assert names(config)[-1] == "gpt_new_k8"
    execute(config)
    written = json.loads((Path(copied.workdir) / "results.json").read_text())
    assert [row["letter"] for row in written["rows"]] == ["D", "A", "H"]
    assert "a new arm" in (Path(copied.workdir) / "report.md").read_text()


# Prerequisites


def test_a_missing_baseline_is_refused_with_its_command_when_builds_are_off(
    tiny_config,
):
    off = {"build_prerequisites": False, "model.n_embd_wte": 8}
    config = changed(tiny_config, arm="pca", **off)
    with pytest.raises(UserError) as caught:
        execute(config)
    message = str(caught.value)
    assert "gpt_baseline is not trained and build_prerequisites is off" in message
    command = "python -m pcagpt.main --config=configs/baseline.py"
    assert f"it with: {command}" in message
    assert f"--config.workdir={config.workdir}" in message
    assert "\n" not in message
    assert not Path(config.workdir).exists()


def test_missing_factors_are_refused_with_all_that_they_depend_on(copied):
    shutil.rmtree(Path(copied.workdir) / "pca_factorized")
    kl = {"factorize.method": "kl", "compress.calibration_tokens": 512}
    off = {"build_prerequisites": False, "model.n_embd_wte": 4}
    config = changed(copied, task="train", arm="pca", **kl, **off)
    with pytest.raises(UserError, match="pca_factorized lacks rank 4") as caught:
        execute(config)
    assert "--config=configs/factorize.py" in str(caught.value)
    data = {"train.batch_size": 8, "data.source": config.data.source}
    for knob, value in (kl | data).items():
        assert f"--config.{knob}={value}" in str(caught.value)


def test_the_command_that_makes_factors_names_a_corpus_that_is_a_default(tiny_config):
    # configs/factorize.py takes the corpus of D, if none is named.
    for method, is_read in (("context", True), ("svd", False)):
        knobs = {"data.source": "sotu", "factorize.method": method}
        settings = Settings.of(changed(tiny_config, **knobs))
        factors = FactorizeJob(Path("x"), settings, True, Path("gpt_baseline"))
        line = str(factors.missing_error())
        assert ("--config.data.source=sotu" in line) == is_read
        assert ("--config.train.batch_size=8" in line) == is_read


def test_a_finished_baseline_is_used_whatever_its_budget_was(copied):
    a = {"task": "train", "arm": "pca", "model.n_embd_wte": 4, "train.steps": 2}
    lines = described(changed(copied, **a))
    assert [line.split("  ")[-1] for line in lines] == ["done", "to do", "to do"]


def test_an_arm_in_another_compute_dtype_than_d_is_refused_before_training(copied):
    workdir = Path(copied.workdir)
    shutil.rmtree(workdir / "gpt_pca_finetune_k8")
    other = changed(copied, **{"model.compute_dtype": "bfloat16"})
    before = snapshot(workdir)
    for act in (described, execute):
        with pytest.raises(UserError) as caught:
            act(other)
        assert str(caught.value) == (
            "gpt_baseline computes in float32, gpt_pca_finetune_k8 in bfloat16: train "
            "both with --config.model.compute_dtype=float32; move the folder of a "
            "finished run in another dtype aside first"
        )
    alone = {"task": "train", "arm": "pca_finetune", "model.n_embd_wte": 8}
    elsewhere = alone | {"model_path": str(workdir / "gpt_baseline")}
    elsewhere |= {"workdir": str(workdir / "elsewhere")}
    for knobs in (alone, elsewhere):
        with pytest.raises(UserError, match="gpt_baseline computes in float32, gpt_"):
            execute(changed(other, **knobs))
    assert snapshot(workdir) == before
    # A preview on a CPU may be that of work on a GPU.
    for name in ("gpt_baseline", "gpt_pca_k8", "gpt_random_lowrank_k8"):
        path = workdir / name / "result.json"
        resolved = json_of(path)["resolved"] | {"compute_dtype": "bfloat16"}
        write_json(path, json_of(path) | {"resolved": resolved})
    assert described(copied, writes=False)[-1].endswith("to do")
    with pytest.raises(UserError, match="gpt_baseline computes in bfloat16"):
        described(copied)
    for name in ("gpt_baseline", "gpt_pca_k8", "gpt_random_lowrank_k8"):
        path = workdir / name / "result.json"
        old = json_of(path) | {"resolved": None}
        write_json(path, old)
    assert described(other)[-1].endswith("to do")


def test_what_the_report_cannot_read_of_d_is_refused_before_training(copied):
    workdir = Path(copied.workdir)
    shutil.rmtree(workdir / "gpt_pca_finetune_k8")
    losses = workdir / "gpt_baseline" / "val_window_losses.npy"
    losses.write_bytes(losses.read_bytes()[:-8])
    before = snapshot(workdir)
    for act in (described, execute):
        with pytest.raises(UserError, match=f"{losses} was changed .*: delete it to"):
            act(copied)
    assert snapshot(workdir) == before
    losses.unlink()
    assert described(copied)[-1].endswith("to do")


def test_a_report_reads_a_lost_config_from_the_copy_in_a_checkpoint(copied):
    run = Path(copied.workdir) / "gpt_baseline"
    before = read_row(run)
    (run / "config.json").unlink()
    after = read_row(run)
    np.testing.assert_array_equal(after.pop("windows"), before.pop("windows"))
    known, copy = before.pop("corpus"), after.pop("corpus")
    assert after == before and known.items() <= copy.items()


def test_the_plan_says_what_depends_on_work_that_is_left(copied):
    lines = described(changed(copied, seed=5, overwrite=True))
    assert [line.split("  ")[-1] for line in lines[:2]] == [
        "to do",
        "done, made again if gpt_baseline changes",
    ]
