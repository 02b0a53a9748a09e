"""Short texts that models write after a prompt, for reports and boards."""

import itertools
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.text_stream import texts_of
from pcagpt.data.vocabulary import Tokenizer
from pcagpt.model import GPT
from pcagpt.run.generate import generate

SEED, TEMPERATURE = 1, 0.8
PROMPT_TOKENS = 12  # a piece of a text


def drawn_after(
    model: GPT, variables: dict, prompt: np.ndarray, ids: np.ndarray
) -> Iterator[int]:
    """Token ids that follow a prompt [n], without end; `ids` as for `generate`."""
    prompt = np.asarray(prompt, np.int32)
    drawn = generate(
        *(model, variables, prompt, 1, SEED),
        temperature=TEMPERATURE,
        ids=ids,
    )
    return (int(token_B[0]) for token_B in drawn)


def written(
    prompt: np.ndarray,
    drawn: Iterable[int],
    tokenizer: Tokenizer | CharacterTokenizer,
    ends: Collection[int],
    tokens: int,
) -> str:
    """The text of the first `tokens` ids after a prompt, up to the first of `ends`.

    A character that the last one cuts is left out.
    """
    first = itertools.islice(drawn, tokens)
    ids = list(itertools.takewhile(lambda one: one not in ends, first))
    return "".join(texts_of([ids], tokenizer.decode, prompt.tolist()))
