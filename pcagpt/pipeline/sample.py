"""The task 'sample': continues a text with any trained or compressed model."""

import contextlib
import dataclasses
import itertools

import numpy as np
import tiktoken

from pcagpt.config import Settings
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.corpus import describe_corpus
from pcagpt.data.tokenizer import END_OF_TEXT, how_to_name_tokens, load_tokenizer
from pcagpt.errors import UserError
from pcagpt.run.generate import generate, samples_at_once
from pcagpt.run.trained import Run
from pcagpt.telemetry.progress import Progress

FETCH_DELAY = 8  # steps until the host reads a token, so that the device never waits


def sample(settings: Settings) -> list[str]:
    """Continues `sample.prompt` with the model of `model_path`.

    Returns:
      The samples, prompt included, each up to its first end of text.

    Raises:
      UserError: no such run, a run without a tokenizer or of another one than
        `data.tokenizer`, a prompt that it cannot encode, or a `model` knob that
        contradicts the run.
    """
    run, options = Run.asked(settings), settings.sample
    tokenizer = _tokenizer(run, settings)
    end = tokenizer.eot_token
    text = tokenizer.encode(options.prompt, allowed_special={END_OF_TEXT})
    prompt = np.array(text or _beginning(tokenizer), np.int32)
    model, variables = run.load(settings.model)
    samples, at_once = [], samples_at_once(model.config)
    firsts, total = range(0, options.count, at_once), options.tokens
    label = f"sampling from {run.folder.name}"
    with Progress(label, len(firsts) * total) as progress:
        for batch, first in enumerate(firsts):
            drawn = generate(
                model,
                variables,
                prompt,
                min(at_once, options.count - first),
                settings.seed,
                options.temperature,
                options.top_k,
                tokenizer.n_vocab,
                batch,
            )
            found = []
            for drawn_B in progress.track(itertools.islice(drawn, total)):
                found.append(drawn_B)
                if len(found) > FETCH_DELAY:
                    found[-1 - FETCH_DELAY] = np.asarray(found[-1 - FETCH_DELAY])
            for tokens in np.stack(found, axis=1).tolist():
                kept = itertools.takewhile(lambda token: token != end, tokens)
                samples.append(tokenizer.decode([*text, *kept]))
    return samples


def _beginning(tokenizer: tiktoken.Encoding | CharacterTokenizer) -> list[int]:
    """What precedes a document in the training text: an end of text, or a line end."""
    if tokenizer.eot_token is not None:
        return [tokenizer.eot_token]
    return tokenizer.encode("\n") if "\n" in tokenizer.texts else [0]


def _tokenizer(run: Run, settings: Settings) -> tiktoken.Encoding | CharacterTokenizer:
    """The run's own tokenizer, or the one that was asked for if the run has none."""
    name, texts = run.record.get("tokenizer"), run.record.get("characters")
    asked, vocab_size = settings.data.tokenizer, run.record["vocab_size"]
    if asked != "auto" and (texts or name not in (None, asked)):
        own = name or f"its own {len(texts)} characters"
        raise UserError(
            f"data.tokenizer is '{asked}', but {run.folder} was trained on tokens of "
            f"{own}: leave it out"
        )
    if not texts and not name and asked == "auto":
        texts = _texts_of_corpus(run, settings)
    if texts:
        tokenizer = CharacterTokenizer(tuple(texts))
    elif name or asked != "auto":
        tokenizer = load_tokenizer(name or asked)
    else:
        raise UserError(
            f"{run.folder} was trained on bare token ids: without a tokenizer there is "
            f"no text to show; {how_to_name_tokens(vocab_size)}"
        )
    if vocab_size < tokenizer.n_vocab:
        raise UserError(
            f"data.tokenizer: {name or asked} has {tokenizer.n_vocab} tokens, the "
            f"model of {run.folder} {vocab_size}: {how_to_name_tokens(vocab_size)}"
        )
    return tokenizer


def _texts_of_corpus(run: Run, settings: Settings) -> tuple[str, ...] | None:
    """The texts that the corpus's meta file gives now; None if it gives none.

    None also if the corpus is not the run's, or cannot be read.
    """
    own = dataclasses.replace(settings.data, source="")
    with contextlib.suppress(UserError):
        if describe_corpus(run.data(own).source).characters:
            return run.corpus(own, settings.cache_dir, ()).characters
    return None
