"""The task 'compress': what it measures, writes, reuses, advises and refuses."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import call
from runs import changed, execute, snapshot

from pcagpt import factorize, main
from pcagpt.compress import candidates as search
from pcagpt.compress import sweep as compress
from pcagpt.compress.score import TableSwap, frequency_deciles
from pcagpt.compress.subject import Subject
from pcagpt.errors import UserError
from pcagpt.model import GPT
from pcagpt.pipeline.evaluate_task import evaluate_run
from pcagpt.run import calibrate as calibration
from pcagpt.run import folder as run_folder
from pcagpt.run.checkpoint import load_weights

pytestmark = pytest.mark.usefixtures("quick")
WIDTH, VOCAB_SIZE = 32, 97


@pytest.fixture
def asked(finished_experiment, tmp_path):
    """The config that compresses a copy of a finished baseline."""
    run = shutil.copytree(
        Path(finished_experiment.workdir) / "gpt_baseline", tmp_path / "gpt_baseline"
    )
    return changed(
        finished_experiment,
        task="compress",
        workdir=str(tmp_path),
        model_path=str(run),
        ranks=(4, 8),
        **{"data.source": "", "compress.methods": "svd,context"},
        **{"compress.bands": (1, 3), "compress.bits": (8,)},
        **{"compress.calibration_tokens": 512},
    )


def sweep_of(config):
    compress.compress(config, "a command")
    path = Path(config.workdir) / "compressed" / "sweep.json"
    return json.loads(path.read_text())


FIELDS = {
    *("method", "bands", "rank", "params", "bytes", "added_loss", "added_loss_input"),
    *("added_loss_head", "predicted_loss", "kl", "top1_agreement", "seconds"),
}


def test_a_sweep_measures_every_method_rank_and_number_of_bands(asked):
    sweep = sweep_of(asked)
    rows = {(r["method"], r["bands"], r["rank"], r["bits"]): r for r in sweep["rows"]}
    assert set(rows) == {
        *(("svd", 1, rank, 32) for rank in (4, 8)),
        *(("context", bands, rank, 32) for bands in (1, 3) for rank in (4, 8)),
        *(("context", 3, rank, 8) for rank in (4, 8)),
        ("baseline", 1, 0, 8),
    }
    for row in rows.values():
        assert row.keys() >= FIELDS
        assert np.isfinite([row[name] for name in FIELDS - {"method"}]).all()
        assert row["params"] == row["bytes"] / 4 or row["bits"] < 32
    for rank in (4, 8):
        budget = rank * (VOCAB_SIZE + WIDTH)
        assert rows["svd", 1, rank, 32]["params"] == budget
        assert rows["context", 3, rank, 32]["params"] <= budget
    anchors = {key for key, row in rows.items() if row["is_anchor"]}
    # What adds nothing says nothing of what the others add.
    assert anchors == {
        key
        for key, row in rows.items()
        if key[3] == 32 and key[2] > 0 and row["added_loss"] >= 1e-3
    }
    assert {key[0] for key in anchors} >= {"svd"}
    folder = Path(asked.workdir) / "compressed"
    assert "</html>" in (folder / "report.html").read_text()
    assert (folder / "plots" / "pareto.png").stat().st_size > 10_000


@pytest.mark.parametrize("rank", [4, 8])
def test_the_best_model_of_a_rank_is_a_run_of_the_loss_that_was_measured(asked, rank):
    sweep = sweep_of(asked)
    rows = [r for r in sweep["rows"] if r["rank"] == rank and r["bits"] == 32]
    best = min(rows, key=lambda row: row["added_loss"])
    model = Path(asked.workdir) / "compressed" / f"best_k{rank}"
    found = evaluate_run(changed(asked, task="evaluate", model_path=str(model)))
    wanted = best["loss"] + best["added_loss"]
    assert found["loss"] == pytest.approx(wanted, abs=2e-6)


def test_what_was_measured_is_not_measured_again(asked, monkeypatch):
    first = sweep_of(asked)
    before = snapshot(Path(asked.model_path))
    made = []
    make = search.Compressor.__call__
    monkeypatch.setattr(
        search.Compressor, "__call__", lambda s, r: made.append(r) or make(s, r)
    )
    again = sweep_of(changed(asked, ranks=(4, 8, 12)))
    new = {recipe.rank for recipe in made if recipe.rank in (4, 8)}
    rows = [row for row in again["rows"] if row["rank"] in (0, 4, 8)]
    for row in rows:
        wanted = next(
            r
            for r in first["rows"]
            if all(r[n] == row[n] for n in ("method", "bands", "rank", "bits"))
        )
        assert row["seconds"] == wanted["seconds"]
    assert len([recipe for recipe in made if recipe.rank in (4, 8)]) == len(new) == 2
    assert snapshot(Path(asked.model_path)) == before  # Statistics too.


def test_another_checkpoint_is_measured_anew(asked):
    step_6 = sweep_of(asked)["rows"][0]["loss"]
    earlier = changed(asked, model_path=asked.model_path + "/ckpt/3")
    with pytest.raises(UserError, match=r"another model or corpus \(checkpoint differ"):
        sweep_of(earlier)
    assert sweep_of(asked)["rows"][0]["loss"] == step_6
    assert sweep_of(changed(earlier, overwrite=True))["rows"][0]["loss"] != step_6


def table_of_files(folder):
    """The dense table that exported factors stand for, put together as documented."""
    order = np.load(folder / "token_order.npy")
    mean, rows = np.load(folder / "mean.npy"), []
    for band in range(len(list(folder.glob("wte_band*.npy")))):
        wte = np.load(folder / f"wte_band{band}.npy")
        scales = folder / f"scale_mats_band{band}.npz"
        if scales.exists():
            with np.load(scales) as archive:
                np.testing.assert_array_equal(
                    archive["scale_up"], archive["scale_down"]
                )
                wte = wte @ archive["scale_up"]
        rows.append(wte)
    table = np.empty((VOCAB_SIZE, WIDTH))
    table[order] = np.concatenate(rows)
    return table + mean


def test_exported_bands_and_the_model_are_the_same_dense_table(asked):
    """And the permutation is the model's own affair: logits come by token id."""
    freq = {"compress.methods": "freq", "compress.bands": (3,)}  # It gains from bands.
    asked = changed(asked, **freq)
    compress.compress(asked, "a command")
    folder = Path(asked.workdir) / "compressed" / "best_k8"
    subject = Subject.open(asked)
    table = table_of_files(folder / "factors")
    params = {**subject.host_params, "embed": {"band_0": {"wte": _padded(table)}}}
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) * 3
    dense = subject.model.apply({"params": params}, tokens)
    found, constants, _ = load_weights(folder)
    record = json.loads((folder / "config.json").read_text())
    sizes, ranks = record["model"]["band_sizes"], record["model"]["band_ranks"]
    assert sum(sizes) == VOCAB_SIZE
    banded = GPT(
        type(subject.model.config)(
            **{
                **subject.model.config.__dict__,
                "band_sizes": tuple(sizes),
                "band_ranks": tuple(rank or None for rank in ranks),
            }
        )
    )
    logits = banded.apply({"params": found, "constants": constants}, tokens)
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(dense), atol=2e-5
    )


def _padded(table):
    return np.pad(table, ((0, 128 - VOCAB_SIZE), (0, 0))).astype(np.float32)


# What is measured


def test_a_swapped_table_is_scored_as_two_naive_models_are(asked):
    subject = Subject.open(asked)
    table = subject.table_VD + 0.05 * np.random.default_rng(0).normal(
        size=subject.table_VD.shape
    ).astype(np.float32)
    frequency = np.bincount(subject.corpus.tokens("train"), minlength=VOCAB_SIZE) * 1.0
    deciles = frequency_deciles(frequency)
    swap = TableSwap(subject.model, subject.variables, deciles, subject.mesh, 3)
    batches = list(subject.validation(8))[:2]
    scores = swap(table, batches)

    def log_p(input_table, head_table):
        params = dict(subject.host_params)
        found = []
        for inputs, _ in batches:
            variables = {
                "params": params | {"embed": {"band_0": {"wte": _padded(input_table)}}}
            }
            h = subject.model.apply(variables, inputs, method="hidden")
            found.append(jax.nn.log_softmax(h @ head_table.T))
        return np.concatenate(found).astype(np.float64)

    targets = np.concatenate([t.reshape(-1) for _, t in batches])
    counted = targets >= 0
    own = subject.table_VD
    log = {
        "own": log_p(own, own),
        "input": log_p(table, own),
        "head": log_p(own, table),
        "both": log_p(table, table),
    }
    loss = {
        name: -value[np.arange(len(targets)), targets][counted]
        for name, value in log.items()
    }
    assert scores.loss == pytest.approx(loss["own"].mean(), rel=1e-6)
    for field, name in (
        ("added_loss", "both"),
        ("added_loss_input", "input"),
        ("added_loss_head", "head"),
    ):
        wanted = (loss[name] - loss["own"]).mean()
        assert getattr(scores, field) == pytest.approx(wanted, abs=1e-6)
    kl = (np.exp(log["own"]) * (log["own"] - log["both"])).sum(axis=1)[counted]
    assert scores.kl == pytest.approx(kl.mean(), abs=1e-6)
    same = (log["own"].argmax(1) == log["both"].argmax(1))[counted]
    assert scores.top1_agreement == pytest.approx(same.mean())
    of_target = deciles[targets[counted]]
    for decile, found in enumerate(scores.added_loss_by_decile):
        chosen = (loss["both"] - loss["own"])[of_target == decile]
        wanted = pytest.approx(chosen.mean(), abs=1e-5) if len(chosen) else None
        assert found == wanted


def test_deciles_hold_a_tenth_of_the_text_each():
    frequency = np.random.default_rng(0).permutation(np.full(1000, 0.001))
    counts = np.bincount(frequency_deciles(frequency), minlength=10)
    assert counts.min() >= 99
    assert list(frequency_deciles(np.array([0.05, 0.9, 0.05]))) == [9, 0, 9]


def test_statistics_are_what_a_naive_pass_over_the_text_finds(asked):
    subject = Subject.open(asked)
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16) % VOCAB_SIZE
    frequency = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
    found = calibration.collect(
        subject.model, subject.variables, frequency, [tokens], subject.mesh, 2
    )
    variables = {"params": subject.host_params}
    table = subject.table_VD

    def hidden(x):
        return subject.model.apply(variables, x, 16, method="contextualize")

    x = table[tokens.reshape(-1)]
    h = np.asarray(hidden(x), np.float64)
    logits = h @ table.T
    p = np.asarray(jax.nn.softmax(logits))
    expected = p @ table
    for name, wanted in {
        "frequency": frequency,
        "probability": p.mean(axis=0),
        "hidden_mean": h.mean(axis=0),
        "hidden_moment": h.T @ h / 64,
        "context_moment": h.T @ expected / 64,
    }.items():
        np.testing.assert_allclose(
            getattr(found, name), wanted, rtol=1e-4, atol=1e-5, err_msg=name
        )
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = jax.vmap(jax.random.categorical)(keys, jax.numpy.asarray(logits, "float32"))

    def loss(x):
        log_p = jax.nn.log_softmax(hidden(x) @ table.T)
        return -log_p[np.arange(64), drawn].sum()

    gradient = np.asarray(jax.grad(loss)(x), np.float64)
    np.testing.assert_allclose(
        found.gradient_moment, gradient.T @ gradient / 64, rtol=1e-3, atol=1e-5
    )


def test_statistics_of_another_protocol_are_not_taken(tmp_path):
    statistics = factorize.Statistics(*(np.ones(2) * i for i in range(6)))
    path = tmp_path / "statistics.npz"
    calibration.write(path, statistics, {"tokens": 5})
    assert calibration.read(path, {"tokens": 6}) is None
    found = calibration.read(path, {"tokens": 5})
    for array, wanted in zip(found, statistics, strict=True):
        np.testing.assert_array_equal(array, wanted)
    path.write_bytes(path.read_bytes()[:100])
    assert calibration.read(path, {"tokens": 5}) is None


# Advice


def advice_of(config, **bounds):
    asked = {f"compress.{name}": value for name, value in bounds.items()}
    compress.compress(changed(config, **asked), "a command")
    path = Path(config.workdir) / "compressed" / "advice.json"
    return json.loads(path.read_text())["chosen"]


def test_the_advised_table_keeps_the_loss_and_is_a_run(asked):
    chosen = advice_of(asked, max_added_loss=0.001)
    assert chosen["added_loss"] <= 0.001
    folder = Path(asked.workdir) / "compressed"
    found = evaluate_run(
        changed(asked, task="evaluate", model_path=str(folder / "advised"))
    )
    wanted = chosen["loss"] + chosen["added_loss"]
    assert found["loss"] == pytest.approx(wanted, abs=2e-6)


def test_the_advised_table_keeps_numbers_and_bytes(asked):
    assert advice_of(asked, max_params=1000)["params"] <= 1000
    chosen = advice_of(asked, max_bytes=4000)
    assert chosen["bytes"] <= 4000
    model = Path(asked.workdir) / "compressed" / "advised"
    found = evaluate_run(changed(asked, task="evaluate", model_path=str(model)))
    wanted = chosen["loss"] + chosen["added_loss"]
    assert found["loss"] == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_table_in_few_bits_is_written_as_it_was_measured(asked, bits, bands):
    subject = Subject.open(asked)
    found = subject.statistics(512, 8, 1)
    make = search.Compressor(subject.table_VD, found)
    rounded, whole = (
        make(search.Recipe("context", bands, 1000, 0, bit)) for bit in (bits, 32)
    )
    np.testing.assert_array_equal(rounded.table.dense(), rounded.dense)
    assert not np.array_equal(rounded.dense, whole.dense)
    assert rounded.bytes < whole.bytes


# Refusals


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"compress.methods": "svd,nmf"}, "compress.methods holds 'nmf'"),
        ({"compress.methods": " , "}, "compress.methods is empty"),
        ({"ranks": (33,)}, "its rank is at most 32"),
        ({"model.n_layer": 5}, "model.n_layer is 5, but"),
        ({"model_path": "nowhere"}, "nowhere does not exist"),
        ({"compress.max_params": 100}, "compress.max_params is too small"),
        ({"mesh.data": 3}, "cannot be split over 3 devices"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    asked, tmp_path, overrides, words
):
    before = snapshot(tmp_path / "gpt_baseline")
    with pytest.raises(UserError) as refused:
        compress.compress(changed(asked, **overrides), "a command")
    assert words in str(refused.value)
    after = snapshot(tmp_path / "gpt_baseline")
    assert {k: v for k, v in after.items() if "statistics" not in k} == before
    assert not (tmp_path / "compressed").exists()


def test_a_factorized_model_is_not_compressed_again(asked, finished_experiment):
    run = Path(finished_experiment.workdir) / "gpt_pca_k8"
    with pytest.raises(UserError, match="has a factorized embedding already"):
        compress.compress(changed(asked, model_path=str(run)), "a command")


def test_print_config_says_what_would_be_compressed(asked):
    outcome = call(
        "--config=configs/compress.py",
        f"--config.model_path={asked.model_path}",
        "--print_config",
    )
    assert outcome.code == 0, outcome
    assert f"compress {asked.model_path} at step 6" in outcome.out
    assert not (Path(asked.workdir) / "compressed").exists()


def test_a_damaged_sweep_is_refused_in_one_line(asked):
    folder = Path(asked.workdir) / "compressed"
    folder.mkdir()
    (folder / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: delete it, to measure anew"):
        compress.compress(asked, "a command")


# Training on


@pytest.fixture
def trained_on(asked):
    """A function: does a sweep of rank 8 and trains on; returns what was entered."""
    asked = changed(
        asked, ranks=(4, 8), **{"compress.recover_ranks": (8,), "compress.bits": ()}
    )

    def run(**overrides):
        main.run(changed(asked, **overrides), "a command", print_only=False)
        text = (Path(asked.workdir) / "compressed" / "sweep.json").read_text()
        return json.loads(text)

    return run


def test_the_best_model_and_d_are_trained_on_and_held_against_d(trained_on, asked):
    sweep = trained_on()
    continued, plain, taught = sweep["recovered"]
    letters = [row["letter"] for row in sweep["recovered"]]
    assert letters == ["D+", "B", "Bd"]
    folder = Path(asked.workdir) / "compressed"
    own = run_folder.read_result(Path(asked.model_path))
    rows = [r for r in sweep["rows"] if r["rank"] == 8 and r["bits"] == 32]
    best = min(rows, key=lambda row: row["added_loss"])
    for row in (plain, taught):
        assert (row["rank"], row["method"]) == (8, best["method"])
        assert row["bands"] == best["bands"]
        assert row["added_at_start"] == pytest.approx(best["added_loss"], abs=2e-6)
    assert (continued["rank"], continued["added_at_start"]) == (None, 0)
    for row in sweep["recovered"]:
        result = run_folder.read_result(folder / row["run"])
        assert row["val_loss"] == result["val_loss"]
        assert row["added_loss"] == result["val_loss"] - own["val_loss"]
        low, high = row["interval"]
        assert low < row["added_loss"] < high
        assert row["share_of_tokens"] == 0.5
    teacher = run_folder.read_config(folder / taught["run"])["distill"]["teacher"]
    assert teacher == asked.model_path
    text = (folder / "report.md").read_text()
    for words in (
        "## After further training",
        "| **B** ",
        "| **Bd** ",
        "| **D+** ",
    ):
        assert words in text


def test_what_was_trained_on_is_done_the_next_time(trained_on, asked):
    first = trained_on()
    folder = Path(asked.workdir) / "compressed"
    runs = [row["run"] for row in first["recovered"]]
    before = {run: snapshot(folder / run) for run in runs}
    best = snapshot(folder / "best_k8")
    again = trained_on(ranks=(4, 8, 12))
    assert again["recovered"] == first["recovered"]
    assert {run: snapshot(folder / run) for run in runs} == before
    assert snapshot(folder / "best_k8") == best


def test_a_run_goes_on_with_d_s_training_whatever_the_sweep_batches(trained_on, asked):
    trained_on(**{"train.batch_size": 16, "train.learning_rate": 1.0})
    folder = Path(asked.workdir) / "compressed"
    d = run_folder.read_config(Path(asked.model_path))
    found = run_folder.read_config(folder / "gpt_pca_finetune_from_best_k8")
    assert found["train"]["batch_size"] == d["train"]["batch_size"]
    assert found["train"]["learning_rate"] == d["train"]["learning_rate"] / 2
    assert (found["seed"], found["data"]["source"]) == (d["seed"], d["data"]["source"])


def test_a_rank_that_is_not_tried_is_not_trained_on(asked):
    with pytest.raises(UserError, match="recover_ranks holds 16, which ranks does not"):
        compress.compress(changed(asked, **{"compress.recover_ranks": (16,)}), "")


def test_a_smaller_sweep_keeps_what_a_larger_one_measured(asked):
    first = sweep_of(asked)
    smaller = sweep_of(changed(asked, ranks=(8,), **{"compress.bands": (1,)}))
    assert {row["rank"] for row in smaller["rows"]} == {0, 8}
    kept = {(r["method"], r["bands"], r["rank"], r["bits"]) for r in first["rows"]}
    again = smaller["rows"] + smaller["other_rows"]
    assert {(r["method"], r["bands"], r["rank"], r["bits"]) for r in again} >= kept
    assert sweep_of(asked)["rows"] == first["rows"]  # Timings too: none was made anew.


def test_ranks_that_fit_no_bands_are_refused_and_too_high_ones_named(asked, capsys):
    none = changed(asked, ranks=(1,), **{"compress.bands": (12,)})
    none = changed(none, **{"compress.methods": "context"})
    with pytest.raises(
        UserError, match=r"too small for compress\.bands: no table fits"
    ):
        compress.compress(none, "a command")
    some = changed(asked, ranks=(8, 64), **{"compress.methods": "svd"})
    compress.compress(some, "a command")
    assert "left out: rank 64, the table's is at most 32" in capsys.readouterr().out


def test_another_calibration_makes_another_best_model(asked):
    sweep_of(asked)
    factors = Path(asked.workdir) / "compressed" / "best_k8" / "factors"
    before = {path.name: path.read_bytes() for path in factors.iterdir()}
    sweep_of(changed(asked, **{"factorize.singular_value_split": 0.5}))
    after = {path.name: path.read_bytes() for path in factors.iterdir()}
    assert after != before


def test_what_was_trained_on_stays_in_the_report_of_a_later_sweep(trained_on):
    first = trained_on()
    later = trained_on(ranks=(4, 8, 12), **{"compress.recover_ranks": ()})
    assert later["recovered"] == first["recovered"]


def test_a_model_of_another_path_is_the_same_model(trained_on, asked, monkeypatch):
    first = trained_on()
    monkeypatch.chdir(asked.workdir)
    again = trained_on(model_path="gpt_baseline")
    assert again["recovered"] == first["recovered"]


@pytest.mark.parametrize("path", ["gpt_baseline/ckpt/3", "bare"])
def test_what_cannot_be_held_against_d_is_refused_before_it_is_trained(path, asked):
    workdir = Path(asked.workdir)
    bare = shutil.copytree(workdir / "gpt_baseline", workdir / "bare")
    (bare / "result.json").unlink()
    config = changed(
        asked, model_path=str(workdir / path), **{"compress.recover_ranks": (8,)}
    )
    with pytest.raises(UserError, match="is not the end of a finished run"):
        main.run(config, "a command", print_only=False)
    assert not (workdir / "compressed").exists()


def test_a_best_table_at_full_width_is_trained_on_under_names_of_its_own(trained_on):
    sweep = trained_on(
        ranks=(32,),
        **{"compress.recover_ranks": (32,), "compress.methods": "context"},
        **{"compress.bands": (3,)},
    )
    assert len({row["run"] for row in sweep["recovered"]}) == 3


def test_a_model_in_one_band_is_factorized_already(asked, finished_experiment):
    run = execute(
        changed(
            finished_experiment,
            task="train",
            arm="random",
            workdir=asked.workdir + "/one",
            **{"model.band_sizes": (97,), "model.band_ranks": (8,)},
        )
    )
    with pytest.raises(UserError, match="has a factorized embedding already"):
        compress.compress(changed(asked, model_path=str(run)), "a command")


@pytest.mark.parametrize("allowed", [2600, 3300])
def test_bytes_are_all_but_used_up_and_d_s_own_table_is_an_option(asked, allowed):
    """97 x 32 numbers take 1,649 bytes in 4 bits, 3,201 in 8, with their scales."""
    config = changed(asked, **{"compress.max_bytes": allowed, "compress.bits": (8, 4)})
    compress.compress(config, "a command")
    folder = Path(asked.workdir) / "compressed"
    advice = json.loads((folder / "advice.json").read_text())
    tried = {(r["method"], r["bits"]): r for r in advice["trials"]}
    assert ("baseline", 4) in tried
    assert (("baseline", 8) in tried) == (allowed > 3200)
    assert advice["chosen"]["bytes"] <= allowed
    least = min(r["added_loss"] for r in tried.values() if r["bytes"] <= allowed)
    assert advice["chosen"]["added_loss"] == least
    low = tried["context", 8]
    assert 0.85 * allowed < low["bytes"] <= allowed
    asked_again = changed(asked, task="evaluate", model_path=str(folder / "advised"))
    found = evaluate_run(asked_again)["loss"]
    chosen = advice["chosen"]
    assert found == pytest.approx(chosen["loss"] + chosen["added_loss"], abs=2e-6)


def test_an_exact_table_is_no_anchor_of_the_predictions():
    """It adds rounding: a line through it would say nothing of the others."""
    recipes = [search.Recipe("kl", 1, 10 * rank, rank) for rank in (4, 8, 16, 32)]
    rows = [
        {
            "method": "kl",
            "second_order_head": total,
            "second_order_input": 0.0,
            "added_loss": added,
        }
        for total, added in ((0.4, 0.3), (0.2, 0.16), (0.1, 0.09), (1e-13, 3e-7))
    ]
    compress._predict(recipes, rows)
    for row in rows[:3]:
        assert row["predicted_loss"] == pytest.approx(row["added_loss"], rel=0.3)
