"""The questions of an experiment, their intervals and verdicts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pcagpt.losses.interval import CONFIDENCE, mean_interval

INTERVAL = f"{CONFIDENCE:.0%} interval"
MARGIN = 0.05  # nats per token: losses closer than this count as equal
LOSS_AGREEMENT = 1e-3  # nats: largest difference of result.json and the windows
ONE_SEED = "One seed: the interval covers the evaluation text, not other training runs."
HELD, EXCEEDED = "held", "exceeded"
FAILED, UNRESOLVED = "did not hold", "not resolved"
# Fewer training tokens for each parameter than about this leave a model under-trained
# (Hoffmann et al. 2022).
ENOUGH_TOKENS = 20


class Question(NamedTuple):
    """A question about two arms, and the claim of the original system, if any.

    kind is the kind of the claim: 'less' (the first arm has the lower loss), 'less at
    fewer tokens', or 'equal'.
    """

    asks: str
    claim: str = ""
    kind: str = ""


QUESTIONS = {  # "first vs second", by the letters of the arms
    "A vs C": Question(
        "Does PCA initialisation help, at the same rank?",
        "A < C in loss: PCA initialisation is the better start",
        "less",
    ),
    "A vs D": Question(
        "What does the low rank cost after training from scratch?",
        "A ≈ D in loss",
        "equal",
    ),
    "B vs A": Question(
        "Is fine-tuning D's weights better than training from scratch?",
        "B < A in loss at fewer tokens: fine-tuning is more efficient",
        "less at fewer tokens",
    ),
    "B vs D": Question("Does fine-tuning win back D's loss?", "B ≈ D in loss", "equal"),
    "B vs D+": Question("Does B also reach the loss of D, trained further?"),
    "Bd vs B": Question("Do D's predictions teach more than the text?"),
    "A vs E": Question("Do A's factors help beyond their scale?"),
    "A vs F": Question("Do A's factors help beyond their spectrum?"),
    "A vs G": Question("Does it matter which token has which row?"),
}


class WindowInterval(NamedTuple):
    """Interval of a loss difference over evaluation windows, or why it is missing."""

    bounds: list[float] | None
    windows: int | None
    reason: str | None = None


def loss_interval(row: dict[str, Any]) -> list[float] | None:
    """The interval of a row's loss over evaluation windows; None if it has none."""
    if (windows := row["windows"]) is None or row["val_loss"] is None:
        return None
    used = windows[windows[:, 1] > 0]
    if len(used) < 2:
        return None
    mean, bounds = mean_interval(used[:, 0] / used[:, 1], used[:, 1])
    return bounds if abs(mean - row["val_loss"]) <= LOSS_AGREEMENT else None


def window_interval(first: dict[str, Any], second: dict[str, Any]) -> WindowInterval:
    """The interval of the loss of one row minus the loss of another."""
    one, other = first["windows"], second["windows"]
    if one is None or other is None:
        return WindowInterval(None, None, "one of the runs has no losses by window")
    if one.shape != other.shape or (one[:, 1] != other[:, 1]).any():
        return WindowInterval(
            None, None, "the runs were evaluated on different windows"
        )
    used = one[:, 1] > 0
    targets = one[used, 1]
    if len(targets) < 2:
        return WindowInterval(None, None, "one evaluation window gives no interval")
    mean, bounds = mean_interval((one - other)[used, 0] / targets, targets)
    if abs(mean - (first["val_loss"] - second["val_loss"])) > LOSS_AGREEMENT:
        return WindowInterval(
            None, None, "the losses by window disagree with result.json"
        )
    return WindowInterval(bounds, len(targets))


def verdict(
    kind: str, bounds: Sequence[float] | None, tokens: Sequence[float] = (0, 1)
) -> str:
    """Judges a claim of a `Question.kind`: HELD, EXCEEDED, FAILED or UNRESOLVED.

    `bounds` is the interval of first - second in nats per token; `tokens` are the
    training tokens of both, for 'less at fewer tokens'. An equal loss is exceeded by a
    lower one.
    """
    low, high = bounds or (-np.inf, np.inf)
    if kind == "equal":
        if high < -MARGIN:
            return EXCEEDED
        has_held = low >= -MARGIN and high <= MARGIN
        has_failed = low > MARGIN
    else:
        # A lower loss at equally many tokens says nothing about fewer tokens.
        has_held = high < 0 and (kind == "less" or tokens[0] < tokens[1])
        has_failed = low > 0
    return HELD if has_held else FAILED if has_failed else UNRESOLVED


def compare_arms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers each question at each rank with runs of both arms and the same seed."""
    comparisons = []
    for rank in sorted({row["rank"] for row in rows if row["rank"] is not None}):
        for name, question in QUESTIONS.items():
            # D has rank None, so it is compared with every rank.
            first, second = (
                {
                    row["seed"]: row
                    for row in rows
                    if row["letter"] == letter
                    and row["rank"] in (None, rank)
                    and row["val_loss"] is not None
                }
                for letter in name.split(" vs ")
            )
            pairs = [(first[seed], second[seed]) for seed in first if seed in second]
            if pairs:
                heading = {"question": name, "asks": question.asks, "rank": rank}
                comparisons.append(heading | _measure(pairs))
    return comparisons


def judge_claims(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judges the claims of the original system by the comparisons."""
    judged = []
    for found in comparisons:
        _, claim, kind = QUESTIONS[found["question"]]
        if claim:
            judgement = verdict(kind, found["interval"], found["tokens"])
            copied = {name: found[name] for name in ("question", "rank", "caveat")}
            judged.append({"claim": claim, "verdict": judgement} | copied)
    return judged


def _measure(pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """Effect and interval of pairs (first, second) of runs with the same seed."""
    differences = [first["val_loss"] - second["val_loss"] for first, second in pairs]
    effect, bounds = mean_interval(differences)
    over, units, reason = "seeds", len(pairs), None
    if len(pairs) == 1:
        bounds, units, reason = window_interval(*pairs[0])
        over = "evaluation windows" if bounds else None

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
        "tokens_to_match": [
            _tokens_to_match(pairs),
            _tokens_to_match([(second, first) for first, second in pairs]),
        ],
    }


def _tokens_to_match(pairs: list[tuple[dict, dict]]) -> float | None:
    """Tokens of the first run's first evaluation not above the second's last loss.

    The mean over seeds.

    None if the first run of any pair never reaches it.
    """
    reached = []
    for first, second in pairs:
        goal = second["curve"]
        met = [t for t, loss in first["curve"] if goal and loss <= goal[-1][1]]
        if not met:
            return None
        reached.append(met[0])
    return float(np.mean(reached))
