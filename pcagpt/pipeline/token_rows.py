"""The rows of the most frequent tokens in several tables, for the embedding projector.

Shape letters: V vocabulary, n tokens shown, D model width.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pcagpt.config import Settings
from pcagpt.data.corpus import count_tokens, made_corpus
from pcagpt.data.vocabulary import ids_with_text
from pcagpt.errors import UserError
from pcagpt.factorization import Statistics
from pcagpt.pipeline.sample import tokenizer_of
from pcagpt.run.trained import Run
from pcagpt.telemetry.boards import Boards

SHOWN = 2000  # tokens
_COUNTED = 2**24  # tokens of the training text, which may have billions
BEFORE = "before"  # the name of D's table


def show_rows(
    boards: Boards,
    run: Run,
    settings: Settings,
    statistics: Statistics | None,
    tables: Mapping[str, Callable[[], np.ndarray | None]],
) -> None:
    """Shows the rows of the most frequent tokens in tables, for TensorBoard alone.

    Args:
      boards: where to show them.
      run: the model whose tokens these are.
      settings: of the command.
      statistics: have the frequencies of the tokens. Without them, tokens are counted
        in the run's own training text; nothing is shown if it is gone or was never
        tokenized.
      tables: {name: function that gives the table [V, D], or None if it is damaged}.
    """
    if not boards.has_projector:
        return
    frequency_V = statistics.frequency if statistics else _counted(run, settings)
    if frequency_V is None:
        return
    ids_n = np.argsort(-frequency_V, kind="stable")[:SHOWN]
    texts = [""] * len(ids_n)
    with contextlib.suppress(UserError):  # Bare ids stand for no known text.
        tokenizer = tokenizer_of(run, settings)
        known = set(np.flatnonzero(ids_with_text(tokenizer)).tolist())
        # `repr` shows spaces and line ends.
        texts = [
            repr(tokenizer.decode([token])) if token in known else ""
            for token in ids_n.tolist()
        ]
    share_n = frequency_V[ids_n] / frequency_V.sum()
    shares = [f"{share:.2e}" for share in share_n]
    places = range(1, len(ids_n) + 1)
    labels = list(zip(texts, ids_n.tolist(), places, shares, strict=True))
    # One whole table at a time: they may be large.
    rows = {
        name: table_VD[ids_n]
        for name, read in tables.items()
        if (table_VD := read()) is not None
    }
    if len(rows) > 1:
        boards.projector(rows, labels, ("token", "id", "place", "frequency"))


def _counted(run: Run, settings: Settings) -> np.ndarray | None:
    """How often each token is in the run's own training text [V], or None."""
    own = dataclasses.replace(settings.data, source="")
    with contextlib.suppress(UserError, OSError):
        data = run.data(own)
        corpus = made_corpus(data.source, settings.cache_dir, data.tokenizer, ["train"])
        if corpus and run.is_own(corpus) is not False:
            tokens = corpus.tokens("train")[:_COUNTED]
            return count_tokens(tokens, run.record["vocab_size"])
    return None
