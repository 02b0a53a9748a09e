"""The task 'sample': continues a text with any trained or compressed model."""

import itertools

import numpy as np

from pcagpt.config import Settings
from pcagpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from pcagpt.errors import UserError
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run
from pcagpt.telemetry.progress import Progress

FETCH_DELAY = 8  # steps until the host reads a token, so that the device never waits


def sample(settings: Settings) -> list[str]:
    """Continues `sample.prompt` with the model of `model_path`.

    Returns:
      The samples, prompt included, each up to its first end of text.

    Raises:
      UserError: the run does not exist, it has no tokenizer, or a `model` knob
        contradicts it.
    """
    run, options = Run.open(settings.model_path), settings.sample
    run.check_model(settings.model)
    name = run.record.get("tokenizer")
    if not name:
        raise UserError(
            f"{run.folder} was trained on token ids without a tokenizer, so its "
            "samples cannot become text"
        )
    tokenizer = load_tokenizer(name)
    model, variables = run.load(settings.model)
    if model.config.vocab_size > tokenizer.n_vocab:
        raise UserError(
            f"{run.folder} has {model.config.vocab_size} tokens, but its tokenizer "
            f"{name} has {tokenizer.n_vocab}: some samples could not become text"
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
