"""results.json -> the data that the template of an experiment's report shows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pcagpt.arms import ARMS
from pcagpt.losses.interval import CONFIDENCE, mean_interval
from pcagpt.report.compare import FAILED, HELD, verdict


def experiment_view(results: dict[str, Any]) -> dict[str, Any]:
    """The data that the template experiment.md.j2 shows."""
    models = means_over_seeds(results["rows"])
    comparisons = results["comparisons"]
    questions = list(dict.fromkeys(found["question"] for found in comparisons))
    comparisons = sorted(comparisons, key=lambda c: questions.index(c["question"]))
    caveats = dict.fromkeys(c["caveat"] for c in comparisons if c["caveat"])
    return {
        "results": results,
        "models": models,
        "meanings": {ARMS[m["arm"]].letter: ARMS[m["arm"]].meaning for m in models},
        "comparisons": [found | {"answer": _answer(found)} for found in comparisons],
        "caveats": " ".join(caveats),
        "seeds": sorted({row["seed"] for row in results["rows"]}),
        "interval_name": f"{results.get('confidence', CONFIDENCE):.0%} interval",
    }


def means_over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes one entry for each arm and rank, in the order of the rows.

    Numbers are means over seeds; `half` is half the interval of the loss over seeds.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["rank"]), []).append(row)
    models = []
    for (arm, rank), seeds in groups.items():
        columns = {name: [row.get(name) for row in seeds] for name in seeds[0]}
        model = {
            name: float(np.mean(values))
            for name, values in columns.items()
            if all(type(value) in (int, float) for value in values)
        }
        bounds = mean_interval(columns["val_loss"])[1] if "val_loss" in model else None
        models.append(
            model
            | {"arm": arm, "letter": ARMS[arm].letter, "title": ARMS[arm].title}
            | {"rank": rank, "bands": len(seeds[0].get("band_ranks") or ())}
            | {"half": (bounds[1] - bounds[0]) / 2 if bounds else None}
        )
    return models


def _answer(comparison: dict[str, Any]) -> str:
    """'A is lower', 'A is higher' or 'not resolved'."""
    first = comparison["question"].split()[0]
    answers = {HELD: f"{first} is lower", FAILED: f"{first} is higher"}
    found = verdict("less", comparison["interval"])
    return answers.get(found, found)
