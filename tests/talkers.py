"""A random GPT-2 whose likeliest text holds a token that can serve as its end."""

import itertools

import numpy as np
from gpt2_folders import write

from pcagpt.config.schema import ModelSettings
from pcagpt.data import vocabulary
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run

PROMPT, TOKENS = "The people", 14


def drawn(folder):
    """The likeliest tokens that follow the prompt, beyond any end."""
    run = Run.open(folder)
    prompt = vocabulary.load(run.record["tokenizer"]).encode(PROMPT)
    model, variables = run.load(ModelSettings(compute_dtype="float32"))
    tokens = generate(model, variables, np.array(prompt), 1, 1, 0, limit=TOKENS)
    return [int(token_B[0]) for token_B in tokens]


def write_talker(folder, **config):
    """Writes the model and a tokenizer with <|endoftext|> as 0; returns the end.

    The end comes after three others or more, and before the last three.
    """
    for seed in itertools.count():
        write(folder, n_positions=32, seed=seed, **config)
        found = drawn(folder)
        late = [token for token in found[3:-3] if token not in found[:3]]
        if late and 0 not in found:
            return late[0]
