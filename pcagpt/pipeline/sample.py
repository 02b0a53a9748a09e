"""The task 'sample': continues a text with any trained or compressed model."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from pcagpt.config import Settings
from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.corpus import describe_corpus
from pcagpt.data.tokenizer import END_OF_TEXT, how_to_name_tokens
from pcagpt.errors import UserError, warn_once
from pcagpt.run.generate import generate, samples_at_once
from pcagpt.run.trained import Run
from pcagpt.telemetry.progress import Progress


class NoTokenizer(UserError):
    """Nothing says what text the tokens of a model stand for."""


def sample(settings: Settings) -> Iterator[str]:
    """Continues `sample.prompt` with the model of `model_path`.

    Yields:
      The samples, prompt included, each up to the first id of `OwnTokens.ends`. After
      an interrupt, it yields what is drawn so far, and then raises.

    Raises:
      UserError: no such run, a run without a tokenizer or of another one than
        `data.tokenizer`, a prompt that it cannot encode, or a `model` knob that
        contradicts the run.
    """
    run, options = Run.asked(settings), settings.sample
    tokenizer = tokenizer_of(run, settings)
    ends = run.tokens.ends(tokenizer)
    text = tokenizer.encode(options.prompt, allowed_special={END_OF_TEXT})
    if max(text, default=0) >= (rows := run.record["vocab_size"]):
        raise UserError(
            f"sample.prompt has the added token with id {max(text)}, but {run.folder} "
            f"knows {rows} tokens: remove it from the prompt"
        )
    prompt = np.array(text or beginning_of(tokenizer, options.prompt), np.int32)
    model, variables = run.load(settings.model)
    at_once = samples_at_once(model.config)
    firsts, total = range(0, options.count, at_once), options.tokens
    label = f"sampling from {run.folder.name}"
    with Progress(label, len(firsts) * total) as progress:
        for batch, first in enumerate(firsts):
            drawn = generate(
                model,
                variables,
                prompt,
                samples=min(at_once, options.count - first),
                seed=settings.seed,
                temperature=options.temperature,
                top_k=options.top_k,
                ids=vocabulary.ids_with_text(tokenizer),
                batch=batch,
                top_p=options.top_p,
                limit=total,
            )
            found: list[np.ndarray] = []
            interrupt = None
            try:
                found.extend(progress.track(drawn))
            except KeyboardInterrupt as error:
                interrupt = error
            for tokens in np.stack(found, axis=1).tolist() if found else ():
                kept = itertools.takewhile(lambda token: token not in ends, tokens)
                yield tokenizer.decode([*text, *kept])
            if interrupt:
                raise interrupt


def beginning_of(
    tokenizer: vocabulary.Tokenizer | CharacterTokenizer, prompt: str = ""
) -> list[int]:
    """What precedes a document in the training text: an end of text, or a line end.

    If there is a prompt, the tokenizer kept nothing of it, and a warning says so.
    """
    if prompt:
        warn_once(
            f"the prompt {prompt!r} has no token of the model: its tokenizer drops all "
            "of it, and the model begins a document instead"
        )
    if tokenizer.eot_token is not None:
        return [tokenizer.eot_token]
    is_of_lines = "\n" in getattr(tokenizer, "texts", ())
    return tokenizer.encode("\n") if is_of_lines else [0]


def tokenizer_of(
    run: Run, settings: Settings
) -> vocabulary.Tokenizer | CharacterTokenizer:
    """The run's own tokenizer, or the one that was asked for if the run has none.

    Raises UserError as `sample` does, NoTokenizer if there is neither.
    """
    asked, rows = settings.data.tokenizer, run.record["vocab_size"]
    if name := run.tokens.tokenizer_name(asked):
        return vocabulary.load(name)
    texts = run.record.get("characters") or _texts_of_corpus(run, settings)
    if not texts and "data" not in run.record:  # Of another program: it has no corpus.
        raise NoTokenizer(
            f"{run.folder} has no tokenizer: open it with "
            "--config.data.tokenizer=FILE, such as its tokenizer.json"
        )
    if not texts:
        raise NoTokenizer(
            f"{run.folder} was trained on bare token ids: without a tokenizer there is "
            f"no text to show; {how_to_name_tokens(rows)}"
        )
    if rows < len(texts):
        raise UserError(
            f"{run.folder} has {len(texts)} characters, but its model knows {rows} "
            "tokens: give both of one model"
        )
    return CharacterTokenizer(tuple(texts))


def _texts_of_corpus(run: Run, settings: Settings) -> tuple[str, ...] | None:
    """The texts that the corpus's meta file gives now; None if it gives none.

    None also if the corpus is not the run's, or cannot be read.
    """
    own = dataclasses.replace(settings.data, source="")
    with contextlib.suppress(UserError):
        if describe_corpus(run.data(own).source).characters:
            return run.corpus(own, settings.cache_dir, ()).characters
    return None
