"""What several models write after the same prompts, for the reports.

The prompts are pieces of the text that the report measures on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcagpt.config import Settings
from pcagpt.errors import UserError, warn_once
from pcagpt.pipeline.sample import NoTokenizer, tokenizer_of
from pcagpt.report import compared_runs
from pcagpt.run.generate import PROMPT_TOKENS, SEED, TEMPERATURE, continuation
from pcagpt.run.trained import Run
from pcagpt.telemetry.progress import Progress

PROMPTS, TOKENS = 3, 40


def experiment_samples(
    settings: Settings, workdir: Path, results: dict[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The samples of the runs that a report compares, as `samples_of` returns them.

    `known`: the results that the report showed before; {} if there are none.
    """
    runs = {name: workdir / run for name, run in compared_runs(results).items()}

    def text() -> np.ndarray:
        run = Run.open(next(iter(runs.values())))
        return run.corpus(settings.data, settings.cache_dir, ["val"]).tokens("val")

    return samples_of(runs, settings, text, known)


def samples_of(
    runs: Mapping[str, Path],
    settings: Settings,
    text: Callable[[], np.ndarray],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """{'samples': [{'prompt', 'seed', 'temperature', 'texts'}, ...], 'samples_of'}.

    Each text is {name: what the run wrote}. 'samples_of' are fingerprints of the runs:
    with the same ones, the samples of `known` are returned. {} if there are
    none: their tokens stand for no known text, only transformers computes a model, a
    checkpoint is missing, or there are several processes.

    Args:
      runs: {name: folder, or one of its checkpoints}; all know the same tokens.
      settings: of the command.
      text: gives the tokens that the prompts come from, [N].
      known: what the report showed before.
    """
    if jax.process_count() > 1:
        return {}
    try:
        opened = {name: Run.open(folder) for name, folder in runs.items()}
        prints = {name: run.fingerprint for name, run in opened.items()}
        if prints == known.get("samples_of"):
            return {"samples": known.get("samples"), "samples_of": prints}
        tokenizer = tokenizer_of(next(iter(opened.values())), settings)
        tokens, end = text(), tokenizer.eot_token
        starts = [len(tokens) * n // PROMPTS for n in range(PROMPTS)]
        prompts = [tokens[start : start + PROMPT_TOKENS] for start in starts]
        texts: list[dict[str, str]] = [{} for _ in prompts]
        with Progress("sampling for the report", len(runs) * PROMPTS) as progress:
            for name, run in opened.items():
                model, variables = run.load(settings.model)
                for found, prompt in progress.track(zip(texts, prompts, strict=True)):
                    found[name] = continuation(
                        model, variables, tokenizer, prompt, TOKENS
                    )
    except NoTokenizer:
        return {}
    except UserError as error:
        warn_once(f"the report has no samples: {error}")
        return {}
    # A document's beginning is after the end of the one before it.
    shown = (tokenizer.decode([t for t in p.tolist() if t != end]) for p in prompts)
    common = {"seed": SEED, "temperature": TEMPERATURE}
    samples = [
        {"prompt": prompt} | common | {"texts": found}
        for prompt, found in zip(shown, texts, strict=True)
    ]
    return {"samples": samples, "samples_of": prints}
