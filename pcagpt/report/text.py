"""results.json → the text of the report, in markdown."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pcagpt.arms import BY_LETTER
from pcagpt.report.answers import HYPOTHESES, QUESTIONS, mean_interval
from pcagpt.report.colophon import files, provenance
from pcagpt.report.wording import (
    NOTHING,
    code,
    count,
    escaped,
    fixed,
    interval,
    listed,
    percent,
    perplexity,
    places_for,
    signed,
    table,
    times,
)

TITLE = "What a smaller token table costs"


def report_markdown(results: dict[str, Any], plots: Sequence[str]) -> str:
    """The report as markdown.

    Args:
      results: what `collect_results` returned.
      plots: names of the figures there are in plots/, of 'loss', 'size', 'spectrum'.
    """
    arms = _by_arm(results["rows"])
    parts = [
        f"# {TITLE}",
        _summary(results, arms),
        "## The models",
        *_models(results, arms),
        *_figure("loss", plots, _loss_caption(results)),
        *_questions(results),
        *_hypotheses(results),
        *_sizes(plots),
        *_spectrum(results, plots),
        "## How it was measured",
        provenance(results),
        "## Files",
        *files(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_arm(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (letter, rank): means over seeds, and loss ± half interval."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["letter"], row["rank"]), []).append(row)
    arms = []
    for (letter, rank), members in groups.items():
        names = {name for row in members for name in row}
        columns = {name: [row.get(name) for row in members] for name in names}
        arm = {
            name: float(np.mean(values))
            for name, values in columns.items()
            if all(type(value) in (int, float) for value in values)
        }
        _, bounds = (
            mean_interval(columns["val_loss"]) if "val_loss" in arm else (0, None)
        )
        half = (bounds[1] - bounds[0]) / 2 if bounds else None
        runs = [row["run"] for row in members]
        bands = len(members[0].get("band_ranks") or ())
        identity = {"letter": letter, "rank": rank, "runs": runs, "half": half}
        identity["bands"] = bands
        arms.append(arm | identity)
    return arms


def _caveats(items: Sequence[dict[str, Any]]) -> str:
    """Each caveat that the items carry, once."""
    return " ".join(dict.fromkeys(item["caveat"] for item in items if item["caveat"]))


def _summary(results: dict[str, Any], arms: Sequence[dict[str, Any]]) -> str:
    """The answer in one paragraph."""
    sentences = []
    baseline = next((arm for arm in arms if arm["letter"] == "D"), None)
    split = escaped(results["protocol"].get("split", "val"))
    split = "validation" if split == "val" else split
    if baseline:
        sentences.append(
            f"The baseline D reaches {fixed(baseline.get('val_loss'))} nats per token "
            f"on the {split} split of "
            f"{code(results['corpus'].get('name', 'the corpus'))}."
        )
    how = {
        "A": "when trained from scratch on D's factorized table (A)",
        "B": "when fine-tuned from D (B)",
        "Bd": "when fine-tuned towards D's predictions (Bd)",
        "C": "when trained from a random start (C)",
    }
    ranks = sorted({arm["rank"] for arm in arms if arm["rank"]})
    for rank in ranks:
        here = [arm for arm in arms if arm["rank"] == rank]
        costs = [
            (signed(arm["added_loss"]), arm["letter"])
            for arm in here
            if "added_loss" in arm and arm["letter"] in how
        ]
        table_times = times(here[0].get("compression_embedding"))
        model_times = times(here[0].get("compression_total"))
        if rank == ranks[0]:  # in full once, then in the same order
            says = (
                f"Rank {rank} makes the token table **{table_times} smaller** and the "
                f"whole model **{model_times} smaller**"
            )
            changes = listed([f"{cost} {how[letter]}" for cost, letter in costs])
            changes = f"; in nats per token the loss changes by {changes}"
        else:
            says = f"Rank {rank}: **{table_times}** and **{model_times}** smaller"
            changes = listed([f"{cost} ({letter})" for cost, letter in costs])
            changes = f", {changes}"
        sentences.append(says + (changes if costs else "") + ".")
    verdicts = [judged["verdict"] for judged in results["hypotheses"]]
    if verdicts:
        counted = [
            f"{verdicts.count(verdict)} {words}"
            for verdict, words in (
                ("held", "held"),
                ("did not hold", "did not hold"),
                ("not resolved", "could not be resolved"),
            )
            if verdict in verdicts
        ]
        over = f" over {len(ranks)} ranks" if len(ranks) > 1 else ""
        sentences.append(
            f"Of {len(verdicts)} expectations of the original system{over}, "
            f"{listed(counted)}."
        )
    sentences.append(_caveats(results["comparisons"]))
    return " ".join(sentence for sentence in sentences if sentence)


def _models(results: dict[str, Any], arms: Sequence[dict[str, Any]]) -> list[str]:
    """The comparison table, the table of the kin of the loss, and their notes."""
    header = {
        "": "l",
        "Model": "l",
        "Rank": "r",
        "Loss": "r",
        "Added": "r",
        "Perplexity": "r",
        "Word ppl.": "r",
        "Table params": "r",
        "Table ×": "r",
        "Model params": "r",
        "Model ×": "r",
        "Tokens": "r",
        "Tokens/s": "r",
    }
    sizes = [
        [
            f"**{arm['letter']}**",
            BY_LETTER[arm["letter"]].title,
            _rank(arm),
            _loss(arm),
            NOTHING if arm["letter"] == "D" else signed(arm.get("added_loss")),
            perplexity(arm.get("perplexity")),
            perplexity(arm.get("word_perplexity")),
            count(arm.get("params_embedding")),
            times(arm.get("compression_embedding")),
            count(arm.get("params_total")),
            times(arm.get("compression_total")),
            count(arm.get("tokens_seen")),
            count(arm.get("tokens_per_second")),
        ]
        for arm in arms
    ]
    seeds = {row["seed"] for row in results["rows"]}
    repeats = (
        f" Means over {len(seeds)} seeds; ± is the half width of the "
        f"{percent(results['confidence'], 0)} interval over them."
        if len(seeds) > 1
        else ""
    )
    kin_header = {
        "": "l",
        "Model": "l",
        "Rank": "r",
        "Added at step 0": "r",
        "Bits per byte": "r",
        "ln_f_cosine": "r",
        "5th percentile": "r",
        "ln_f_cosine_d": "r",
        "Learning rate": "r",
        "Tokens with D's": "r",
    }
    kin = [
        [
            f"**{arm['letter']}**",
            _title(arm),
            _rank(arm),
            signed(arm.get("added_at_start")),
            fixed(arm.get("bits_per_byte")),
            fixed(arm.get("ln_f_cosine")),
            fixed(arm.get("ln_f_cosine_p05")),
            fixed(arm.get("ln_f_cosine_d")),
            f"{arm['learning_rate']:g}" if "learning_rate" in arm else NOTHING,
            count(arm.get("tokens_with_baseline")),
        ]
        for arm in arms
    ]
    return [
        table(list(header), sizes, "".join(header.values())),
        "Loss is the mean over the split in nats per token, perplexity its "
        "exponential; added loss is the loss less D's. × says how many times smaller "
        "than D's the token table (with its scale matrices) and the whole model are. "
        "Word perplexity is per whitespace-separated word or line end. "
        f"Tokens are those of the run's own training.{repeats}",
        table(list(kin_header), kin, "".join(kin_header.values())),
        "`ln_f_cosine` is the cosine of the output with the head's row of the next "
        "token, in the k dimensions of the head: **not comparable across ranks**, "
        "because a projection shortens what it projects. `ln_f_cosine_d` is the same "
        "in the d dimensions of the model, for every rank alike. What starts from D's "
        "table has D's tokens as part of what it costs whoever has no D yet. Added at "
        "step 0 is the loss before any training, less D's last: of B, what the "
        "factorization alone costs." + _rates(arms),
    ]


def _title(arm: dict[str, Any]) -> str:
    """The run's name, or what its arm is called where there are several."""
    return BY_LETTER[arm["letter"]].title if arm["runs"][1:] else code(arm["runs"][0])


def _rank(arm: dict[str, Any]) -> str:
    """The rank, or whose size it is and in how many bands."""
    bands = f", {arm['bands']} bands" if arm["bands"] > 1 else ""
    return count(arm["rank"]) + bands


def _rates(arms: Sequence[dict[str, Any]]) -> str:
    """Whether the arms that train from scratch share a learning rate."""
    scratch = [arm for arm in arms if not BY_LETTER[arm["letter"]].is_fine_tuned]
    rates = {arm.get("learning_rate") for arm in scratch}
    if len(scratch) < 2 or len(rates) > 1 or None in rates:
        return ""
    letters = listed(list(dict.fromkeys(arm["letter"] for arm in scratch)))
    return f" {letters} were trained at one learning rate, not each at its own best."


def _loss(arm: dict[str, Any]) -> str:
    """A loss, with ± over seeds where there are several."""
    half = f" ± {fixed(arm['half'])}" if arm["half"] is not None else ""
    return fixed(arm.get("val_loss")) + half


def _figure(name: str, plots: Sequence[str], caption: str) -> list[str]:
    """A figure that was drawn, over its caption."""
    alt = caption.split(".")[0]
    return [f"![{alt}](plots/{name}.png)", f"*{caption}*"] if name in plots else []


def _loss_caption(results: dict[str, Any]) -> str:
    """What the curves show."""
    letters = {row["letter"] for row in results["rows"]}
    fine_tuned = [
        letter for letter in sorted(letters) if BY_LETTER[letter].is_fine_tuned
    ]
    verb = "start" if fine_tuned[1:] else "starts"
    fine_tuned = (
        f" {listed(fine_tuned)} {verb} at the end of D: the solid line counts own "
        "tokens, the dashed one adds D's."
        if fine_tuned
        else ""
    )
    return (
        "Validation loss against tokens trained on. The numbers on the right are "
        f"the last evaluation of each arm.{fine_tuned} Losses above the frame "
        "are cut off."
    )


def _questions(results: dict[str, Any]) -> list[str]:
    """The comparisons as a table, then in words."""
    comparisons = results["comparisons"]
    if not comparisons:
        return []
    header = ["Question", "Rank", "Effect", _interval_name(results), "Over"]
    numbers, words = [], []
    for question, asks in QUESTIONS.items():
        here = [item for item in comparisons if item["question"] == question]
        if not here:
            continue
        for item in here:
            units = item["interval_units"]
            numbers.append(
                [
                    question,
                    count(item["rank"]),
                    signed(item["effect"], places_for([item["effect"]])),
                    interval(item["interval"]),
                    f"{units:,} {item['interval_over']}" if units else NOTHING,
                ]
            )
        answers = [escaped(item["answer"]) for item in here]
        words.append(f"### {question}: {asks}")
        words.append("\n".join(f"- {answer}" for answer in answers))
    by_windows = any(item["interval_over"] != "seeds" for item in comparisons)
    notes = [
        "The effect is the loss of the first less that of the second, in nats per "
        "token: below zero, the first is better.",
        "Windows are taken as independent." if by_windows else "",
        _caveats(comparisons),
    ]
    return [
        "## The questions",
        table(header, numbers, "lrrrl"),
        " ".join(note for note in notes if note),
        *words,
    ]


def _interval_name(results: dict[str, Any]) -> str:
    """95% interval."""
    return f"{percent(results['confidence'], 0)} interval"


def _hypotheses(results: dict[str, Any]) -> list[str]:
    """What the original system expected, and what became of it."""
    judged = results["hypotheses"]
    if not judged:
        return []
    rows = [
        [
            escaped(item["claim"]),
            count(item["rank"]),
            f"**{item['verdict']}**",
            escaped(item["because"]),
        ]
        for _, _, claim in HYPOTHESES
        for item in judged
        if item["claim"] == claim
    ]
    return [
        "## What the original system expected",
        "Its expectations are hypotheses here. One about a direction holds when the "
        "interval lies on its side of zero; ≈ holds when the interval lies within "
        f"±{fixed(results['margin'], 2)} nats per token. {_caveats(judged)}".rstrip(),
        table(["Hypothesis", "Rank", "Verdict", "Because"], rows, "lrll"),
    ]


def _sizes(plots: Sequence[str]) -> list[str]:
    """The figure of parameters against loss."""
    caption = (
        "Parameters against loss. On the left the parameters of the token table with "
        "its scale matrices, on the right those of the whole model."
    )
    figure = _figure("size", plots, caption)
    return ["## Size against loss", *figure] if figure else []


def _spectrum(results: dict[str, Any], plots: Sequence[str]) -> list[str]:
    """The spectrum of D's table and the energy each rank keeps."""
    spectrum = results["spectrum"]
    if not spectrum:
        return []
    method = f" (method {code(spectrum['method'])})" if spectrum["method"] else ""
    kept = [
        f"{percent(energy)} at rank {rank}"
        for rank, energy in spectrum["energy"].items()
        if energy is not None
    ]
    says = f"D's token table was factorized{method}."
    if spectrum["effective_rank"] is not None:
        says += f" Its effective rank is {fixed(spectrum['effective_rank'], 1)}"
        says += f"; the energy kept is {listed(kept)}." if kept else "."
    caption = (
        "Spectrum of the token table. Left: singular values, on a log scale; right: "
        "the share of their energy (sum of squares) kept by each rank. Energy is not "
        "loss: one direction that all tokens share can hold most of it."
    )
    return ["## The spectrum of the table", says, *_figure("spectrum", plots, caption)]
