"""What several models write after the same prompts, for the reports.

The prompts are pieces of the text that the report measures on.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pcagpt.compression.original import Original
from pcagpt.compression.read_table import read_table
from pcagpt.config import Settings
from pcagpt.data.token_array import TokenArray
from pcagpt.data.vocabulary import ids_with_text
from pcagpt.errors import UserError, warn_once
from pcagpt.pipeline.sample import NoTokenizer, tokenizer_of
from pcagpt.report import compared_runs
from pcagpt.run.continuation import (
    PROMPT_TOKENS,
    SEED,
    TEMPERATURE,
    drawn_after,
    written,
)
from pcagpt.run.folder import read_record
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

    def text() -> TokenArray:
        run = Run.open(next(iter(runs.values())))
        return run.corpus(settings.data, settings.cache_dir, ["val"]).tokens("val")

    return samples_of(runs, settings, text, known)


def samples_of(
    runs: Mapping[str, Path],
    settings: Settings,
    text: Callable[[], TokenArray],
    known: Mapping[str, Any],
    original: Original | None = None,
) -> dict[str, Any]:
    """{'samples': [{'prompt', 'seed', 'temperature', 'texts'}, ...], 'samples_of'}.

    Each text is {name: what the run wrote}. 'samples_of' are fingerprints of the runs:
    with the same ones, the samples of `known` are returned. {} if there are
    none: their tokens stand for no known text, a checkpoint or a table is missing, or
    there are several processes.

    Args:
      runs: {name: folder, or one of its checkpoints}; all know the same tokens.
      settings: of the command.
      text: gives the tokens that the prompts come from, [N].
      known: what the report showed before.
      original: the model of another architecture that computes all of them: `runs` are
        its folder and those of its tables.
    """
    if jax.process_count() > 1:
        return {}
    try:
        opened = functools.partial(
            *((_with_table, original) if original else (_of_run, settings))
        )
        writers = {name: opened(folder) for name, folder in runs.items()}
        prints = {name: writer.fingerprint for name, writer in writers.items()}
        if prints == known.get("samples_of"):
            return {"samples": known.get("samples"), "samples_of": prints}
        first = original.run if original else Run.open(next(iter(runs.values())))
        tokenizer = tokenizer_of(first, settings)
        tokens, end = text(), tokenizer.eot_token
        ids, ends = ids_with_text(tokenizer), first.tokens.ends(tokenizer)
        starts = [len(tokens) * n // PROMPTS for n in range(PROMPTS)]
        prompts = [tokens[start : start + PROMPT_TOKENS] for start in starts]
        texts: list[dict[str, str]] = [{} for _ in prompts]
        with Progress("sampling for the report", len(runs) * PROMPTS) as progress:
            for name, writer in writers.items():
                draw = writer.load()
                for found, prompt in progress.track(zip(texts, prompts, strict=True)):
                    drawn = draw(prompt, ids)
                    found[name] = written(prompt, drawn, tokenizer, ends, TOKENS)
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


class _Writer(NamedTuple):
    """A model that continues a prompt.

    load() reads its weights and gives the function (prompt [n], ids as for `generate`)
    -> token ids without end.
    """

    fingerprint: str
    load: Callable[[], Callable[[np.ndarray, np.ndarray], Iterable[int]]]


def _of_run(settings: Settings, folder: Path) -> _Writer:
    """A run, or one of its checkpoints."""
    run = Run.open(folder)

    def load() -> Callable[[np.ndarray, np.ndarray], Iterable[int]]:
        return functools.partial(drawn_after, *run.load(settings.model))

    return _Writer(run.fingerprint, load)


def _with_table(original: Original, folder: Path) -> _Writer:
    """The model with its own table, if that is its folder, or with that of a folder."""
    run, is_own = original.run, folder == original.run.folder
    made = {} if is_own else (read_record(folder) or {}).get("compressed", {})

    def load() -> Callable[[np.ndarray, np.ndarray], Iterable[int]]:
        own_VD = original.table_VD
        table_VD = own_VD if is_own else read_table(folder, made).dense()
        continued = original.model.generate  # `Decoder` has it.
        return functools.partial(
            continued, table_VD, seed=SEED, temperature=TEMPERATURE
        )

    return _Writer(run.fingerprint if is_own else str(made.get("table_sha256")), load)
