"""Text that a model writes while it trains, for TensorBoard and W&B."""

from collections.abc import Callable
from typing import Any

import jax

from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.errors import UserError, warn_once
from pcagpt.run import generation_files
from pcagpt.run.continuation import PROMPT_TOKENS, drawn_after, written
from pcagpt.training.setup import Setup


def sampler(setup: Setup, record: dict[str, Any]) -> Callable[[dict], str] | None:
    """A function from {'params', 'constants'} to a text: a prompt, » and what follows.

    The prompt is the beginning of the validation text. The seed is always the same, so
    that only the weights change the text. `record` is that of the run.

    None without `telemetry.sample_tokens`, if no tokenizer says what text the tokens
    stand for, and with several processes.
    """
    corpus, tokens = setup.corpus, setup.settings.telemetry.sample_tokens
    if not tokens or jax.process_count() > 1:
        return None
    if corpus.characters:
        tokenizer = CharacterTokenizer(tuple(corpus.characters))
    elif corpus.tokenizer:
        try:
            tokenizer = vocabulary.load(corpus.tokenizer)
        except UserError as error:  # Tokens made elsewhere; training needs no text.
            warn_once(f"no samples are shown while training: {error}")
            return None
    else:
        return None
    prompt = corpus.tokens("val")[:PROMPT_TOKENS]
    # A document's beginning is after the end of the one before it.
    shown = tokenizer.decode([t for t in prompt.tolist() if t != tokenizer.eot_token])

    ids = vocabulary.ids_with_text(tokenizer)
    ends = generation_files.ends(record, tokenizer.eot_token)

    def sample(variables: dict) -> str:
        drawn = drawn_after(setup.model, variables, prompt, ids)
        return f"{shown} »{written(prompt, drawn, tokenizer, ends, tokens)}"

    return sample
