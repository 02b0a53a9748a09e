"""The task 'sample': continues a text with any trained or compressed model."""

import itertools

import numpy as np

from pcagpt.config import Settings
from pcagpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from pcagpt.errors import UserError
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run
from pcagpt.telemetry.progress import Progress

FETCH_DELAY = 8  # tokens that stay on the device, so that it never waits for the host


def sample(settings: Settings) -> list[str]:
    """Continues `sample.prompt` with the model of `model_path`.

    Returns:
      The samples, prompt included, each up to its first end of text.

    Raises:
      UserError: no such run, a run without a tokenizer, or a `model` knob that
        contradicts it.
    """
    run, options = Run.open(settings.model_path), settings.sample
    run.check_model(settings.model)
    name = run.record.get("tokenizer")
    if not name:
        raise UserError(
            f"{run.folder} was trained on bare token ids: without a tokenizer there is "
            "no text to show"
        )
    tokenizer = load_tokenizer(name)
    model, variables = run.load(settings.model)
    if model.config.vocab_size > tokenizer.n_vocab:
        raise UserError(
            f"{run.folder} has {model.config.vocab_size} tokens, its tokenizer {name} "
            f"{tokenizer.n_vocab}: some of its tokens stand for no text"
        )
    end = tokenizer.encode_single_token(END_OF_TEXT)
    text = tokenizer.encode(options.prompt, allowed_special={END_OF_TEXT})
    # In the training text an end of text precedes each document.
    prompt = np.array(text or [end], np.int32)
    drawn = generate(
        model,
        variables,
        prompt,
        options.count,
        settings.seed,
        options.temperature,
        options.top_k,
    )
    found, total = [], options.tokens
    with Progress(f"sampling from {run.folder.name}", total) as progress:
        drawn = progress.track(itertools.islice(drawn, total))
        for number, drawn_B in enumerate(drawn):
            found.append(drawn_B)
            if number >= FETCH_DELAY:
                found[-1 - FETCH_DELAY] = np.asarray(found[-1 - FETCH_DELAY])
    samples = []
    for tokens in np.stack(found, axis=1).tolist():
        kept = itertools.takewhile(lambda token: token != end, tokens)
        samples.append(tokenizer.decode([*text, *kept]))
    return samples
