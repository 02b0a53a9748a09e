"""results.json -> the data that the template of an experiment's report shows."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.losses.deciles import DECILES
from pcagpt.losses.interval import CONFIDENCE, mean_interval
from pcagpt.report.compare import (
    ENOUGH_TOKENS,
    FAILED,
    HELD,
    MARGIN,
    UNRESOLVED,
    judge_claims,
    verdict,
)
from pcagpt.report.recommend import preference
from pcagpt.report.text import (
    Column,
    Markdown,
    code,
    count,
    duration,
    fixed,
    half_of,
    plain,
    plus_minus,
    signed,
    times,
    with_interval,
)


def experiment_view(results: dict[str, Any]) -> dict[str, Any]:
    """The data that the template experiment.md.j2 shows."""
    comparisons = results["comparisons"]
    models = means_over_seeds(results["rows"], comparisons)
    questions = list(dict.fromkeys(found["question"] for found in comparisons))
    comparisons = sorted(comparisons, key=lambda c: questions.index(c["question"]))
    caveats = dict.fromkeys(c["caveat"] for c in comparisons if c["caveat"])
    own = next((m for m in models if m["letter"] == "D"), None)
    answers = {
        (c["question"], c["rank"]): _answer(c, own is not None and is_brief(own))
        for c in comparisons
    }
    best = recommended(models)
    return {
        "results": results,
        "models": models,
        "own": own,
        "own_loss": own and _loss(own),
        "own_is_brief": own is not None and is_brief(own),
        "enough_tokens": ENOUGH_TOKENS,
        "best": best,
        "best_loss": best and _loss(best),
        "best_added": best and _against(best["added_loss"], best["added_half"]),
        "best_is_good": best and added_at_most(best) <= MARGIN,
        "best_run": best and run_of(best, results["rows"]),
        "by_decile": with_deciles(models),
        "meanings": {ARMS[m["arm"]].letter: ARMS[m["arm"]].meaning for m in models},
        "comparisons": [
            c | {"answer": answers[c["question"], c["rank"]]} for c in comparisons
        ],
        # Also those of earlier versions are judged by the rules of this one.
        "claims": [
            claim | {"answer": answers[claim["question"], claim["rank"]]}
            for claim in judge_claims(comparisons)
        ],
        "caveats": " ".join(caveats),
        "seeds": sorted({row["seed"] for row in results["rows"]}),
        "interval_name": f"{results.get('confidence', CONFIDENCE):.0%} interval",
        "margin": MARGIN,
        "samples": results.get("samples") or (),
        "summary": SUMMARY,
        "asked": QUESTIONS_ASKED,
        "claimed": CLAIMS,
        "decile_columns": BY_DECILE,
        "measures": MEASURES,
        "files": FILES,
    }


def means_over_seeds(
    rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Makes one entry for each arm and rank, in the order of the rows.

    Numbers are means over seeds; a perplexity is exp of the mean loss. `half` and
    `added_half` are half the intervals of the loss and of the added loss: over seeds,
    or over evaluation windows with one seed. Older results have the second one only in
    the comparisons with D, and no losses by frequency decile.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["rank"]), []).append(row)
    with_d = {
        (first, found["rank"]): found["interval"]
        for found in comparisons
        for first, second in [found["question"].split(" vs ")]
        if second == "D"
    }
    models = []
    for (arm, rank), seeds in groups.items():
        columns = {name: [row.get(name) for row in seeds] for name in seeds[0]}
        model = {
            name: float(np.mean(values))
            for name, values in columns.items()
            if all(type(value) in (int, float) for value in values)
        }
        for name in {"perplexity", "word_perplexity"} & model.keys():
            model[name] = float(np.exp(np.mean(np.log(columns[name]))))
        for name in ("val_loss_by_decile", "added_loss_by_decile"):
            if all(lists := columns.get(name, [None])):
                model[name] = list(map(_mean, zip(*lists, strict=True)))
        model |= {"arm": arm, "letter": ARMS[arm].letter, "title": ARMS[arm].title}
        model |= {"rank": rank, "bands": len(seeds[0].get("band_ranks") or ())}
        added = _interval(columns, "added_loss") or with_d.get((model["letter"], rank))
        model["half"] = half_of(_interval(columns, "val_loss"))
        model["added_half"] = half_of(added)
        models.append(model)
    return models


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _interval(columns: dict[str, list], name: str) -> list[float] | None:
    """The interval of a number: over seeds, or over windows with one seed."""
    values = columns[name]
    if len(values) == 1:
        return columns.get(f"{name}_interval", [None])[0]
    return None if None in values else mean_interval(values)[1]


def is_brief(model: dict[str, Any]) -> bool:
    """Whether a model saw too few tokens for its size to be near its best loss."""
    parameters = model.get("params_total")
    return bool(parameters) and model["tokens_seen"] < ENOUGH_TOKENS * parameters


def recommended(models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first model by `preference`, of those with a smaller table than D's.

    None if no arm has a smaller table, or D is missing.
    """
    own = next((m for m in models if m["letter"] == "D"), {})
    size = own.get("params_embedding")
    smaller = (
        m
        for m in models
        if size and m.get("params_embedding", size) < size and "added_loss" in m
    )

    def key(model: dict[str, Any]) -> tuple[float, ...]:
        cost = model["added_loss"], added_at_most(model)
        return preference(MARGIN, model["params_embedding"], *cost)

    return min(smaller, key=key, default=None)


def added_at_most(model: dict[str, Any]) -> float:
    """The upper end of the interval of the added loss, or the added loss itself."""
    return model["added_loss"] + (model["added_half"] or 0)


def with_deciles(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models to compare with D by frequency decile, and D; none without others."""
    known = [model for model in models if model.get("added_loss_by_decile")]
    return known if any(model["letter"] != "D" for model in known) else []


def run_of(model: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The folder of the first run of a model."""
    same = (r for r in rows if (r["arm"], r["rank"]) == (model["arm"], model["rank"]))
    return next(same)["folder"]


def compared_runs(results: dict[str, Any]) -> dict[str, str]:
    """{name: folder} of the runs whose samples are shown: D and the arms of one rank.

    The rank is that of the recommended model, or the lowest; the seed is the first.
    """
    rows = results["rows"]
    best = recommended(means_over_seeds(rows, results["comparisons"])) or {}
    rank = best.get("rank") or min((r["rank"] for r in rows if r["rank"]), default=None)
    seed = min(row["seed"] for row in rows)
    return {
        f"{row['letter']} {ARMS[row['arm']].title}": row["folder"]
        for row in rows
        if row["rank"] in (None, rank) and row["seed"] == seed
    }


def _answer(comparison: dict[str, Any], d_is_brief: bool) -> str:
    """As `answer`; says whether D was trained briefly."""
    first, second = comparison["question"].split(" vs ")
    if second == "D" and d_is_brief:
        second = "this D, which was trained briefly"
    return answer(first, second, comparison["interval"])


def answer(first: str, second: str, bounds: Sequence[float] | None) -> str:
    """What a reader would say: 'A is better than C', 'no difference is resolved'.

    bounds: the interval of the loss of `first` minus that of `second`, in nats per
    token.
    """
    answers = {
        HELD: f"{first} is better than {second}",
        FAILED: f"{first} is worse than {second}",
        UNRESOLVED: "no difference is resolved",
    }
    found = verdict("less", bounds)
    is_close = verdict("equal", bounds) == HELD
    close = f", by less than {MARGIN}" if is_close and found != UNRESOLVED else ""
    return answers[found] + close


def _against(added: float, half: float | None) -> str:
    """'0.126 ± 0.005 nats per token less than'."""
    return f"{plus_minus(abs(added), half)} nats per token {_LESS[added < 0]} than"


_LESS = {True: "less", False: "more"}


def _loss(model: dict[str, Any]) -> str:
    return plus_minus(model.get("val_loss"), model["half"])


def _bold(text: str) -> Markdown:
    return Markdown(f"**{text}**")


def _rank(model: dict[str, Any]) -> str:
    bands = f", {model['bands']} bands" if model["bands"] > 1 else ""
    return count(model["rank"]) + bands


def _of(name: str, show=count):
    """Shows a field, which can be missing."""
    return lambda row: show(row.get(name))


def _added(model: dict[str, Any]) -> str:
    if model["letter"] == "D":
        return "–"
    return plus_minus(model.get("added_loss"), model["added_half"], signed)


ARM = Column("Arm", "", lambda row: _bold(row["letter"]), "l")
SUMMARY = [
    ARM,
    Column("Model", "", lambda m: m["title"], "l"),
    Column("Rank", "of the token table; none: a full table", _rank),
    Column(
        "Loss",
        "mean cross entropy in nats per token, ± half of its 95% interval: over seeds, "
        "or over evaluation windows with one seed",
        _loss,
    ),
    Column(
        "Added",
        "loss minus D's loss; the interval is of this difference",
        _added,
    ),
    Column(
        "Table ×",
        "D's parameters of the token table (with its scale matrices) divided by these",
        _of("compression_embedding", times),
    ),
    Column("Model ×", "the same for the whole model", _of("compression_total", times)),
    Column("Tokens", "training tokens of the run itself", _of("tokens_seen")),
    Column(
        "With D's",
        "these tokens, plus D's tokens if the arm starts from D's weights or factors",
        _of("tokens_with_baseline"),
    ),
]


def summary_table(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows of cells) of the summary of `means_over_seeds`, without markup."""
    titles = [column.title for column in SUMMARY]
    return titles, [
        [model["letter"], *(column.cell(model) for column in SUMMARY[1:])]
        for model in models
    ]


def _over(found: dict[str, Any]) -> str:
    if not found["interval"]:
        return found["no_interval_because"] or "–"
    return f"{count(found['interval_units'])} {found['interval_over']}"


def _both(name: str, show=count):
    return lambda found: ", ".join(map(show, found[name]))


def _effect(found: dict[str, Any]) -> str:
    return with_interval(found["effect"], found["interval"], places=3)


QUESTIONS_ASKED = [
    Column("Question", "the two arms", lambda c: _bold(c["question"]), "l"),
    Column("It asks", "", lambda c: c["asks"], "l"),
    Column("Rank", "", lambda c: str(c["rank"])),
    Column(
        "Answer",
        "no difference is resolved if the interval contains zero",
        lambda c: _bold(c["answer"]),
        "l",
    ),
    Column(
        "Effect",
        "loss of the first arm minus loss of the second, in nats per token, ± half of "
        "its 95% interval",
        _effect,
    ),
    Column(
        "Over",
        "what the interval is over; windows count as independent samples",
        _over,
        "l",
    ),
    Column("Losses", "of both arms", _both("losses", fixed)),
    Column("Own tokens", "training tokens of both, without D's", _both("tokens")),
    Column(
        "Reached after",
        "own tokens of each arm at its first evaluation that is not above the last "
        "loss of the other; –: none is",
        _both("tokens_to_match"),
    ),
]
CLAIMS = [
    Column("Expectation", "", lambda claim: claim["claim"], "l"),
    Column("Rank", "", lambda claim: str(claim["rank"])),
    Column("Verdict", "", lambda claim: _bold(claim["verdict"]), "l"),
    Column("In words", "", lambda claim: claim["answer"], "l"),
]


def _in_decile(index: int) -> Column:
    def cell(model: dict[str, Any]) -> str:
        if model["letter"] == "D":
            return fixed(model["val_loss_by_decile"][index])
        return signed(model["added_loss_by_decile"][index])

    return Column(str(index + 1), "", cell)


BY_DECILE = [ARM, Column("Rank", "", _rank), *map(_in_decile, range(DECILES))]
MEASURES = [
    ARM,
    Column("Rank", "", _of("rank")),
    Column("Table parameters", "with the scale matrices", _of("params_embedding")),
    Column("Model parameters", "", _of("params_total")),
    Column("Perplexity", "exp of the loss", _of("perplexity", lambda v: fixed(v, 2))),
    Column(
        "Word ppl.",
        "perplexity per word, separated by whitespace, or line end",
        _of("word_perplexity", lambda v: fixed(v, 1)),
    ),
    Column("Bits per byte", "of the text", _of("bits_per_byte", fixed)),
    Column(
        "Added at step 0",
        "loss before the run's own training, minus D's last loss",
        _of("added_at_start", signed),
    ),
    Column(
        "ln_f_cosine",
        "mean cosine between the output and the table row of the next token, in the k "
        "dimensions of the head; not comparable across ranks",
        _of("ln_f_cosine", fixed),
    ),
    Column("5th percentile", "of ln_f_cosine", _of("ln_f_cosine_p05", fixed)),
    Column(
        "ln_f_cosine_d",
        "the same in the d dimensions of the model; comparable across ranks",
        _of("ln_f_cosine_d", fixed),
    ),
    Column(
        "Learning rate",
        "the peak; arms with the same rate were not tuned separately",
        _of("learning_rate", plain),
    ),
    Column("Tokens/s", "of training", _of("tokens_per_second")),
]


def _link(file: str) -> Column:
    def cell(row: dict[str, Any]) -> Markdown:
        return Markdown(f"[{file}]({quote(row['folder'])}/{file})")

    return Column("", "", cell, "l")


FILES = [
    ARM,
    Column("Run", "", lambda row: code(row["folder"]), "l"),
    Column("Seed", "", lambda row: str(row["seed"])),
    Column("Loss", "of this seed", _of("val_loss", lambda v: fixed(v, 4))),
    Column("Time", "of training", _of("seconds", duration), "l"),
    *map(_link, ("result.json", "config.json", "metrics.jsonl")),
]
