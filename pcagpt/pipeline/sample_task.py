"""The task 'sample': text continued by any trained or compressed model."""

import itertools

import jax
import numpy as np
from ml_collections import ConfigDict

from pcagpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from pcagpt.errors import UserError
from pcagpt.model import GPT
from pcagpt.run.generate import generate
from pcagpt.run.opened import DEVICE_CHOICES, TrainedRun
from pcagpt.sharding import placement
from pcagpt.telemetry.record import Progress

READ_LATE = 8  # tokens


def sample_run(config: ConfigDict) -> list[str]:
    """Continues `config.sample.prompt` by the model of `config.model_path`.

    Returns:
      The samples, prompt included, each up to its first end of text.

    Raises:
      UserError: no such run, it knows no tokenizer, or a `model` knob contradicts it.
    """
    trained, options = TrainedRun.find(config.model_path), config.sample
    trained.check_model(config.model, DEVICE_CHOICES)
    name = trained.record.get("tokenizer")
    if not name:
        raise UserError(
            f"{trained.run_dir} was trained on bare token ids: without a tokenizer "
            "there is no text to show"
        )
    tokenizer = load_tokenizer(name)
    model = GPT(trained.config(config.model, placement.hardware()))
    if model.config.vocab_size > tokenizer.n_vocab:
        raise UserError(
            f"{trained.run_dir} has {model.config.vocab_size} tokens, its tokenizer "
            f"{name} {tokenizer.n_vocab}: some that it draws would stand for no text"
        )
    variables = jax.device_put(trained.variables(model.config))
    end = tokenizer.encode_single_token(END_OF_TEXT)
    text = tokenizer.encode(options.prompt, allowed_special={END_OF_TEXT})
    prompt = np.array(text or [end], np.int32)  # A document begins after an end.
    drawn = generate(
        model,
        variables,
        prompt,
        options.count,
        config.seed,
        options.temperature,
        options.top_k,
    )
    found, total = [], options.tokens
    with Progress(f"sampling from {trained.run_dir.name}", total) as progress:
        for number, drawn_B in enumerate(itertools.islice(drawn, total)):
            progress.update(number)
            found.append(drawn_B)
            if number >= READ_LATE:  # The device need not wait for what is shown here.
                found[-1 - READ_LATE] = np.asarray(found[-1 - READ_LATE])
        progress.update(total)
    samples = []
    for tokens in np.stack(found, axis=1).tolist():
        kept = itertools.takewhile(lambda token: token != end, tokens)
        samples.append(tokenizer.decode([*text, *kept]))
    return samples
