"""The parts of the pages that `update_readme.py` writes and that are no plain results.

Each function takes a folder of checkpoints/published and returns markdown.
"""

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pcagpt.config.schema import ModelSettings
from pcagpt.methods import CODED, PACKED
from pcagpt.model import GPTConfig
from pcagpt.model.size import embedding_parameters, total_parameters
from pcagpt.report.compare import QUESTIONS, judge_claims
from pcagpt.report.experiment import answer
from pcagpt.report.recommend import SMALL_COST, compared_rows
from pcagpt.report.row_text import row_name
from pcagpt.report.sweep import baseline_of, sweep_view
from pcagpt.report.text import (
    NOTHING,
    count,
    escaped,
    fixed,
    percent,
    signed,
    table,
    times,
    with_interval,
)
from pcagpt.rows import Row, read_sweep

# The defaults of `ModelSettings` are the other sizes of GPT-2 small.
GPT2_SMALL = {"vocab_size": 50257}
# The texts of smollm2_135m, whose files call them `wiki`.
TEXTS = {
    "val": "WikiText-103's validation split",
    "test": "the State of the Union addresses",
}


def headline(folder: Path) -> str:
    """The recommended table of a sweep in a few sentences, with its cost."""
    own, other = (read_sweep(folder / name / "sweep.json") for name in ("val", "test"))
    view, dense = sweep_view(own), baseline_of(own)
    best, rounded = view["best"], view["rounded"]
    packed = next(row for row in compared_rows(own) if row.method == PACKED)
    tested, tested_packed = (
        next(row for row in other["rows"] if row.recipe == chosen.recipe)
        for chosen in (best, packed)
    )
    bits = 8 * best.bytes / dense["params"]
    name = row_name(rounded.method, 1, rounded.bits).removeprefix("D's table, ")
    name = " in ".join(name.split(", "))
    smaller = times(dense["bytes"] / best.bytes)
    return (
        f"**{own['run']}'s token table takes {megabytes(best.bytes)} in a file instead "
        f"of {megabytes(dense['bytes'])} in float32, {smaller} smaller. The model's "
        f"loss of {fixed(dense['loss'], 2)} nats per token rises by {added(best)} on "
        f"{TEXTS['val']}** and by {added(tested)} on {TEXTS['test']} (± half of the "
        "95% interval over windows of the text). The file has "
        f"{fixed(bits, 2)} bits for each number. {name} needs "
        f"{times(rounded.bytes / best.bytes)} the bytes to add at most {SMALL_COST} "
        "nats. These files save disk, and are decoded to the full size in memory. A "
        f"packed table also saves memory: it takes {megabytes(packed.memory)} on the "
        f"device and adds {added(packed)} nats on {TEXTS['val']} and "
        f"{added(tested_packed)} on {TEXTS['test']}."
    )


def megabytes(number: int) -> str:
    """12683480 → '12.7 MB'."""
    return f"{fixed(number / 1e6, 1)} MB"


def short_table(folder: Path) -> str:
    """The recommended table of a sweep, and the nearest one of each other kind."""
    own, other = (read_sweep(folder / name / "sweep.json") for name in ("val", "test"))
    tested = {row.recipe: added(row) for row in other["rows"]}
    numbers = baseline_of(own)["params"]
    rows = [
        [
            row_name(row.method, row.bands, row.bits),
            count(row.bytes),
            fixed(8 * row.bytes / numbers, 2),
            count(row.memory),
            added(row),
            tested.get(row.recipe, NOTHING),
        ]
        for row in compared_rows(own)
    ]
    header = ["Table", "Bytes", "Bits", "Memory", "Added, validation", "Added, test"]
    return table(header, rows, "lrrrrr")


def questions_table(folder: Path) -> str:
    """The questions of an experiment, with their answers at each rank."""
    found = json.loads((folder / "results.json").read_text("utf-8"))["comparisons"]
    verdicts = {
        (claim["question"], claim["rank"]): f", {claim['verdict']}"
        for claim in judge_claims(found)
    }
    ranks = sorted({one["rank"] for one in found})
    rows = []
    for name, question in QUESTIONS.items():
        cells = {
            one["rank"]: half_interval(one) + verdicts.get((name, one["rank"]), "")
            for one in found
            if one["question"] == name
        }
        if cells:
            shown = [cells.get(rank, NOTHING) for rank in ranks]
            rows.append(
                [
                    f"**{name}**",
                    question.asks,
                    escaped(question.claim.partition(":")[0]) or NOTHING,
                    *shown,
                ]
            )
    header = ["Models", "Question", "Expected", *(f"k = {rank}" for rank in ranks)]
    return table(header, rows, "lll" + len(ranks) * "r")


def half_interval(found: dict) -> str:
    """The effect of a comparison, ± half of its interval."""
    return with_interval(found["effect"], found["interval"], places=3)


def sizes_table(_: Path) -> str:
    """Parameters of GPT-2 small by the rank of its table, with tied scales."""
    rows, own = [], None
    for rank in (0, 256, 128, 64):
        config = GPTConfig(
            **asdict(ModelSettings()) | GPT2_SMALL | {"n_embd_wte": rank}
        )
        numbers = embedding_parameters(config), total_parameters(config)
        own = own or numbers
        shares = [times(full / less) for full, less in zip(own, numbers, strict=True)]
        cells = zip(map(count, numbers), shares, strict=True)
        rows.append([count(rank) if rank else NOTHING, *chain(*cells)])
    header = ["k", "table parameters", "smaller by", "model parameters", "smaller by"]
    return table(header, rows, "rrrrr")


def samples(folder: Path) -> str:
    """What D and the recommended model write after the same prompts."""
    sweep = read_sweep(folder / "sweep.json")
    best = sweep_view(sweep)["model"].model_name
    rows = [
        [escaped(text) for text in (one["prompt"], *map(one["texts"].get, ("D", best)))]
        for one in sweep["samples"]
    ]
    return table(["Prompt", "D writes", f"{escaped(best)} writes"], rows, "lll")


def calibration_table(folder: Path) -> str:
    """Added loss of coded tables by the length of the calibration text."""
    sweeps = [read_sweep(path) for path in folder.glob("calibration_*.json")]
    sweeps.append(read_sweep(folder / "val" / "sweep.json"))
    losses = {
        sweep["protocol"]["calibration_tokens"]: {
            row.rank: added(row) for row in sweep["rows"] if row.method == CODED
        }
        for sweep in sweeps
    }
    ranks = sorted(losses[min(losses)])
    rows = [
        [count(tokens), *(losses[tokens].get(rank, NOTHING) for rank in ranks)]
        for tokens in sorted(losses)
    ]
    sizes = {r.rank: r.bytes for r in sweeps[-1]["rows"] if r.method == CODED}
    header = ["Calibration tokens", *(megabytes(sizes[rank]) for rank in ranks)]
    return table(header, rows, "r" * len(header))


def failures(published: Path) -> str:
    """What did not hold, or held for one model alone."""
    brief, hour, proxy = (
        json.loads((published / name / "results.json").read_text("utf-8"))
        for name in ("gpt2_small_wikipedia", "gpt2_small_hour", "gpt2_proxy_hour")
    )
    steps, briefly = hour["rows"][0]["steps"], brief["rows"][0]["steps"]
    (b_less_a,) = comparisons(hour, "B vs A")
    (a_less_d,) = comparisons(hour, "A vs D")
    (a_less_c,) = comparisons(hour, "A vs C")
    (b_less_d,) = comparisons(hour, "B vs D")
    brief_d, brief_c = (
        next(
            one for one in comparisons(brief, asked) if one["rank"] == a_less_d["rank"]
        )
        for asked in ("A vs D", "A vs C")
    )
    b_tokens, a_tokens = b_less_a["tokens"]
    briefly_trained, longer, smollm2 = (
        read_sweep(published / folder / "sweep.json")
        for folder in (
            "gpt2_small_compression",
            "gpt2_small_table/val",
            "smollm2_135m/val",
        )
    )
    trained = {row["letter"]: row for row in briefly_trained["recovered"]}
    b = trained["B"]
    beyond = b["less_continued_interval"]
    models = {  # by the time of their training; those of GPT-2 small by steps
        f"GPT-2 small after {count(briefly_trained['step'])} steps": briefly_trained,
        f"GPT-2 small after {count(longer['step'])} steps": longer,
        "SmolLM2-135M": smollm2,
    }

    def led(letter: str) -> str:
        """A's lead over a control in the model of 30 million parameters."""
        (found,) = comparisons(proxy, f"A vs {letter}")
        low, high = found["interval"]
        return with_interval(-found["effect"], [-high, -low], 3).lstrip("+")

    def each(method: str, bands: int, rank: int, bits: int = 32) -> str:
        """What such a table adds to each of the models."""
        found = [
            next(
                f"{added(row)} to {model}"
                for row in sweep["rows"]
                if (row.method, row.bands, row.bits) == (method, bands, bits)
                and row.rank == rank
            )
            for model, sweep in models.items()
        ]
        return f"{', '.join(found[:-1])} and {found[-1]}"

    return "\n".join(
        [
            "- **Fine-tuning beats training from scratch (the original: B < A).** "
            f"After {count(steps)} steps of GPT-2 small, {at_rank(b_less_a)}. "
            f"B had {percent(b_tokens / a_tokens)} of A's tokens. But A was first seen "
            f"at B's loss after {percent(b_less_a['tokens_to_match'][1] / a_tokens)} "
            "of them.",
            "- **A and B end at D's loss (the original: A ≈ D, B ≈ D).** In the same "
            f"experiment, {at_rank(a_less_d)}, and {at_rank(b_less_d)}.",
            "- **A short run shows what a longer one will show.** After "
            f"{count(briefly)} steps, {at_rank(brief_d)}. After {count(steps)} steps, "
            f"{at_rank(a_less_d)}, and A's lead over C is {lead(a_less_c)} instead of "
            f"{lead(brief_c)} nats. The longer run also has a higher learning rate and "
            "weight decay.",
            "- **Only the directions of D's table make A better than C.** In a model "
            f"of 30 million parameters, A's lead over C is {led('C')} nats, but only "
            f"{led('E')} over E, random factors that have nothing but the root "
            f"mean square of A's, and {led('F')} over F, with A's spectrum.",
            "- **B, trained further, beats D.** GPT-2 small with factors of the size "
            f"of k = {b['rank']} (B) was trained further, for "
            f"{percent(b['share_of_tokens'])} of D's tokens. Its loss minus D's is "
            f"{gain(b)}. But D gains from the same steps, too (D+): "
            f"{gain(trained['D+'])}. B against D+: "
            f"{answer('B', 'D+', beyond)} "
            f"({with_interval(b['less_continued'], beyond)}). D's predictions teach no "
            "more than the text: the same model, trained on them (Bd), adds "
            f"{gain(trained['Bd'])} to D's loss.",
            "- **Factors that suit a briefly trained model suit every model.** "
            f"`context` in 12 bands, of the size of k = 128, adds "
            f"{each('context', 12, 128)}. The longer run of GPT-2 small also has a "
            "higher learning rate and weight decay.",
            "- **Rounding costs every model the same.** D's own table in 4 bits adds "
            f"{each('baseline', 1, 0, 4)}.",
        ]
    )


def comparisons(results: dict, question: str) -> list[dict]:
    """The comparisons of one question, at each rank."""
    return [one for one in results["comparisons"] if one["question"] == question]


def lead(found: dict) -> str:
    """How much lower the loss of the first arm is: '0.970'."""
    return fixed(-found["effect"], 3)


def at_rank(found: dict) -> str:
    """'B is worse than A at rank 64 (+0.120 ± 0.004)'."""
    first, second = found["question"].split(" vs ")
    said = answer(first, second, found["interval"])
    return f"{said} at rank {found['rank']} ({half_interval(found)})"


def gain(trained: dict) -> str:
    """The loss of a model trained further, minus D's, ± half of its interval."""
    return with_interval(trained["added_loss"], trained["interval"])


def added(row: Row) -> str:
    """The added loss of a table, ± half of its interval."""
    return with_interval(row.added_loss, row.added_loss_interval)


# The original's validation losses at k = 128; its D has 3.44.
ORIGINAL_D = 3.44
ORIGINAL = {"C": 3.80, "B at step 0": 5.68, "B": 3.82}


def original_table(folder: Path) -> str:
    """Added losses beside the original's, each divided by C's of the same system."""
    rows = json.loads((folder / "results.json").read_text("utf-8"))["rows"]
    ours = {row["letter"]: row["added_loss"] for row in rows}
    (b,) = (row for row in rows if row["letter"] == "B")
    ours["B at step 0"] = b["added_at_start"]
    theirs = {name: loss - ORIGINAL_D for name, loss in ORIGINAL.items()}
    names = {
        "C": "random factors, trained from scratch (C)",
        "B at step 0": "D with the factors of its table, not trained further",
        "B": "the same, trained further (B; the original: LoRA)",
    }
    cells = [
        [
            said,
            signed(theirs[name], 2),
            times(theirs[name] / theirs["C"]),
            signed(ours[name], 3),
            times(ours[name] / ours["C"]),
        ]
        for name, said in names.items()
    ]
    header = ["", "Original, added", "÷ C", "pcagpt, added", "÷ C"]
    return table(header, cells, "lrrrr")


PARTS = {
    "headline": headline,
    "nearest": short_table,
    "questions": questions_table,
    "original": original_table,
    "sizes": sizes_table,
    "samples": samples,
    "calibration": calibration_table,
    "failures": failures,
}
