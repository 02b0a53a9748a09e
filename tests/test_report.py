import html.parser
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from pcagpt.errors import UserError
from pcagpt.report import collect_results, spectrum_figure, write_report
from pcagpt.report.answers import (
    EQUIVALENCE_MARGIN,
    direction_verdict,
    equivalence_verdict,
    judge_hypotheses,
    mean_interval,
)
from pcagpt.report.plots import COLOURS, curves_figure, parameters_figure, spread_apart
from pcagpt.report.wording import (
    code,
    duration,
    escaped,
    fixed,
    interval,
    places_for,
    signed,
    table,
)

V, D, BLOCKS = 100, 16, 5000
TARGETS = np.array([8.0] * 9 + [5.0])
COMMAND = "python -m pcagpt.main --config=configs/demo.py"
# Losses of the middle seed; the others lie SEED_STEP to either side in every arm alike.
LOSSES = {"baseline": 3.0, "pca": 3.1, "pca_finetune": 3.02, "random": 3.3}
SEED_STEP = 0.125
NAMES = {
    "baseline": "gpt_baseline",
    "pca": "gpt_pca_k{}",
    "pca_finetune": "gpt_pca_finetune_k{}",
    "random": "gpt_random_lowrank_k{}",
}


def write_run(workdir, arm, rank=None, seed=0, loss=None, noise=0.0, **result):
    """A finished run folder; noise is the spread of its windows about its own loss."""
    run = NAMES[arm].format(rank) + (f"_seed{seed}" if seed else "")
    folder = workdir / run
    folder.mkdir(parents=True)
    loss = LOSSES[arm] if loss is None else loss
    tokens = 1000 if arm == "pca_finetune" else 4000
    curve = [(0, loss + 4), (tokens // 2, loss + 0.05), (tokens, loss)]
    lines = [
        {"step": t // 100, "tokens": t, "split": "val", "loss": x} for t, x in curve
    ]
    lines.append({"step": 1, "tokens": 100, "split": "train", "loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"torn'
    (folder / "metrics.jsonl").write_text(text)
    # Alternating, so that the weighted mean is the loss but for the last window.
    wave = noise * np.array([1, -1] * 4 + [0, 0])
    np.save(
        folder / "val_window_losses.npy",
        np.stack([(loss + wave) * TARGETS, TARGETS], axis=1),
    )
    embedding = V * D if rank is None else (V + D) * rank
    row = {
        "run": run,
        "arm": arm,
        "rank": rank,
        "seed": seed,
        "status": "done",
        "steps": tokens // 100,
        "tokens_seen": tokens,
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "word_perplexity": None,
        "bits_per_byte": 1.5,
        "ln_f_cosine": 0.25,
        "ln_f_cosine_p05": 0.0625,
        "ln_f_cosine_d": 0.375,
        "params_total": BLOCKS + embedding,
        "params_embedding": embedding,
        "compression_embedding": V * D / embedding,
        "compression_total": (BLOCKS + V * D) / (BLOCKS + embedding),
        "tokens_per_second": 12345.6,
        "seconds": 75.0,
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "git_commit": "abc1234",
        "protocol": {
            "split": "val",
            "corpus": "sotu",
            "window": 8,
            "stride": 8,
            "tokens_predicted": int(TARGETS.sum()),
            "windows": len(TARGETS),
            "tokenizer": "sotu4096",
            "tokenizer_sha256": None,
        },
    }
    (folder / "result.json").write_text(json.dumps(row | result))
    config = {
        "vocab_size": V,
        "data": {"source": "sotu"},
        "train": {"learning_rate": 0.001 if arm == "pca_finetune" else 0.002},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return run


def write_experiment(workdir, ranks=(4,), seeds=(0,), noise=0.01):
    """The folders of D, and of A, B and C at every rank, for every seed."""
    runs = []
    for place, seed in enumerate(seeds):
        shift = SEED_STEP * (place - (len(seeds) - 1) / 2)
        for arm, loss in LOSSES.items():
            for rank in [None] if arm == "baseline" else ranks:
                spread = {"baseline": 0.0, "pca_finetune": -noise}.get(arm, noise)
                runs.append(write_run(workdir, arm, rank, seed, loss + shift, spread))
    return runs


def write_factorization(workdir, ranks=(4,)):
    folder = workdir / "pca_factorized"
    folder.mkdir(parents=True)
    values = np.arange(D, 0, -1.0)
    np.save(folder / "spectrum.npy", values)
    share = np.cumsum(values**2) / np.sum(values**2)
    kept = {str(k): {"energy_kept": share[k - 1], "relative_error": 0} for k in ranks}
    metadata = {"method": "svd", "effective_rank": 8.5, "ranks": kept}
    (folder / "metadata.json").write_text(json.dumps(metadata))


def compare(results, question, rank=4):
    return next(
        item
        for item in results["comparisons"]
        if (item["question"], item["rank"]) == (question, rank)
    )


def verdicts(results):
    return {item["claim"].split(" in loss")[0]: item for item in results["hypotheses"]}


class Resources(html.parser.HTMLParser):
    """Every address that a page would load, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "background"):
                self.addresses.append(value)
            if name == "href":
                (self.links if tag == "a" else self.addresses).append(value)


# Statistics and verdicts, worked by hand


def test_interval_of_equal_weights_is_students():
    mean, bounds = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)  # t at 97.5 % with 2 degrees of freedom
    assert mean == 2.0
    assert bounds == pytest.approx([2 - half, 2 + half], rel=1e-6)


def test_interval_of_weighted_values_is_worked_by_hand():
    mean, bounds = mean_interval([1.0, 3.0], np.array([3.0, 1.0]))
    # w = ¾, ¼: Σ w² (x − 1.5)² = 0.28125, over 1 − Σ w² = 0.375; t with 1 degree.
    half = 12.706205 * math.sqrt(0.28125 / 0.375)
    assert mean == 1.5
    assert bounds == pytest.approx([1.5 - half, 1.5 + half], rel=1e-6)


def test_one_value_has_no_interval():
    assert mean_interval([2.0]) == (2.0, None)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([-0.2, -0.1], "held"),
        ([0.1, 0.2], "did not hold"),
        ([-0.1, 0.1], "not resolved"),
        ([-0.1, 0.0], "not resolved"),
        (None, "not resolved"),
    ],
)
def test_a_direction_is_judged_by_the_side_of_zero(bounds, verdict):
    assert direction_verdict(bounds) == verdict


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([-0.04, 0.04], "held"),
        ([0.01, 0.02], "held"),
        ([-0.05, 0.05], "held"),
        ([0.06, 0.09], "did not hold"),
        ([-0.09, -0.06], "did not hold"),
        ([0.04, 0.06], "not resolved"),
        ([-0.1, 0.1], "not resolved"),
        (None, "not resolved"),
    ],
)
def test_equivalence_is_judged_by_the_margin(bounds, verdict):
    assert equivalence_verdict(bounds, 0.05) == verdict


# One seed


def test_one_rank_and_one_seed_answer_all_four_questions(tmp_path):
    runs = write_experiment(tmp_path)
    write_factorization(tmp_path)
    results = collect_results(tmp_path, runs, COMMAND)
    asked = [item["question"] for item in results["comparisons"]]
    assert asked == ["A vs C", "A vs D", "B vs A", "B vs D"]
    assert [row["letter"] for row in results["rows"]] == ["D", "A", "B", "C"]
    added = [row["added_loss"] for row in results["rows"]]
    assert added == pytest.approx([0, 0.1, 0.02, 0.3])
    # A and B start from D's table.
    paid = [row["tokens_with_baseline"] for row in results["rows"]]
    assert paid == [4000, 8000, 5000, 4000]
    assert results["command"] == COMMAND
    assert results["git_commit"] == "abc1234"
    assert results["corpus"] == {
        "name": "sotu",
        "source": "sotu",
        "vocab_size": V,
    }
    assert results["protocol"]["windows"] == 10
    assert results["versions"] == {"jax": "0.10.2"}
    assert results["created"].endswith("+00:00")
    kept = sum(k**2 for k in range(13, 17)) / sum(k**2 for k in range(1, 17))
    assert results["spectrum"]["effective_rank"] == 8.5
    assert results["spectrum"]["energy"] == pytest.approx({"4": kept})


def test_one_seed_has_an_interval_over_its_windows(tmp_path):
    results = collect_results(tmp_path, write_experiment(tmp_path), COMMAND)
    item = compare(results, "A vs D")
    # The windows of A lie ±0.01 about D's + 0.1 in eight of ten, on it in two.
    weights = TARGETS / TARGETS.sum()
    spread = np.sum(weights[:8] ** 2 * 0.01**2) / (1 - np.sum(weights**2))
    half = 2.262157 * math.sqrt(spread)
    assert item["effect"] == pytest.approx(0.1)
    assert item["interval"] == pytest.approx([0.1 - half, 0.1 + half], rel=1e-6)
    assert (item["interval_over"], item["interval_units"]) == ("evaluation windows", 10)
    assert item["seeds"] == 1
    assert "not the luck of training" in item["caveat"]


def test_answers_state_the_numbers(tmp_path):
    results = collect_results(tmp_path, write_experiment(tmp_path), COMMAND)
    helps = compare(results, "A vs C")["answer"]
    assert helps.startswith("Yes: at rank 4 ") and "0.200 nats per token below" in helps
    assert "(A 3.100, C 3.300; 95% interval " in helps
    costs = compare(results, "A vs D")["answer"]
    assert costs.startswith("Rank 4 costs 0.100 nats per token, a factor of 1.105 in")
    tuned = compare(results, "B vs A")["answer"]
    assert tuned.startswith("Better: ")
    assert "B took 1,000 tokens of its own, 25% of A's 4,000" in tuned
    assert "5,000 against 8,000" in tuned
    assert "B was down to A's last loss after 500 of its tokens." in tuned
    back = compare(results, "B vs D")["answer"]
    assert back.startswith("No: at rank 4 B stays 0.020 nats per token above D")
    assert "had seen 5,000 tokens, 1,000 of its own after D's 4,000" in back


def test_hypotheses_follow_from_the_intervals(tmp_path):
    results = collect_results(tmp_path, write_experiment(tmp_path), COMMAND)
    judged = {claim: item["verdict"] for claim, item in verdicts(results).items()}
    assert judged == {
        "A < C": "held",
        "A ≈ D": "did not hold",
        "B ≈ D": "held",
        "B < A": "held",
    }
    assert "wholly outside ±0.05" in verdicts(results)["A ≈ D"]["because"]
    assert results["margin"] == EQUIVALENCE_MARGIN == 0.05


def test_wide_intervals_resolve_nothing(tmp_path):
    results = collect_results(tmp_path, write_experiment(tmp_path, noise=1), COMMAND)
    assert {item["verdict"] for item in results["hypotheses"]} == {
        "held",  # A and C wave together: their difference has no spread
        "not resolved",
    }
    assert compare(results, "A vs D")["answer"].startswith("Not resolved at rank 4: ")
    assert "covers zero" in compare(results, "B vs D")["answer"]


def test_the_wrong_side_of_zero_is_said_plainly(tmp_path):
    runs = [
        write_run(tmp_path, "baseline"),
        write_run(tmp_path, "pca", 4, loss=2.9),
        write_run(tmp_path, "pca_finetune", 4, loss=2.95),
        write_run(tmp_path, "random", 4, loss=2.8),
    ]
    results = collect_results(tmp_path, runs, COMMAND)
    answers = [item["answer"] for item in results["comparisons"]]
    starts = ["No: ", "Rank 4 costs nothing", "Not better: ", "Yes, and more: "]
    for answer, beginning in zip(answers, starts, strict=True):
        assert answer.startswith(beginning)
    assert "rests on D's 4,000 tokens as well" in answers[1]
    judged = {claim: item["verdict"] for claim, item in verdicts(results).items()}
    assert judged["A < C"] == judged["B < A"] == "did not hold"
    assert judged["A ≈ D"] == "did not hold"  # better by more than the margin


def test_more_efficient_needs_fewer_tokens(tmp_path):
    comparison = compare(
        collect_results(tmp_path, write_experiment(tmp_path), COMMAND), "B vs A"
    )
    as_many = comparison | {"tokens": [4000, 4000]}
    (judged,) = judge_hypotheses([as_many])
    assert judged["verdict"] == "not resolved"
    assert "fewer tokens were not tried" in judged["because"]


def test_learning_rates_are_told(tmp_path):
    results = collect_results(tmp_path, write_experiment(tmp_path), COMMAND)
    rates = [row["learning_rate"] for row in results["rows"]]
    assert rates == [0.002, 0.002, 0.001, 0.002]
    text = write_report(tmp_path, results).with_suffix(".md").read_text("utf-8")
    assert "D, A and C were trained at one learning rate" in text
    results["rows"][1]["learning_rate"] = 0.004
    text = write_report(tmp_path, results).with_suffix(".md").read_text("utf-8")
    assert "at one learning rate" not in text and "| 0.004 |" in text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "no losses by window"),
        (lambda path: np.save(path, np.ones((3, 2))), "different windows"),
        (lambda path: np.save(path, np.load(path) * [1.1, 1]), "disagree with result"),
    ],
)
def test_without_comparable_windows_nothing_is_resolved(tmp_path, spoil, reason):
    runs = write_experiment(tmp_path)
    spoil(tmp_path / "gpt_pca_k4" / "val_window_losses.npy")
    results = collect_results(tmp_path, runs, COMMAND)
    item = compare(results, "A vs D")
    assert item["interval"] is None and reason in item["answer"]
    assert verdicts(results)["A ≈ D"]["verdict"] == "not resolved"
    assert compare(results, "B vs D")["interval"] is not None
    write_report(tmp_path, results)


# Several ranks, several seeds, some of the arms


def test_every_rank_is_compared_with_the_one_baseline(tmp_path):
    runs = write_experiment(tmp_path, ranks=(8, 4))
    results = collect_results(tmp_path, runs, COMMAND)
    order = [(row["letter"], row["rank"]) for row in results["rows"]]
    assert order == [("D", None)] + [(x, k) for k in (4, 8) for x in "ABC"]
    assert [item["rank"] for item in results["comparisons"]] == [4] * 4 + [8] * 4
    assert len(results["hypotheses"]) == 8


def test_seeds_are_paired(tmp_path):
    runs = write_experiment(tmp_path, seeds=(0, 1, 2))
    changed = tmp_path / "gpt_pca_k4_seed1" / "result.json"
    row = json.loads(changed.read_text())
    changed.write_text(json.dumps(row | {"val_loss": row["val_loss"] + 0.03}))
    item = compare(collect_results(tmp_path, runs, COMMAND), "A vs D")
    # Differences 0.10, 0.13, 0.10: the 0.125 between seeds is not in them.
    half = 4.302653 * 0.03 / 3
    assert item["effect"] == pytest.approx(0.11)
    assert item["interval"] == pytest.approx([0.11 - half, 0.11 + half], rel=1e-6)
    assert (item["interval_over"], item["seeds"]) == ("seeds", 3)
    assert item["caveat"] is None


def test_added_loss_is_over_the_baseline_of_the_same_seed(tmp_path):
    runs = write_experiment(tmp_path, seeds=(0, 1))
    for row in collect_results(tmp_path, runs, COMMAND)["rows"]:
        assert row["added_loss"] == pytest.approx(LOSSES[row["arm"]] - 3.0)


def test_only_seeds_that_both_arms_have_are_compared(tmp_path):
    runs = write_experiment(tmp_path, seeds=(0, 1))
    runs.remove("gpt_random_lowrank_k4_seed1")
    results = collect_results(tmp_path, runs, COMMAND)
    assert compare(results, "A vs C")["interval_over"] == "evaluation windows"
    assert compare(results, "A vs D")["interval_over"] == "seeds"


def test_a_part_of_the_arms_and_no_factorization_still_make_a_report(tmp_path):
    runs = [write_run(tmp_path, "baseline"), write_run(tmp_path, "random", 4)]
    results = collect_results(tmp_path, runs, COMMAND)
    assert results["comparisons"] == results["hypotheses"] == []
    assert results["spectrum"] is None
    text = write_report(tmp_path, results).with_suffix(".md").read_text("utf-8")
    assert "four questions" not in text and "spectrum" not in text
    assert "+0.300" in text
    assert not (tmp_path / "plots" / "spectrum.png").exists()


def test_a_compressed_model_alone_makes_a_report(tmp_path):
    results = collect_results(tmp_path, [write_run(tmp_path, "pca", 4)], COMMAND)
    assert results["rows"][0]["added_loss"] is None
    assert "Rank 4 makes" in write_report(tmp_path, results).read_text("utf-8")


# What cannot be reported on


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gpt_pca_k4.result\.json is missing: finish"):
        collect_results(tmp_path, ["gpt_pca_k4"], COMMAND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "no JSON object"),
        ('{"run": "x"}', "lacks arm, rank"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, message):
    run = write_run(tmp_path, "baseline")
    (tmp_path / run / "result.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        collect_results(tmp_path, [run], COMMAND)
    assert run in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"status": "running"}, "has status 'running', not 'done'"),
        ({"arm": "mystery"}, "'mystery', which is none of baseline, continued, pca"),
    ],
)
def test_an_unfinished_or_unknown_run_is_refused(tmp_path, field, message):
    run = write_run(tmp_path, "baseline")
    path = tmp_path / run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(UserError, match=message):
        collect_results(tmp_path, [run], COMMAND)


def test_the_same_arm_twice_is_refused(tmp_path):
    run = write_run(tmp_path, "baseline")
    with pytest.raises(UserError, match="are both baseline at rank None, seed 0"):
        collect_results(tmp_path, [run, run], COMMAND)


def test_different_protocols_are_refused_by_name(tmp_path):
    runs = [
        write_run(tmp_path, "baseline"),
        write_run(tmp_path, "pca", 4, protocol={"split": "val", "window": 16}),
    ]
    with pytest.raises(UserError, match="different protocols"):
        collect_results(tmp_path, runs, COMMAND)


def test_damaged_window_losses_are_named(tmp_path):
    runs = write_experiment(tmp_path)
    (tmp_path / "gpt_pca_k4" / "val_window_losses.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(
        UserError, match=r"gpt_pca_k4.val_window_losses\.npy is damaged"
    ):
        collect_results(tmp_path, runs, COMMAND)


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="no runs to report on"):
        collect_results(tmp_path, [], COMMAND)


# The files


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of a report on two ranks, written once."""
    workdir = tmp_path_factory.mktemp("reported")
    runs = write_experiment(workdir, ranks=(4, 8))
    write_factorization(workdir, ranks=(4, 8))
    write_report(workdir, collect_results(workdir, runs, COMMAND))
    return workdir


def test_results_are_strict_json(tmp_path):
    run = write_run(tmp_path, "baseline", word_perplexity=float("inf"))
    assert "Infinity" in (tmp_path / run / "result.json").read_text()
    results = collect_results(tmp_path, [run], COMMAND)
    results["rows"][0]["ln_f_cosine"] = float("nan")
    write_report(tmp_path, results)

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    text = (tmp_path / "results.json").read_text("utf-8")
    assert json.loads(text, parse_constant=refuse)["rows"][0]["ln_f_cosine"] is None


def test_the_report_leaves_its_files_and_no_others(reported):
    files = {path.name for path in reported.iterdir() if path.is_file()}
    assert files == {"results.json", "report.md", "report.html"}
    plots = {path.name for path in (reported / "plots").iterdir()}
    assert plots == {"loss.png", "size.png", "spectrum.png"}


def test_the_page_holds_all_it_shows(reported):
    page = (reported / "report.html").read_text("utf-8")
    found = Resources(page)
    assert len(found.addresses) == 3
    assert all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert "http:" not in page and "https:" not in page
    assert "url(" not in page and "@import" not in page
    assert not {"script", "link", "iframe"} & set(found.tags)
    for link in found.links:
        assert (reported / link).exists()


def test_the_page_says_what_the_markdown_says(reported):
    page = (reported / "report.html").read_text("utf-8")
    text = (reported / "report.md").read_text("utf-8")
    assert page.count("<table>") == text.count("|\n\n")
    for heading in ("The models", "The questions", "Size against loss", "Files"):
        assert f"## {heading}\n" in text and f"<h2>{heading}</h2>" in page
    assert '<td style="text-align: right;">3.100</td>' in page
    assert "**" not in page and "| " not in page


def test_the_table_of_models_has_both_ratios_and_every_number(reported):
    text = (reported / "report.md").read_text("utf-8")
    header, row = (
        next(line for line in text.splitlines() if line.startswith(start))
        for start in ("|  | Model | Rank | Loss", "| **A** | PCA-scratch | 4 ")
    )
    cells = dict(
        zip(
            (cell.strip() for cell in header.split("|")),
            (cell.strip() for cell in row.split("|")),
            strict=True,
        )
    )
    del cells[""]
    assert cells == {
        "Model": "PCA-scratch",
        "Rank": "4",
        "Loss": "3.100",
        "Added": "+0.100",
        "Perplexity": "22.20",
        "Word ppl.": "–",
        "Table params": "464",
        "Table ×": "3.45×",
        "Model params": "5,464",
        "Model ×": "1.21×",
        "Tokens": "4,000",
        "Tokens/s": "12,346",
    }
    assert "not comparable across ranks" in text


def test_the_text_says_what_one_seed_is_worth_and_where_numbers_come_from(reported):
    text = (reported / "report.md").read_text("utf-8")
    assert "One seed: the interval covers the evaluation text, not the luck of" in text
    assert "within ±0.05 nats per token" in text
    for word in (COMMAND, "abc1234", "cpu", "sotu", "sotu4096", "0.10.2"):
        assert word in text.split("## How it was measured")[1]


def test_several_seeds_are_shown_with_their_interval(tmp_path):
    runs = write_experiment(tmp_path, seeds=(0, 1, 2))
    write_report(tmp_path, collect_results(tmp_path, runs, COMMAND))
    text = (tmp_path / "report.md").read_text("utf-8")
    half = 4.302653 * SEED_STEP / math.sqrt(3)
    assert f"| 3.100 ± {half:.3f} |" in text
    assert "Means over 3 seeds" in text and "luck of training" not in text
    assert "gpt_pca_k4_seed2" in text.split("## Files")[1]


def test_foreign_text_stays_text(tmp_path):
    hostile = "<script>alert(1)</script> | *a* `b` [c](http://d) ![e](http://f)"
    run = write_run(tmp_path, "baseline", device=hostile)
    write_report(tmp_path, collect_results(tmp_path, [run], hostile))
    page = (tmp_path / "report.html").read_text("utf-8")
    found = Resources(page)
    assert "script" not in found.tags
    assert all(a.startswith("data:") for a in found.addresses)
    assert not any("http" in link for link in found.links)
    row = page.split(">Device</td>")[1].split("</tr>")[0]
    assert row.count("<td") == 1 and "&lt;script&gt;" in row and "<em>" not in row


def test_a_second_report_replaces_the_first(tmp_path):
    runs = write_experiment(tmp_path)
    write_factorization(tmp_path)
    write_report(tmp_path, collect_results(tmp_path, runs, COMMAND))
    results = collect_results(tmp_path, runs, "another command")
    write_report(tmp_path, results | {"spectrum": None})
    assert "another command" in (tmp_path / "report.md").read_text("utf-8")
    assert not (tmp_path / "plots" / "spectrum.png").exists()


# Numbers in words


def test_numbers_are_written_for_reading():
    assert fixed(-0.1234) == "−0.123" and fixed(-0.0001) == "0.000"
    assert signed(0.5) == "+0.500" and signed(0.0) == "0.000" and signed(None) == "–"
    assert interval([-0.1, 0.2]) == "−0.100 to +0.200"
    assert interval([-0.0002, 0.1]) == "−0.0002 to +0.1000"
    assert places_for([0.00001]) == 5 and places_for([0.0, 0.1]) == 3
    assert [duration(s) for s in (41, 200, 7500)] == [
        "41 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert code("a_b") == "`a_b`" and code("a|b") == "<code>a&#124;b</code>"
    assert escaped("a\nb_") == "a b&#95;"
    assert table(["a", "b"], [["1", "2"]], "lr").splitlines()[1] == "| :--- | ---: |"


# Figures


def test_curves_show_every_arm_and_b_twice(tmp_path):
    runs = write_experiment(tmp_path, ranks=(4, 8))
    rows = collect_results(tmp_path, runs, COMMAND)["rows"]
    figure = curves_figure(tmp_path, rows)
    for axes in figure.axes:
        lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
        ends = {(line.get_color(), line.get_xdata()[-1]) for line in lines}
        assert ends == {
            (COLOURS["D"], 4.0),  # thousands of tokens
            (COLOURS["A"], 4.0),
            (COLOURS["C"], 4.0),
            (COLOURS["B"], 1.0),
            (COLOURS["B"], 5.0),
        }
        assert "thousands" in axes.get_xlabel() and axes.get_ylim()[0] < 3.0
    assert len(figure.axes) == 2


def test_there_is_no_figure_of_nothing(tmp_path):
    run = write_run(tmp_path, "baseline", params_total=None)
    (tmp_path / run / "metrics.jsonl").unlink()
    rows = collect_results(tmp_path, [run], COMMAND)["rows"]
    assert curves_figure(tmp_path, rows) is None
    assert parameters_figure(rows) is None


def test_the_spectrum_is_on_a_log_scale_beside_the_energy_it_keeps():
    figure = spectrum_figure(np.array([3.0, 2.0, 1.0, 0.0]), [3, 1, 9])
    left, right = figure.axes
    assert left.get_yscale() == "log"
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [3, 2, 1])
    np.testing.assert_allclose(
        right.lines[0].get_ydata(), np.array([9, 13, 14, 14]) / 0.14
    )
    labels = [text.get_text() for text in right.texts]
    assert labels == ["rank 1: 64.3%", "rank 3: 100.0%"]


def test_labels_keep_apart_and_move_as_little_as_they_can():
    assert spread_apart([0.0, 5.0], 1) == [0.0, 5.0]
    assert spread_apart([1.0, 1.0, 9.0], 1) == [0.5, 1.5, 9.0]
    assert spread_apart([0.0, 0.1, 0.2], 1) == pytest.approx([-0.9, 0.1, 1.1])


def test_reading_results_needs_no_matplotlib_and_drawing_no_pyplot(reported):
    script = (
        "import sys, pathlib, json, pcagpt.report as report\n"
        "assert 'matplotlib' not in sys.modules and 'markdown' not in sys.modules\n"
        f"folder = pathlib.Path({str(reported)!r})\n"
        "results = json.loads((folder / 'results.json').read_text('utf-8'))\n"
        "report.write_report(folder, results)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
