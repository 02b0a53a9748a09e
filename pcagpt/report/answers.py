"""The questions the experiment asks, answered from the numbers of finished runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pcagpt.report.folders import read_curve, read_window_losses
from pcagpt.report.wording import amount, fixed, interval, percent, places_for, signed

CONFIDENCE = 0.95
EQUIVALENCE_MARGIN = 0.05  # nats per token: closer than this counts as the same loss
LOSS_AGREEMENT = 1e-3  # nats: largest rounding between result.json and the windows
ONE_SEED = (
    "One seed: the interval covers the evaluation text, not the luck of training."
)
QUESTIONS = {
    "A vs C": "Does PCA initialisation help, at the same rank?",
    "A vs D": "What does the low rank cost after training from scratch?",
    "B vs A": "Is fine-tuning the baseline's own weights better, or cheaper, than "
    "training from scratch at that rank?",
    "B vs D": "Does fine-tuning win back the baseline's loss?",
    "B vs D+": "And the loss that D reaches when it is trained on for as long?",
    "Bd vs B": "Does learning from D's predictions win back more than the text alone?",
    "A vs E": "Is it more than the scale of A's factors that helps?",
    "A vs F": "Is it more than their spectrum?",
    "A vs G": "Is it more than their rows, whichever token has which?",
}
HYPOTHESES = (  # question, kind of claim, claim
    ("A vs C", "less", "A < C in loss: PCA initialisation is the better start"),
    ("A vs D", "equal", "A ≈ D in loss"),
    ("B vs D", "equal", "B ≈ D in loss"),
    (
        "B vs A",
        "less at fewer tokens",
        "B < A in loss at fewer tokens: fine-tuning is more efficient",
    ),
)


def mean_interval(
    values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, list[float] | None]:
    """Weighted mean and its Student-t interval at CONFIDENCE; None below two values.

    The standard error is that of a weighted mean of independent values,
    sqrt(Σ w² (x − m)² / (1 − Σ w²)) with Σ w = 1; s/√n when the weights are equal.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights)
    weights = weights / weights.sum()
    mean = float(weights @ values)
    if len(values) < 2:
        return mean, None
    spread = weights**2 @ (values - mean) ** 2 / (1 - weights @ weights)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * np.sqrt(spread))
    return mean, [mean - half, mean + half]


def direction_verdict(bounds: Sequence[float] | None) -> str:
    """Of the claim 'less than zero', by the interval of a difference."""
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return "not resolved"
    return "held" if bounds[1] < 0 else "did not hold"


def equivalence_verdict(bounds: Sequence[float] | None, margin: float) -> str:
    """Of the claim 'within ± margin of zero', by the interval of a difference."""
    if bounds is None:
        return "not resolved"
    low, high = bounds
    if -margin <= low and high <= margin:
        return "held"
    return "did not hold" if low > margin or high < -margin else "not resolved"


def compare_arms(workdir: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every question at every rank for which both arms have a run of the same seed.

    Args:
      workdir: folder of the run folders.
      rows: finished runs with letter, folder, rank, seed, val_loss, tokens_seen and
        tokens_with_baseline.
    """
    comparisons = []
    for rank in sorted({row["rank"] for row in rows if row["rank"] is not None}):
        for question, asks in QUESTIONS.items():
            arms = []
            for letter in question.split(" vs "):
                own = None if letter in ("D", "D+") else rank
                arms.append(
                    {
                        row["seed"]: row
                        for row in rows
                        if (row["letter"], row["rank"]) == (letter, own)
                        and row["val_loss"] is not None
                    }
                )
            first, second = arms
            pairs = [(first[seed], second[seed]) for seed in first if seed in second]
            if pairs:
                comparison = {"question": question, "asks": asks, "rank": rank}
                comparison |= _measure(Path(workdir), pairs)
                comparison["answer"] = _answer(comparison)
                comparisons.append(comparison)
    return comparisons


def judge_hypotheses(
    comparisons: Sequence[dict[str, Any]], margin: float = EQUIVALENCE_MARGIN
) -> list[dict[str, Any]]:
    """What the original system expected, held against the comparisons."""
    judged = []
    for question, kind, claim in HYPOTHESES:
        for comparison in comparisons:
            if comparison["question"] == question:
                verdict, because = _judge(kind, comparison, margin)
                judged.append(
                    {
                        "claim": claim,
                        "rank": comparison["rank"],
                        "verdict": verdict,
                        "because": because,
                        "caveat": comparison["caveat"],
                    }
                )
    return judged


def _measure(workdir: Path, pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """Effect and interval of (first, second) runs paired by seed."""
    differences = [first["val_loss"] - second["val_loss"] for first, second in pairs]
    effect, bounds = mean_interval(differences)
    over, units, reason = "seeds", len(pairs), None
    if len(pairs) == 1:
        folders = [workdir / run["folder"] for run in pairs[0]]
        bounds, over, units, reason = window_interval(*folders, effect)

    def means(field: str) -> list[float | None]:
        columns = [[run[field] for run in runs] for runs in zip(*pairs, strict=True)]
        return [None if None in column else np.mean(column) for column in columns]

    return {
        "losses": means("val_loss"),
        "effect": effect,
        "interval": bounds,
        "interval_over": over,
        "interval_units": units,
        "no_interval_because": reason,
        "seeds": len(pairs),
        "caveat": ONE_SEED if len(pairs) == 1 else None,
        "tokens": means("tokens_seen"),
        "tokens_with_baseline": means("tokens_with_baseline"),
        "tokens_to_match": _tokens_to_match(workdir, pairs),
    }


def window_interval(
    first: Path, second: Path, effect: float
) -> tuple[list[float] | None, str | None, int | None, str | None]:
    """Interval over the windows both runs were evaluated on, or why there is none."""
    windows = [read_window_losses(folder) for folder in (first, second)]
    if any(found is None for found in windows):
        return None, None, None, "one of the runs has no losses by window"
    one, other = windows
    if one.shape != other.shape or (one[:, 1] != other[:, 1]).any():
        return None, None, None, "the runs were evaluated on different windows"
    targets = one[:, 1]
    used = targets > 0
    targets, summed = targets[used], (one - other)[used, 0]
    if len(targets) < 2:
        return None, None, None, "one evaluation window has no interval"
    mean, bounds = mean_interval(summed / targets, targets)
    if abs(mean - effect) > LOSS_AGREEMENT:
        reason = "the losses by window disagree with result.json"
        return None, None, None, reason
    return bounds, "evaluation windows", len(targets), None


def _tokens_to_match(workdir: Path, pairs: list[tuple[dict, dict]]) -> float | None:
    """Own tokens at which the first is down to the last loss of the second.

    From the evaluations during training, on average over seeds; None if it never is.
    """
    reached = []
    for first, second in pairs:
        curve = read_curve(workdir / first["folder"])
        goal = read_curve(workdir / second["folder"])
        if not len(goal):
            return None
        met = curve[curve[:, 1] <= goal[-1, 1]]
        if not len(met):
            return None
        reached.append(met[0, 0])
    return float(np.mean(reached))


def _spread(comparison: dict[str, Any]) -> str:
    """95% interval −0.130 to −0.116 over 120 evaluation windows."""
    if comparison["interval"] is None:
        return f"no interval, because {comparison['no_interval_because']}"
    return (
        f"{percent(CONFIDENCE, 0)} interval {interval(comparison['interval'])} over "
        f"{comparison['interval_units']:,} {comparison['interval_over']}"
    )


def _answer(comparison: dict[str, Any]) -> str:
    """One or two sentences written from the numbers."""
    question, rank = comparison["question"], comparison["rank"]
    first, second = question.split(" vs ")
    effect, bounds = comparison["effect"], comparison["interval"]
    places = places_for([effect])
    gap = f"{fixed(abs(effect), places)} nats per token"
    one, other = comparison["losses"]
    spread = _spread(comparison)
    evidence = f"({first} {fixed(one)}, {second} {fixed(other)}; {spread})"
    if direction_verdict(bounds) == "not resolved":
        reason = "." if bounds is None else ", and the interval covers zero."
        says = (
            f"Not resolved at rank {rank}: {first} − {second} is "
            f"{signed(effect, places)} nats per token {evidence}{reason}"
        )
    else:
        above, below = {
            "A vs C": (
                f"No: at rank {rank} the start from D's factorized table ends {gap} "
                f"above the random start {evidence}.",
                f"Yes: at rank {rank} the start from D's factorized table ends {gap} "
                f"below the random start {evidence}.",
            ),
            "A vs D": (
                f"Rank {rank} costs {gap}, a factor of {np.exp(effect):.3f} in "
                f"perplexity {evidence}.",
                f"Rank {rank} costs nothing: A ends {gap} below D {evidence}.",
            ),
            "B vs A": (
                f"Not better: at rank {rank} B ends {gap} above A {evidence}.",
                f"Better: at rank {rank} B ends {gap} below A {evidence}.",
            ),
            "B vs D": (
                f"No: at rank {rank} B stays {gap} above D {evidence}.",
                f"Yes, and more: at rank {rank} B ends {gap} below D {evidence}.",
            ),
            "B vs D+": (
                f"No: at rank {rank} B stays {gap} above D+ {evidence}.",
                f"Yes, and more: at rank {rank} B ends {gap} below D+ {evidence}.",
            ),
        }.get(
            question,
            (
                f"No: at rank {rank} {first} ends {gap} above {second} {evidence}.",
                f"Yes: at rank {rank} {first} ends {gap} below {second} {evidence}.",
            ),
        )
        says = below if effect < 0 else above
    return " ".join([says, *_token_words(comparison)])


def _token_words(comparison: dict[str, Any]) -> list[str]:
    """What the loss was paid with, where the question is about that."""
    question, match = comparison["question"], comparison["tokens_to_match"]
    own, others = comparison["tokens"]
    own_in_all, others_in_all = comparison["tokens_with_baseline"]
    first, second = question.split(" vs ")
    words = []
    if question == "A vs D" and comparison["effect"] < 0:
        words.append(f"A's start rests on D's {amount(others)} tokens as well.")
    if question == "B vs A":
        share = percent(own / others, 0)
        words.append(
            f"B took {amount(own)} tokens of its own, {share} of A's {amount(others)}"
            + (
                f"; with D's, which both start from, {amount(own_in_all)} against "
                f"{amount(others_in_all)}."
                if own_in_all and others_in_all
                else "."
            )
        )
    if question == "B vs D" and own_in_all:
        words.append(
            f"By then B's weights had seen {amount(own_in_all)} tokens, "
            f"{amount(own)} of its own after D's {amount(others)}."
        )
    if question in ("A vs C", "B vs A") and match is not None:
        when = (
            f"after {amount(match)} of its tokens" if match else "before its first step"
        )
        words.append(f"{first} was down to {second}'s last loss {when}.")
    return words


def _judge(kind: str, comparison: dict[str, Any], margin: float) -> tuple[str, str]:
    """Verdict on a claim of this kind, and the numbers behind it."""
    bounds = comparison["interval"]
    first, second = comparison["question"].split(" vs ")
    effect = comparison["effect"]
    because = (
        f"{first} − {second} is {signed(effect, places_for([effect]))} "
        f"({_spread(comparison)})"
    )
    if bounds is None:
        return "not resolved", because
    if kind == "equal":
        verdict = equivalence_verdict(bounds, margin)
        where = {
            "held": "within",
            "did not hold": "wholly outside",
            "not resolved": "across the edge of",
        }[verdict]
        return verdict, f"{because}, {where} ±{fixed(margin, 2)}"
    verdict = direction_verdict(bounds)
    where = {
        "held": "below zero",
        "did not hold": "above zero",
        "not resolved": "which covers zero",
    }[verdict]
    because = f"{because}, {where}"
    if kind == "less at fewer tokens":
        own, others = comparison["tokens"]
        fewer = own < others
        because += f"; B took {amount(own)} tokens of its own, A {amount(others)}"
        if verdict == "held" and not fewer:
            verdict = "not resolved"
            because += ", so that fewer tokens were not tried"
    return verdict, because
