import dataclasses
import errno
import html
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from command_line import ROOT
from runs import changed, execute

from pcagpt.arms import ARMS, Arm
from pcagpt.errors import UserError
from pcagpt.methods import METHODS, RIVALS, Method
from pcagpt.report import (
    advice_text,
    collect_results,
    compare,
    experiment,
    figures,
    pareto_figure,
    spectrum_figure,
    write_report,
    write_sweep_report,
)
from pcagpt.report import text as texts
from pcagpt.report.collect import _check_comparable
from pcagpt.report.compare import verdict
from pcagpt.report.experiment import experiment_view, means_over_seeds
from pcagpt.report.figures import (
    arms_decile_figure,
    curves_figure,
    decile_figure,
    numbers_figure,
    size_figure,
)
from pcagpt.report.read import read_row
from pcagpt.rows import Row

V, D, BLOCKS = 100, 16, 5000
TARGETS = np.array([8.0] * 9 + [5.0])
FACTORS = "pca_factorized"
COMMAND = "python -m pcagpt.main --config=configs/demo.py"
LOSSES = {"baseline": 3.0, "pca": 3.1, "pca_finetune": 3.02, "random": 3.3}
OTHER_LOSSES = {"pca": 2.9, "pca_finetune": 2.95, "random": 2.8}  # of rank 8
PROTOCOL = {
    **{"split": "val", "corpus": "sotu", "tokenizer": "sotu4096", "windows": 10},
    **{"tokens_predicted": 77, "tokenizer_sha256": None, "window": 8},
}
SEED_STEP = 0.125  # Seeds differ by this, in every arm alike.


def write_run(workdir, arm, rank=None, seed=0, loss=3.2, noise=0.0, **result):
    """Writes a finished run; its windows lie `noise` about its loss."""
    run = ARMS[arm].run_name.format(rank=rank) + (f"_seed{seed}" if seed else "")
    folder = workdir / run
    folder.mkdir()
    tokens, rate = (1000, 0.001) if ARMS[arm].is_fine_tuned else (4000, 0.002)
    lines = [{"step": 1, "tokens": 100, "split": "train", "loss": None}]
    for t, x in ((0, loss + 4), (tokens // 2, loss + 0.05), (tokens, loss)):
        lines.append({"step": t // 100, "tokens": t, "split": "val", "loss": x})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"torn'
    (folder / "metrics.jsonl").write_text(text)
    # Alternating signs: the weighted mean is the loss.
    wave = noise * np.array([1, -1] * 4 + [0, 0])
    windows = np.stack([(loss + wave) * TARGETS, TARGETS], axis=1)
    np.save(folder / "val_window_losses.npy", windows)
    embedding, dense = V * D if rank is None else (V + D) * rank, BLOCKS + V * D
    row = {
        **{"run": run, "arm": arm, "rank": rank, "seed": seed, "status": "done"},
        **{"tokens_seen": tokens, "val_loss": loss, "perplexity": math.exp(loss)},
        **{"word_perplexity": None, "bits_per_byte": 1.5, "ln_f_cosine": 0.25},
        **{"ln_f_cosine_p05": 0.0625, "ln_f_cosine_d": 0.375},
        **{"params_total": BLOCKS + embedding, "params_embedding": embedding},
        **{"compression_embedding": V * D / embedding},
        **{"compression_total": dense / (BLOCKS + embedding), "device": "cpu"},
        **{"tokens_per_second": 12345.6, "seconds": 75.0, "git_commit": "abc1234"},
        **{"versions": {"jax": "0.10.2"}, "protocol": PROTOCOL},
    }
    (folder / "result.json").write_text(json.dumps(row | result))
    config = {"vocab_size": V, "data": {"source": "sotu"}}
    config["train"] = {"learning_rate": rate}
    (folder / "config.json").write_text(json.dumps(config))
    return run


def write_experiment(workdir, arms=LOSSES, seeds=(0,)):
    """Writes D, and the other arms at rank 4, for every seed."""
    return [
        write_run(
            workdir,
            arm,
            4 if "{rank}" in ARMS[arm].run_name else None,
            seed,
            loss=LOSSES.get(arm, 3.2) + SEED_STEP * seed,
            noise={"baseline": 0.0, "pca_finetune": -0.01}.get(arm, 0.01),
        )
        for seed in seeds
        for arm in arms
    ]


def write_factorization(workdir, ranks=(4,)):
    folder = workdir / FACTORS
    folder.mkdir()
    values = np.arange(D, 0, -1.0)
    np.save(folder / "spectrum.npy", values)
    share = np.cumsum(values**2) / np.sum(values**2)
    kept = {str(k): {"energy_kept": share[k - 1], "relative_error": 0} for k in ranks}
    metadata = {"method": "svd", "effective_rank": 8.5, "ranks": kept}
    (folder / "metadata.json").write_text(json.dumps(metadata))


def find(results, question, rank=4):
    return next(
        found
        for found in results["comparisons"]
        if (found["question"], found["rank"]) == (question, rank)
    )


def verdicts(results, rank=4):
    judged = [item for item in results["hypotheses"] if item["rank"] == rank]
    return {item["question"]: item["verdict"] for item in judged}


def markdown_of(results):
    """The page without its figures."""
    return texts.render("experiment.md.j2", plots=[], **experiment_view(results))


def cells_of(text, header, row):
    """{column: cell} of a table row of markdown; both are known by how they start."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(header))
    found = next(line for line in lines[start:] if line.startswith(row))
    both = (line.split("|")[1:-1] for line in (lines[start], found))
    return dict(zip(*([cell.strip() for cell in line] for line in both), strict=True))


def without_scripts(page):
    """A page without its scripts, their data and their licence."""
    assert page.count("<script") == page.count("</script>") == 3
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    return re.sub(r"<!-- Vega.*?-->", "", page, flags=re.DOTALL)


def resources(page):
    """Addresses that a page would load, its links, and its tags."""
    loaded = (
        r'(?:src|srcset|data|poster|background)="([^"]*)"|<link [^>]*href="([^"]*)"'
    )
    addresses = ["".join(found) for found in re.findall(loaded, page)]
    return (
        addresses,
        re.findall(r'<a [^>]*href="([^"]*)"', page),
        re.findall(r"<(\w+)", page),
    )


# Verdicts, worked by hand


FEWER, SAME = (1000, 4000), (4000, 4000)


@pytest.mark.parametrize(
    ("kind", "tokens", "bounds", "expected"),
    [
        ("less", SAME, [-0.2, -0.1], "held"),
        ("less", SAME, [0.1, 0.2], "did not hold"),
        ("less", SAME, [-0.1, 0.0], "not resolved"),
        ("less", SAME, None, "not resolved"),
        ("less at fewer tokens", FEWER, [-0.2, -0.1], "held"),
        ("less at fewer tokens", SAME, [-0.2, -0.1], "not resolved"),
        ("less at fewer tokens", SAME, [0.1, 0.2], "did not hold"),
        ("equal", SAME, [-0.05, 0.05], "held"),
        ("equal", SAME, [0.06, 0.09], "did not hold"),
        ("equal", SAME, [-0.09, -0.06], "exceeded"),
        ("equal", SAME, [0.04, 0.06], "not resolved"),
        ("equal", SAME, [-0.06, 0.0], "not resolved"),
        ("equal", SAME, None, "not resolved"),
    ],
)
def test_a_verdict_follows_from_the_interval(kind, tokens, bounds, expected):
    assert verdict(kind, bounds, tokens) == expected


# Collected results


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of a report on two ranks, written once, and its results."""
    workdir = tmp_path_factory.mktemp("reported")
    runs = write_experiment(workdir)
    runs += [
        write_run(workdir, arm, 8, loss=loss, noise=0.01, word_perplexity=math.inf)
        for arm, loss in OTHER_LOSSES.items()
    ]
    write_factorization(workdir, ranks=(4, 8))
    results = collect_results(workdir, list(reversed(runs)), FACTORS, COMMAND)
    write_report(workdir, results)
    return workdir, results


def test_results_hold_runs_losses_and_provenance(reported):
    rows, results = reported[1]["rows"], reported[1]
    order = [(row["letter"], row["rank"]) for row in rows]
    assert order == [("D", None)] + [(x, k) for k in (4, 8) for x in "ABC"]
    added = [0, 0.1, 0.02, 0.3, -0.1, -0.05, -0.2]
    assert [row["added_loss"] for row in rows] == pytest.approx(added)
    assert rows[2]["added_at_start"] == pytest.approx(4.02)
    # A and B start from D's table.
    tokens = [row["tokens_with_baseline"] for row in rows]
    assert tokens == [4000, *2 * (8000, 5000, 4000)]
    rates = [row["learning_rate"] for row in rows]
    assert rates == [0.002, *2 * (0.002, 0.001, 0.002)]
    assert (results["command"], results["git_commit"]) == (COMMAND, "abc1234")
    assert results["corpus"] == {"name": "sotu", "source": "sotu", "vocab_size": V}
    assert results["protocol"]["windows"] == 10
    assert results["versions"] == {"jax": "0.10.2"}
    assert results["created"].endswith("+00:00")
    kept = [sum(k**2 for k in range(17 - n, 17)) / 1496 for n in (4, 8)]
    assert results["spectrum"]["effective_rank"] == 8.5
    energy = dict(zip("48", kept, strict=True))
    assert results["spectrum"]["energy"] == pytest.approx(energy)


def test_every_rank_is_compared_with_the_one_baseline(reported):
    results = reported[1]
    questions = ["A vs C", "A vs D", "B vs A", "B vs D"]
    asked = [(found["question"], found["rank"]) for found in results["comparisons"]]
    assert asked == [(name, rank) for rank in (4, 8) for name in questions]
    effects = [find(results, "A vs D", rank)["effect"] for rank in (4, 8)]
    assert effects == pytest.approx([0.1, -0.1])
    # B is down to 3.07 at 500 tokens and to 3.02 at 1,000; A's last loss is 3.10.
    assert find(results, "B vs A")["tokens_to_match"] == [500, None]
    assert find(results, "B vs D")["tokens_to_match"] == [None, 4000]
    expected = ["held", "did not hold", "held", "held"]
    assert verdicts(results) == dict(zip(questions, expected, strict=True))
    expected = ["did not hold", "exceeded", "did not hold", "not resolved"]
    assert verdicts(results, rank=8) == dict(zip(questions, expected, strict=True))
    assert results["margin"] == 0.05


def test_one_seed_has_an_interval_over_its_windows(reported):
    found = find(reported[1], "A vs D")
    # Eight of ten windows of A lie ±0.01 about D's + 0.1; two lie on it.
    weights = TARGETS / TARGETS.sum()
    spread = np.sum(weights[:8] ** 2 * 0.01**2) / (1 - np.sum(weights**2))
    half = 2.262157 * math.sqrt(spread)
    assert found["effect"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx([0.1 - half, 0.1 + half], rel=1e-6)
    assert found["interval_over"] == "evaluation windows"
    assert (found["interval_units"], found["seeds"]) == (10, 1)
    assert "not other training runs" in found["caveat"]
    # A and C have the same waves: their windows are paired, so no spread is left.
    bounds = find(reported[1], "A vs C")["interval"]
    assert bounds == pytest.approx([-0.2, -0.2], abs=1e-9)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "no losses by window"),
        (lambda path: np.save(path, np.ones((3, 2))), "different windows"),
        (lambda path: np.save(path, np.load(path) * [1.1, 1]), "disagree with result"),
    ],
)
def test_runs_without_comparable_windows_are_not_resolved(tmp_path, spoil, reason):
    runs = write_experiment(tmp_path)
    spoil(tmp_path / "gpt_pca_k4" / "val_window_losses.npy")
    results = collect_results(tmp_path, runs, FACTORS, COMMAND)
    assert find(results, "A vs D")["interval"] is None
    assert verdicts(results)["A vs D"] == "not resolved"
    assert find(results, "B vs D")["interval"] is not None
    cells = cells_of(markdown_of(results), "| Question", "| **A vs D**")
    assert reason in cells["Over"]
    assert cells["Answer"] == "**no difference is resolved**"


def test_seeds_are_paired_and_shown_with_their_interval(tmp_path):
    runs = write_experiment(tmp_path, seeds=(0, 1, 2))
    changed = tmp_path / "gpt_pca_k4_seed1" / "result.json"
    row = json.loads(changed.read_text())
    changed.write_text(json.dumps(row | {"val_loss": row["val_loss"] + 0.03}))
    for seed in (1, 2):
        runs.remove(f"gpt_random_lowrank_k4_seed{seed}")
    results = collect_results(tmp_path, runs, FACTORS, COMMAND)
    found = find(results, "A vs D")
    # Differences 0.10, 0.13, 0.10: the 0.125 between seeds is not in them.
    half = 4.302653 * 0.03 / 3
    assert found["effect"] == pytest.approx(0.11)
    assert found["interval"] == pytest.approx([0.11 - half, 0.11 + half], rel=1e-6)
    assert (found["interval_over"], found["seeds"]) == ("seeds", 3)
    assert found["caveat"] is None
    # A and C have one seed in common.
    assert find(results, "A vs C")["interval_over"] == "evaluation windows"
    # The added loss is over the baseline of the same seed.
    added = [row["added_loss"] for row in results["rows"] if row["letter"] == "B"]
    assert added == pytest.approx([0.02] * 3)
    for model in means_over_seeds(results["rows"]):
        if model["letter"] != "A":  # Its file is changed.
            mean = math.exp(model["val_loss"])
            assert model["perplexity"] == pytest.approx(mean, rel=1e-9)
    text = markdown_of(results)
    half = 4.302653 * SEED_STEP / math.sqrt(3)
    assert cells_of(text, "| Arm", "| **B**")["Loss"] == f"3.145 ± {half:.3f}"
    assert "Means over 3 seeds" in text
    assert "gpt_pca_k4_seed2" in text.split("## Files")[1]


@pytest.mark.parametrize("arms", [["baseline", "random"], ["pca"]])
def test_some_arms_without_a_factorization_make_a_report(arms, tmp_path):
    results = collect_results(
        tmp_path, write_experiment(tmp_path, arms), FACTORS, COMMAND
    )
    assert results["comparisons"] == results["hypotheses"] == []
    assert results["spectrum"] is None
    text = markdown_of(results)
    assert "## Questions" not in text and "How much of D's table" not in text
    assert "there is nothing to recommend" in text or "random" in arms
    letter, added = ("C", "+0.300") if "random" in arms else ("A", "–")
    assert cells_of(text, "| Arm", f"| **{letter}**")["Added"].split(" ± ")[0] == added


def test_a_table_in_bands_shows_their_ranks_and_no_energy(tmp_path, monkeypatch):
    write_factorization(tmp_path, ranks=(8,))
    path, marked = tmp_path / FACTORS / "metadata.json", []
    metadata = json.loads(path.read_text())
    metadata["ranks"]["4"] = {"band_sizes": [3, 2], "band_ranks": [0, 6]}
    path.write_text(json.dumps(metadata))
    results = collect_results(tmp_path, write_experiment(tmp_path), FACTORS, COMMAND)
    drawn = "pcagpt.report.page.spectrum_figure"
    monkeypatch.setattr(drawn, lambda _, ranks: marked.extend(ranks))
    write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert "The table of the size of rank 4 has bands of the ranks 0, 6 (0: f" in text
    assert "Rank 8 keeps" in text and "Rank 4 keeps" not in text
    assert marked == [8]


# Refused runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is damaged"),
        ({"status": "running"}, "is not a finished run"),
        ({"arm": "mystery"}, "'mystery': it must be one of baseline, continued, pca"),
        ('{"status": "done", "run": "x"}', "lacks arm, rank"),
        ({"val_loss_by_decile": 9 * [1.0]}, "'val_loss_by_decile' holds no 10 numbers"),
        ({"val_loss_by_decile": [*9 * [1.0], "a"]}, "holds no 10 numbers"),
        ({"val_loss_by_decile": 1.0}, "'val_loss_by_decile' is 1.0"),
        (None, "is not a finished run"),
    ],
)
def test_a_run_that_cannot_be_read_is_named_in_one_line(tmp_path, change, message):
    run = write_run(tmp_path, "baseline")
    path = tmp_path / run / "result.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.unlink() if change is None else path.write_text(change)
    with pytest.raises(UserError, match=message) as error:
        collect_results(tmp_path, [run], FACTORS, COMMAND)
    assert run in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_counts_by_its_tokens_if_they_are_known():
    def shared(**other):
        row = {
            "folder": "D",
            "corpus": {"train": "a"},
            "protocol": {"corpus": "one", "tokens_sha256": "b"},
        }
        _check_comparable([row, row | other])

    shared(protocol={"corpus": "moved", "tokens_sha256": "b"})
    shared(corpus=None)  # An earlier version trained it.
    shared(protocol={"corpus": "one"})
    for other, words in (
        ({"protocol": {"corpus": "one", "tokens_sha256": "c"}}, "tokens_sha256: 'b'"),
        ({"protocol": {"corpus": "two"}}, "corpus: 'one' and 'two'"),
        ({"corpus": {"train": "c"}}, "trained_on_sha256: 'a' and 'c'"),
    ):
        with pytest.raises(UserError, match=words):
            shared(**other)


def test_a_tokenizer_counts_by_its_content_if_it_is_known(tmp_path):
    own = PROTOCOL | {"tokenizer": "tok.json", "tokenizer_sha256": "a"}
    own["tokens_sha256"] = "c"
    moved, lost = {"tokenizer": "to/tok.json"}, {"tokenizer": None}
    lost["tokenizer_sha256"] = None
    runs = [write_run(tmp_path, "baseline", protocol=own)]
    runs.append(write_run(tmp_path, "pca", 4, protocol=own | moved))
    runs.append(write_run(tmp_path, "pca_finetune", 4, protocol=own | lost))
    assert collect_results(tmp_path, runs, FACTORS, COMMAND)["protocol"] == own
    other = own | {"tokenizer_sha256": "b"}
    runs.append(write_run(tmp_path, "random", 4, protocol=other))
    with pytest.raises(UserError, match=r"\(tokenizer_sha256: 'a' and 'b'\)"):
        collect_results(tmp_path, runs, FACTORS, COMMAND)


@pytest.mark.parametrize("one", [None, "float32"])
def test_losses_in_two_compute_dtypes_are_not_compared(one, tmp_path):
    """A result of an older version does not say its own."""
    dtypes = {"baseline": one, "pca": "float32", "random": "bfloat16"}
    for arm, dtype in dtypes.items():
        rank = 4 if arm != "baseline" else None
        write_run(tmp_path, arm, rank, resolved=dtype and {"compute_dtype": dtype})
    names = ["gpt_baseline", "gpt_pca_k4", "gpt_random_lowrank_k4"]
    assert collect_results(tmp_path, names[:2], FACTORS, COMMAND)["rows"]
    first = names[1] if one is None else names[0]
    words = f"{first} computes in float32, {names[2]} in bfloat16: train both with "
    with pytest.raises(UserError, match=f"^{words}--config.model.compute_dtype=float"):
        collect_results(tmp_path, names, FACTORS, COMMAND)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    run = write_run(tmp_path, "baseline")
    other = write_run(tmp_path, "pca", 4, protocol={"split": "val", "window": 16})
    with pytest.raises(UserError, match="are both baseline at rank None, seed 0"):
        collect_results(tmp_path, [run, run], FACTORS, COMMAND)
    with pytest.raises(UserError, match=r"different protocols \(corpus: 'sotu' and"):
        collect_results(tmp_path, [run, other], FACTORS, COMMAND)
    with pytest.raises(UserError, match="no runs to report on"):
        collect_results(tmp_path, [], FACTORS, COMMAND)


@pytest.mark.parametrize("damage", [lambda w: w[:, :1], lambda w: w * np.nan])
def test_damaged_window_losses_are_refused(damage, tmp_path):
    runs = write_experiment(tmp_path)
    path = tmp_path / "gpt_pca_k4" / "val_window_losses.npy"
    np.save(path, damage(np.load(path)))
    with pytest.raises(UserError, match=r"gpt_pca_k4.val_window_losses\.npy is dam"):
        collect_results(tmp_path, runs, FACTORS, COMMAND)


# The pages


def test_the_report_writes_its_files_with_strict_json(reported):
    workdir = reported[0]
    made = [*workdir.glob("*.*"), *workdir.glob("plots/*")]
    files = {"results.json", "report.md", "report.html"}
    assert {path.name for path in made} == files | {"loss.png", "size.png"} | {
        "spectrum.png"
    }
    assert "Infinity" in (workdir / "gpt_pca_k8" / "result.json").read_text()
    text = (workdir / "results.json").read_text("utf-8")
    assert not {"Infinity", "NaN"} & set(re.findall(r"\w+", text))
    assert {row["word_perplexity"] for row in json.loads(text)["rows"]} == {None}


def test_the_page_holds_all_it_shows(reported):
    whole, text = (
        (reported[0] / name).read_text("utf-8") for name in ("report.html", "report.md")
    )
    assert len(whole) < 4e6
    page = without_scripts(whole)
    addresses, links, tags = resources(page)
    assert not addresses and not {"link", "iframe", "img"} & set(tags)
    assert not re.search(r"https?:|url\(|@import", page)
    files = [link for link in links if not link.startswith("#")]
    assert len(files) == 3 * 7 + 1
    assert all((reported[0] / link).exists() for link in files)
    anchors = {link[1:] for link in links} - {link[1:] for link in files}
    assert anchors == set(re.findall(r'<h[23] id="(.*?)"', page))
    # It has the headings and tables of the markdown, and a chart for each picture.
    assert page.count("<table>") == len(re.findall(r"\n\| :--- \| ", text)) == 6
    headings = re.findall(r"^##+ (.*)", text, re.MULTILINE)
    assert headings[:3] == ["Finding", "Arms", "Questions"] and len(headings) == 10
    found = re.findall(r"<h[23] .*?>(.*)</h[23]>", page)
    assert [html.unescape(heading) for heading in found] == headings
    pictures = re.findall(r"!\[.*\]\(plots/(.*)\.png\)", text)
    assert re.findall('data-figure="(.*?)"', page) == pictures
    assert pictures == ["size", "loss", "spectrum"]
    assert '<td style="text-align: right;">3.100 ± 0.007</td>' in page
    assert "**" not in page and "| " not in page and "{{" not in page


def test_every_column_is_explained_in_its_head_and_below(reported):
    workdir = reported[0]
    page = without_scripts((workdir / "report.html").read_text("utf-8"))
    text = (workdir / "report.md").read_text("utf-8")
    for column in (*experiment.SUMMARY, *experiment.MEASURES):
        if column.meaning:
            assert f"- **{column.title}**: {column.meaning}" in text
            title = html.escape(column.meaning, quote=False)
            assert re.search(f'<th [^>]*title="{re.escape(title)}"[^>]*>', page)


def test_the_finding_names_the_smallest_arm_that_is_about_as_good_as_d(reported):
    text = (reported[0] / "report.md").read_text("utf-8")
    finding = text.split("## Finding")[1].split("###")[0]
    # B at rank 4 is 0.02 above D; A, smaller than D by as much, is 0.1 above.
    assert "**B** (PCA-finetune, rank 4) has a token table 3.45× smaller" in finding
    assert "nats per token more than this D, which was trained briefly" in finding
    assert "It is recommended" in finding and "tokens for each of its" in finding
    exported = "configs/export.py --config.model_path=FOLDER/gpt_pca_finetune_k4"
    assert f"{exported} --config.format=hf-factored\n" in text
    results = json.loads((reported[0] / "results.json").read_text())
    rows = [r | {"tokens_seen": 10**9} for r in results["rows"] if r["rank"] != 8]
    worse = [row | {"added_loss_interval": [0.0, 0.2]} for row in rows]
    text = markdown_of(results | {"rows": worse, "comparisons": []})
    assert "No model with a smaller table has a loss of at most" in text
    assert "trained briefly" not in text


def test_the_tables_hold_every_number(reported):
    text = (reported[0] / "report.md").read_text("utf-8")

    def row(header, start):
        return " | ".join(cells_of(text, header, start).values())

    assert row("| Arm | Model", "| **A** | PCA-scratch | 4 ") == (
        "**A** | PCA-scratch | 4 | 3.100 ± 0.007 | +0.100 ± 0.007 | 3.45× | 1.21× | "
        "4,000 | 8,000"
    )
    asks = "Is fine-tuning D's weights better than training from scratch?"
    low, high = find(reported[1], "B vs A")["interval"]
    assert row("| Question", "| **B vs A**") == (
        f"**B vs A** | {asks} | 4 | **B is better than A** | −0.080 ± "
        f"{(high - low) / 2:.3f} | 10 evaluation windows | 3.020, 3.100 | 1,000, 4,000 "
        "| 500, –"
    )
    assert row("| Arm | Rank | Table", "| **B** | 4 ") == (
        "**B** | 4 | 464 | 5,464 | 20.49 | – | 1.500 | +4.020 | 0.250 | 0.062 | 0.375 "
        "| 0.001 | 12,346"
    )
    cells = row("| Expectation", "| A ≈ D")
    words = "A is worse than this D, which was trained briefly"
    assert cells == f"A ≈ D in loss | 4 | **did not hold** | {words}"
    lines = [line for line in text.splitlines() if "| 4 | **" not in line]
    cells = cells_of("\n".join(lines), "| Expectation", "| A ≈ D")
    assert (cells["Verdict"], cells["In words"]) == (
        "**exceeded**",
        "A is better than this D, which was trained briefly",
    )
    assert "Rank 4 keeps 56.6% of the energy" in text
    assert "One seed: the interval covers the evaluation text, not " in text
    measured = text.split("## How it was measured")[1]
    for word in (COMMAND, "abc1234", "cpu", "windows 10", "sotu4096", "jax 0.10.2"):
        assert word in measured


def test_foreign_text_stays_text(tmp_path):
    hostile = "<script>alert(1)</script> | *a* `b` [c](http://d) ![e](http://f) &amp;"
    hostile += " {: onclick=alert(1) } {{ 1 }}"
    run = write_run(tmp_path, "baseline")
    path = tmp_path / run / "result.json"
    row = json.loads(path.read_text()) | {"device": hostile}
    row["protocol"]["corpus"] = hostile
    path.write_text(json.dumps(row))
    odd = "odd | <i>run* (1)"
    (tmp_path / run).rename(tmp_path / odd)
    results = collect_results(tmp_path, [odd], FACTORS, hostile)
    lines = f"{hostile}\n\n# {hostile}\n"
    results["samples"] = [
        {"prompt": hostile, "seed": 1, "temperature": 1.0, "texts": {"D": lines}}
    ]
    write_report(tmp_path, results)
    page = without_scripts((tmp_path / "report.html").read_text("utf-8"))
    addresses, links, tags = resources(page)
    assert not addresses and "i" not in tags
    assert not any("http" in link for link in links)
    for name in ("device", "corpus"):
        row = page.split(f">{name}</td>")[1].split("</tr>")[0]
        assert row.count("<td") == 1 and "<em>" not in row
        assert hostile in html.unescape(row)
    block = re.search(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)[1]
    assert html.unescape(block).strip() == hostile and "<" not in block
    assert not re.search(r"<[^>]* onclick=", page) and page.count("<h1") == 1
    (box,) = re.findall(r'<div class="samples">(.*?)</div></div>', page)
    assert html.unescape(box.replace("<br>", "\n")).endswith(lines.rstrip())
    files = page.split('<h2 id="files">')[1]
    assert files.count("<td") == 8  # one run


def test_control_characters_of_texts_are_shown_as_such(tmp_path):
    raw = "a\0b\x1b[31mc\x1ed\x85e\u202ef\r\ng\th"
    seen = r"a\x00b\x1b[31mc\x1ed\x85e\u202ef"
    run = write_run(tmp_path, "baseline")
    results = collect_results(tmp_path, [run], FACTORS, f"{raw} --command")
    results["corpus"]["name"] = raw
    results["samples"] = [
        {"prompt": raw, "seed": 1, "temperature": 1.0, "texts": {"D": raw}}
    ]
    write_report(tmp_path, results)
    for name, count in (("report.md", 5), ("report.html", 5)):
        text = (tmp_path / name).read_text("utf-8")
        shown = without_scripts(text) if name == "report.html" else text
        shown = html.unescape(shown)
        assert not set(shown) & set("\0\x1b\x1e\x85\u202e\r")
        assert shown.count(seen) == count, name


def test_a_second_report_replaces_the_first(tmp_path):
    results = collect_results(
        tmp_path, [write_run(tmp_path, "baseline")], FACTORS, COMMAND
    )
    write_report(tmp_path, results)
    spectrum = tmp_path / "plots" / "spectrum.png"
    shutil.copy(spectrum.with_name("loss.png"), spectrum)  # As of an earlier report.
    write_report(tmp_path, results | {"command": "another"})
    assert "another" in (tmp_path / "report.md").read_text("utf-8")
    assert not spectrum.exists()
    assert not list(tmp_path.rglob("*.replaced-*"))


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_report_moves_a_person_s_files_aside(is_edited, tmp_path, capsys):
    run = write_run(tmp_path, "baseline")
    results = collect_results(tmp_path, [run], FACTORS, COMMAND)
    names = ["report.md", "report.html", "results.json", "plots/loss.png"]
    if is_edited:  # A report with notes.
        write_report(tmp_path, results)
    else:
        names += ["plots/spectrum.png"]
        (tmp_path / "plots").mkdir()
    for name in names:
        with (tmp_path / name).open("a") as file:
            file.write('{"mine": 1}')
    write_report(tmp_path, results)
    out = capsys.readouterr().out
    for name in names:
        path = tmp_path / name
        (kept,) = path.parent.glob(f"{path.name}.replaced-*")
        assert kept.read_bytes().endswith(b'{"mine": 1}')
        assert f"{path} was moved to {kept.name}\n" in out


def test_a_figure_is_a_valid_png_and_one_of_an_older_version_is_replaced(tmp_path):
    results = collect_results(
        tmp_path, [write_run(tmp_path, "baseline")], FACTORS, COMMAND
    )
    write_report(tmp_path, results)
    path = tmp_path / "plots" / "loss.png"
    with PIL.Image.open(path) as image:
        image.load()  # Checks each chunk.
        assert re.fullmatch(r"written by pcagpt, sha256 \w{64}", image.text["Comment"])
        older = PIL.PngImagePlugin.PngInfo()
        older.add_text("Software", "pcagpt")
        image.save(path, pnginfo=older)
    write_report(tmp_path, results)
    assert not list(tmp_path.rglob("*.replaced-*"))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_report_moves_aside_what_is_no_file(make, tmp_path, capsys):
    run = write_run(tmp_path, "baseline")
    results = collect_results(tmp_path, [run], FACTORS, COMMAND)
    names = ("report.html", "results.json")
    for name in names:
        make(tmp_path / name)
        (tmp_path / name).is_dir() and (tmp_path / name / "mine").touch()
    write_report(tmp_path, results)
    out = capsys.readouterr().out
    for name in names:
        assert f"{tmp_path / name} was moved to {name}.replaced-" in out
        assert (tmp_path / name).is_file()


def layers_of(panel):
    """The layers of a chart, with those inside others."""
    found = []
    for layer in panel["layer"]:
        found += layers_of(layer) if "layer" in layer else [layer]
    return found


def scale_of(figure, channel, panel=0):
    """{entry of the legend: its colour, shape, ...} of a chart."""
    whole = figure.panels[panel]
    encodings = [whole["encoding"], *(x.get("encoding", {}) for x in layers_of(whole))]
    scale = next(e[channel]["scale"] for e in encodings if channel in e)
    return dict(zip(scale["domain"], scale["range"], strict=True))


def labels_of(figure):
    return list(scale_of(figure, "color"))


def drawn(figure, field, panel=0):
    """{entry of the legend: the values of a field} of the points of a chart."""
    found = {}
    for point in figure.panels[panel]["data"]["values"]:
        found.setdefault(point["of"], []).append(point[field])
    return found


def test_every_arm_and_a_new_one_are_in_results_figures_and_pages(
    tmp_path, monkeypatch
):
    new = Arm("X", "new arm", "defined by this test", "gpt_new_k{rank}")
    monkeypatch.setitem(ARMS, "new", new)
    asks = compare.Question("Is it better?", "X < A in loss", "less")
    monkeypatch.setitem(compare.QUESTIONS, "X vs A", asks)
    runs = write_experiment(tmp_path, arms=ARMS)
    results = collect_results(tmp_path, reversed(runs), FACTORS, COMMAND)
    # D and D+ have no rank and come first; the others keep the order of ARMS.
    assert [row["arm"] for row in results["rows"]] == list(ARMS)
    assert verdicts(results)["X vs A"] == "did not hold"
    page = write_report(tmp_path, results)
    text = page.with_suffix(".md").read_text("utf-8")
    curves = curves_figure(results["rows"])
    sizes = size_figure(means_over_seeds(results["rows"]))
    for arm in ARMS.values():
        assert cells_of(text, "| Arm | Model", f"| **{arm.letter}** |")
        assert f"- **{arm.letter}**: {arm.meaning}" in text
        label = f"{arm.letter} {arm.title}"
        assert label in labels_of(curves) and label in labels_of(sizes)
    assert len(results["comparisons"]) == len(compare.QUESTIONS)
    for question in compare.QUESTIONS:
        assert f"| **{question}** |" in text


def test_losses_by_decile_are_compared_with_d(tmp_path):
    losses = {
        "baseline": [float(n) for n in range(1, 10)] + [None],
        "pca": [n + 0.25 for n in range(1, 10)] + [None],
        "random": None,  # Of an older version.
    }
    runs = [
        write_run(
            tmp_path,
            arm,
            None if arm == "baseline" else rank,
            seed,
            val_loss_by_decile=of_arm and [x and x + rank * seed for x in of_arm],
        )
        for seed in (0, 1)
        for arm, of_arm in losses.items()
        for rank in ((4, 8) if arm == "pca" else (4,))
    ]
    results = collect_results(tmp_path, runs, FACTORS, COMMAND)
    text = write_report(tmp_path, results).with_suffix(".md").read_text("utf-8")
    section = text.split("### Which tokens pay?")[1].split("\n#")[0]
    assert "plots/decile.png" in section and (tmp_path / "plots/decile.png").is_file()
    header = "| Arm | Rank | 1 |"
    # D's of both seeds differ by 4; A's added loss at rank 8 by 4, too.
    own, at_4, at_8 = (
        cells_of(section, header, row)
        for row in ("| **D** | – |", "| **A** | 4 |", "| **A** | 8 |")
    )
    assert (own["1"], own["9"], own["10"]) == ("3.000", "11.000", "–")
    assert (at_4["1"], at_4["9"], at_4["10"]) == ("+0.250", "+0.250", "–")
    assert (at_8["1"], at_8["10"]) == ("+2.250", "–")
    assert "**C**" not in section
    figure = arms_decile_figure(experiment_view(results)["by_decile"])
    added = [drawn(figure, "added", panel) for panel in (0, 1)]
    assert [set(found) for found in added] == 2 * [{"D baseline", "A PCA-scratch"}]
    assert added[0] == {"D baseline": 9 * [0], "A PCA-scratch": 9 * [0.25]}
    assert added[1]["A PCA-scratch"] == 9 * [2.25]
    assert drawn(figure, "decile")["D baseline"] == list(range(1, 10))
    assert [panel["title"] for panel in figure.panels] == ["rank 4", "rank 8"]


@pytest.mark.parametrize("older", ["baseline", "pca"])
def test_nothing_is_compared_by_decile_with_an_older_result(older, tmp_path):
    for arm, rank in (("baseline", None), ("pca", 4)):
        losses = None if arm == older else 10 * [3.0]
        write_run(tmp_path, arm, rank, val_loss_by_decile=losses)
    runs = ["gpt_baseline", "gpt_pca_k4"]
    results = collect_results(tmp_path, runs, FACTORS, COMMAND)
    page = write_report(tmp_path, results)
    for path in (page, page.with_suffix(".md")):
        assert "Which tokens pay" not in path.read_text("utf-8")
    assert not (tmp_path / "plots" / "decile.png").exists()


def test_no_two_arms_look_alike():
    for name in ("colour", "marker", "letter"):
        assert len({getattr(arm, name) for arm in ARMS.values()}) == len(ARMS)


# The report on a sweep


def sweep_row(method, bands=1, rank=4, bits=32, added=0.25, **others):
    row = {
        **{"method": method, "bands": bands, "rank": rank, "bits": bits},
        **{"budget": 2000, "band_sizes": bands * [V // bands]},
        **{"band_ranks": bands * [rank], "params": 1000 + rank},
        **{"bytes": (1000 + rank) * bits // 8, "loss": 3.0, "added_loss": added},
        **{"added_loss_input": 0.1, "added_loss_head": 0.15, "kl": 0.2},
        **{"top1_agreement": 0.75, "added_loss_by_decile": 10 * [added]},
        **{"second_order_head": added, "second_order_input": 0.0, "seconds": 1.5},
    }
    return Row(**row | others)


def sweep_of(rows):
    return {
        **{"command": COMMAND, "run": "runs/gpt_baseline", "step": 6, "device": "cpu"},
        **{"versions": {"jax": "0.10.2"}, "git_commit": "abc1234", "rows": rows},
        "protocol": {"table": [V, D], "split": "val", "corpus": "sotu", "window": 8},
    }


def test_every_method_and_a_new_one_are_in_the_figure_and_the_page(
    tmp_path, monkeypatch
):
    new = Method(METHODS["svd"].weigh, "New", False, True, "#123456")
    monkeypatch.setitem(METHODS, "new", new)
    rows = [sweep_row(m, bands, k) for m in METHODS for bands in (1, 3) for k in (4, 8)]
    rows += [sweep_row("gone"), sweep_row("baseline", rank=0, bits=8, added=-0.1)]
    rows += [sweep_row("new", 3, 4, bits=2)]
    figure = pareto_figure(sweep_of(rows))
    labels = labels_of(figure)
    colours = scale_of(figure, "color")
    assert all(colours[name] == method.colour for name, method in METHODS.items())
    page = write_sweep_report(tmp_path, sweep_of(rows))
    text = page.with_suffix(".md").read_text("utf-8")
    for method in (*METHODS, "gone"):
        assert method in labels and f"| {method} | " in text
    for method in METHODS:
        assert f"{method}, in bands" in labels and f"| {method}, 3 bands | " in text
    for label in ("D's table, rounded", "new, in bands, int2"):
        assert label in labels
    assert "| D's table, int8 | " in text
    assert "further training win" not in text and "cost be predicted" not in text
    for name, method in METHODS.items():
        assert f"- **{name}**: {method.words}" in text


def test_a_part_of_a_sweep_s_report_without_content_has_no_heading(tmp_path):
    codes = sweep_row("coded", rank=0, bits=4, added_loss_by_decile=None)
    for rows, is_there in (([codes], False), ([codes, sweep_row("svd")], True)):
        page = write_sweep_report(tmp_path, sweep_of(rows))
        text = page.with_suffix(".md").read_text("utf-8")
        assert ("## Questions" in text) == is_there


def test_each_number_of_bits_with_a_dash_has_a_shape_of_its_own():
    assert figures.BITS_SHAPES.keys() == figures.BITS_DASHES.keys()
    assert len(set(figures.BITS_SHAPES.values())) == len(figures.BITS_SHAPES)


def test_the_figure_shows_the_best_number_of_bands_and_cuts_off_tiny_losses():
    rows = [sweep_row("svd", 3, added=0.5), sweep_row("svd", 7, added=0.2)]
    figure = pareto_figure(sweep_of([*rows, sweep_row("pca", added=-0.3)]))
    assert drawn(figure, "drawn") == {"svd, in bands": [0.2], "pca": [1e-3]}
    (tip,) = (p for p in figure.panels[0]["data"]["values"] if p["of"] == "pca")
    assert tip["Added loss"] == "−0.3000"  # The tooltip has the true value.


def test_each_rival_is_one_line_over_bytes_and_the_limit_another():
    rows = [sweep_row("svd"), sweep_row("baseline", rank=0, bits=8, bytes=800)]
    rows += [sweep_row("baseline", rank=0, bits=b, bytes=100 * b) for b in (2, 4)]
    rows += [sweep_row("gptq", rank=0, bits=3, bytes=310)]
    rows += [sweep_row("pq", rank=0, bits=8, budget=n, bytes=n) for n in (450, 250)]
    limit = [[0, 9.0], [50, 2.0], [500, 0.5], [900, 0.1], [950, 1e-4], [9000, 0.01]]
    sweep = sweep_of(rows) | {"gaussian_limit": limit}
    sizes = drawn(pareto_figure(sweep), "MB")
    assert labels_of(numbers_figure(sweep)) == ["svd"]
    for label, expected in (
        ("D's table, rounded", [200, 400, 800]),
        ("D's table, GPTQ", [310]),
        ("D's table, PQ", [250, 450]),
        ("Gaussian R(D), weighting of codes", [500, 900]),  # What the axes show.
    ):
        np.testing.assert_allclose(
            [1e6 * size for size in sorted(sizes[label])], expected
        )
    assert len({rival.marker for rival in RIVALS.values()}) == len(RIVALS)


def test_a_second_axis_has_bits_for_each_number_of_the_table():
    top = pareto_figure(sweep_of([sweep_row("svd")])).panels[0]["layer"][1]
    shown = top["encoding"]["x"]["axis"]
    assert shown["orient"] == "top"
    # 8 bits for each of V * D numbers.
    assert V * D / 1e6 in shown["values"]
    assert shown["labelExpr"] == f"format(datum.value / {V * D / 8e6}, '~g')"


def test_the_smallest_table_that_surely_adds_little_is_recommended(tmp_path):
    sure = sweep_row("coded", bits=0, added=0.006, bytes=300)
    unsure = sweep_row("packed", bits=0, added=0.006, bytes=200)
    surely = {"added_loss_interval": [0.003, 0.009]}
    rows = [
        dataclasses.replace(sure, **surely),
        dataclasses.replace(unsure, added_loss_interval=[0.001, 0.011]),
        sweep_row("baseline", rank=0, bits=4, added=0.009, bytes=600, **surely),
    ]
    sweep = sweep_of(rows)
    write_sweep_report(tmp_path, sweep)
    text = (tmp_path / "report.md").read_text("utf-8")
    finding = text.split("## Finding")[1].split("###")[0]
    assert "**coded, k=4** stores the table in 300 bytes" in finding
    assert "adds **+0.0060 ± 0.0030** nats" in finding
    assert "D's table, int4, needs 2.00× as many bytes for +0.0090 ± 0.0030" in finding
    assert "model_path=FOLDER/best_coded_k4" in text
    write_sweep_report(tmp_path, sweep | {"rows": rows[1:2]})
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "No table adds at most 0.01" in text
    test = sweep | {"protocol": sweep["protocol"] | {"split": "test"}}
    write_sweep_report(tmp_path, test)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "Nothing is chosen on this split. Here, this table " in text
    assert "recommended as" not in text


def test_deciles_are_drawn_for_tables_of_about_the_recommended_size():
    deciles = [0.001 * n for n in range(1, 10)] + [None]
    rows = [
        sweep_row(
            "coded", bits=0, added=0.004, bytes=300, added_loss_by_decile=deciles
        ),
        sweep_row("svd", added=0.3, bytes=310),
        sweep_row("svd", added=0.2, bytes=9000),
    ]
    figure = decile_figure(sweep_of(rows))
    found = drawn(figure, "drawn")
    assert found == {"coded, 0.0003 MB": deciles[:9], "svd, 0.00031 MB": 10 * [0.3]}
    assert drawn(figure, "decile")["coded, 0.0003 MB"] == list(range(1, 10))


def test_intervals_stand_beside_the_added_loss_and_are_bars_in_the_figure(tmp_path):
    known = sweep_row("svd", added=0.25, added_loss_interval=[0.2, 0.3])
    sweep = sweep_of([known, sweep_row("pca", added=0.5)])
    write_sweep_report(tmp_path, sweep)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| svd | **+0.2500 ± 0.0500** |" in text
    assert cells_of(text, "| Table | k", "| svd |")["Added"] == "+0.2500 ± 0.0500"
    assert cells_of(text, "| Table | k", "| pca |")["Added"] == "+0.5000"
    figure = pareto_figure(sweep)
    assert drawn(figure, "low") == {"svd": [0.2], "pca": [0.5]}
    assert drawn(figure, "high") == {"svd": [0.3], "pca": [0.5]}
    (bar,) = (
        layer["encoding"]
        for layer in layers_of(figure.panels[0])
        if "field" in layer.get("encoding", {}).get("y2", {})
    )
    assert (bar["y"]["field"], bar["y2"]["field"]) == ("low", "high")
    trained = {
        **{"letter": "B", "rank": 4, "method": "pca", "bands": 1, "added_loss": 0.1},
        **{"added_at_start": 0.5, "interval": None, "val_loss": 3.1},
    }
    write_sweep_report(tmp_path, sweep | {"recovered": [trained]})
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "|  | svd | k=4 | 3.2500 | +0.2500 ± 0.0500 | – |" in text
    unknown = trained | {"added_at_start": None}  # Its log was lost.
    write_sweep_report(tmp_path, sweep | {"recovered": [unknown]})
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "|  | pca | k=4 | – | – | – | – |" in text
    write_sweep_report(tmp_path, sweep_of([sweep_row("pca")]))
    cells = (tmp_path / "report.md").read_text("utf-8").split("## All tables")[1]
    assert " ± 0" not in cells


def test_the_advice_prints_the_interval():
    row = sweep_row("svd", predicted_loss=0.26, added_loss_interval=[0.2, 0.3])
    text = advice_text(row, (V, D))
    assert "+0.2600 predicted, +0.2500 ± 0.0500 measured, in nats per token" in text
    text = advice_text(dataclasses.replace(row, predicted_loss=None), (V, D))
    assert "added loss: +0.2500 ± 0.0500 measured, in nats per token" in text


@pytest.mark.parametrize("is_anchor", [True, False])
def test_predictions_are_shown_if_a_table_was_measured_for_them(tmp_path, is_anchor):
    write_sweep_report(tmp_path, sweep_of([sweep_row("svd", is_anchor=is_anchor)]))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert ("Predicted" in text) == is_anchor


def test_the_page_of_a_sweep_holds_its_numbers(tmp_path):
    rows = [
        sweep_row("svd", added=a, predicted_loss=p, is_anchor=p is None)
        for a, p in ((0.1, 0.11), (0.2, 0.18), (0.4, 0.8), (0.3, None))
    ]
    recovered = {
        **{"letter": "B", "rank": 4, "method": "svd", "bands": 1, "val_loss": 3.05},
        **{"added_loss": 0.05, "added_at_start": 0.25, "interval": [0.04, 0.06]},
        **{"less_continued": 0.1, "less_continued_interval": [0.09, 0.11]},
        **{"tokens_seen": 1000, "share_of_tokens": 0.25, "learning_rate": 1e-3},
    }
    continued = recovered | {"letter": "D+", "rank": None, "added_loss": -0.05}
    rows += [sweep_row("pca", rank=8), sweep_row("svd", bits=8, predicted_loss=9.0)]
    sweep = sweep_of(rows)
    write_sweep_report(tmp_path, sweep | {"recovered": [recovered, continued]})
    text = (tmp_path / "report.md").read_text("utf-8")
    # The predictions of 0.1 and 0.2 are off by 10 %; 0.4 is not a small loss.
    assert "Of 3 float32 tables" in text and "rank correlation of 1.000" in text
    assert "error of a prediction is 10.0%" in text
    assert "| pca | – | **+0.2500** |" in text  # k=4 and k=8
    assert list(cells_of(text, "|  | Model", "| **B**").values())[1:] == [
        *("svd, trained further", "k=4", "3.0500", "+0.0500 ± 0.0100"),
        *("+0.1000 ± 0.0100", "1,000", "25.0%", "0.001"),
    ]
    cells = cells_of(text, "|  | Model", "| **D+**")
    assert cells["Model"] == "D, trained further"
    assert cells["Minus D+"] == "–"
    assert "|  | svd | k=4 | 3.2500 | +0.2500 | – |" in text
    assert " | –° | 1,004 |" in text
    assert (tmp_path / "plots" / "pareto.png").stat().st_size > 10_000


# Numbers in text


def test_numbers_are_written_for_reading():
    none = {show(None) for show in (texts.signed, texts.times, texts.percent)}
    assert none | {texts.duration(None)} == {"–"}
    header = texts.table(["a", "b"], [["1", "2"]], "lr").splitlines()[1]
    for found, expected in (
        (texts.fixed(-0.1234), "−0.123"),
        (texts.fixed(-0.0001), "0.000"),
        (texts.signed(0.5), "+0.500"),
        (texts.signed(0.0001), "0.000"),
        (texts.count(38597376), "38,597,376"),
        (texts.times(5.907), "5.91×"),
        (texts.percent(0.8245), "82.5%"),
        (texts.duration(200.3), "0:03:20"),
        (texts.plus_minus(0.00001, None, texts.signed), "+0.00001"),
        (texts.plus_minus(0.0, None, texts.signed), "0.000"),
        (texts.plus_minus(3.1234, None), "3.123"),
        (texts.plus_minus(3.1234, 0.0), "3.123 ± 0.000"),
        (texts.plus_minus(0.0357, 0.000214), "0.0357 ± 0.0002"),
        (texts.plus_minus(1e-9, 1e-9), "0.000 ± 0.000"),
        (texts.plus_minus(None, None), "–"),
        (texts.with_interval(0.0357, [0.03568, 0.03572]), "+0.03570 ± 0.00002"),
        (texts.plus_minus(0.5, 0.000004), "0.500000 ± 0.000004"),
        (texts.two_digits(0.1734), "0.17"),
        (texts.code("a_b"), "`a_b`"),
        (texts.code("a|b"), "<code>a&#124;b</code>"),
        (texts.escaped("a\nb_ a_b"), "a b&#95; a_b"),
        (header, "| :--- | ---: |"),
    ):
        assert found == expected


# Figures


def test_the_line_of_d_s_own_table_crosses_the_whole_picture():
    import vl_convert

    (panel,) = pareto_figure(sweep_of([sweep_row("svd")])).panels
    picture = vl_convert.vegalite_to_svg(panel | {"width": 300, "height": 200})
    (line,) = re.findall(r"<line[^>]*#bbbbbb[^>]*>", picture)
    assert 'y2="-200"' in line or 'y2="200"' in line, line


def test_curves_show_every_arm_and_b_twice(reported):
    figure = curves_figure(reported[1]["rows"])
    assert [panel["title"] for panel in figure.panels] == ["rank 4", "rank 8"]
    names = {arm: f"{ARMS[arm].letter} {ARMS[arm].title}" for arm in ARMS}
    for number, panel in enumerate(figure.panels):
        ends = {name: of[-1] for name, of in drawn(figure, "tokens", number).items()}
        expected = {
            names[arm]: 0.004 for arm in ("baseline", "pca", "random")
        }  # millions
        tuned = {names["pca_finetune"]: 0.001, "B, after D's tokens": 0.005}
        assert ends == pytest.approx(expected | tuned)
        colours = scale_of(figure, "color", number)
        assert {colours[name] for name in tuned} == {ARMS["pca_finetune"].colour}
        dashed = [one for one in panel["layer"] if one["mark"].get("strokeDash")]
        assert "B, after D's tokens" in str(dashed[0]["transform"])
        low, high = panel["encoding"]["y"]["scale"]["domain"]
        assert low < 2.8 and high < 4  # The first losses of 7 are cut off.


def test_curves_and_first_losses_come_from_the_sealed_result(tmp_path):
    curve = [[0, 5.0], [1000, 2.0]]
    run = write_run(tmp_path, "baseline", curve=curve)
    results = collect_results(tmp_path, [run], FACTORS, COMMAND)
    assert results["rows"][0]["start_loss"] == 5.0
    assert read_row(tmp_path / run)["curve"] == curve
    result = json.loads((tmp_path / run / "result.json").read_text())
    for wrong in ([[0, "a"]], [1, 2, 3], [[0, {}]]):
        text = json.dumps(result | {"curve": wrong})
        (tmp_path / run / "result.json").write_text(text)
        with pytest.raises(UserError, match="result.json is damaged .'curve'"):
            read_row(tmp_path / run)


def test_no_figure_is_drawn_without_data(tmp_path):
    run = write_run(tmp_path, "baseline", params_total=None)
    (tmp_path / run / "metrics.jsonl").unlink()
    rows = collect_results(tmp_path, [run], FACTORS, COMMAND)["rows"]
    assert curves_figure(rows) is None
    assert size_figure(means_over_seeds(rows)) is None


def test_the_spectrum_is_on_a_log_scale_beside_the_energy_it_keeps():
    figure = spectrum_figure(np.array([3.0, 2.0, 1.0, 0.0]), [3, 1, 9])
    left, right = (panel["encoding"]["y"] for panel in figure.panels)
    assert (left["field"], left["scale"]["type"]) == ("value", "log")
    assert drawn(figure, "value")[""] == [3, 2, 1, None]  # A log scale has no zero.
    shares = drawn(figure, right["field"], 1)[""]
    np.testing.assert_allclose(shares, np.array([9, 13, 14, 14]) / 0.14)
    (label,) = (
        layer["data"]["values"]
        for layer in layers_of(figure.panels[1])
        if layer["mark"]["type"] == "text"
    )
    assert [point["text"] for point in label] == ["rank 1: 64.3%", "rank 3: 100.0%"]


def test_reading_results_and_declaring_a_figure_import_nothing_that_draws():
    script = (
        "import sys, pcagpt.report as report\n"
        "figure = report.spectrum_figure([2.0, 1.0], [1])\n"
        "drawing = {'matplotlib', 'vl_convert', 'jinja2', 'markdown'}\n"
        "assert not drawing & set(sys.modules)\n"
        "assert figure.png().startswith(b'\\x89PNG')\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_published_reports_are_those_of_this_version(tmp_path):
    renew = runpy.run_path(str(ROOT / "scripts/renew_reports.py"))["renew"]
    published = ROOT / "checkpoints" / "published"
    shutil.copytree(published, tmp_path / "published")
    renew(tmp_path / "published")
    reports = list(published.rglob("report.md"))
    assert len(reports) > 5
    for report in reports:
        renewed = tmp_path / "published" / report.relative_to(published)
        assert renewed.read_text("utf-8") == report.read_text("utf-8"), report


def test_the_losses_are_told_on_a_full_disk(
    finished_experiment, tiny_config, monkeypatch, capsys
):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    monkeypatch.setattr("pcagpt.pipeline.execute.write_report", fail)
    with pytest.raises(OSError, match="No space left"):
        execute(changed(tiny_config, task="experiment"))
    told = capsys.readouterr().out
    assert [told.count(f"\n{arm}  ") for arm in "DACB"] == [1, 1, 1, 1]
