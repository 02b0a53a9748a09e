"""A trained model: its loss, logits, text and table.

Shape letters: B batch, T tokens of a text, W windows, V vocabulary, D model width.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pcagpt.api.calls import (
    absolute,
    call,
    check_is_no_file,
    encoded,
    ids_of,
    list_of,
    named,
    settings_of,
)
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.text_stream import texts_of, until
from pcagpt.data.vocabulary import ids_with_text
from pcagpt.errors import UserError
from pcagpt.model import GPT
from pcagpt.pipeline.sample import beginning_of, tokenizer_of
from pcagpt.run.evaluator import score_tokens, score_windows, summarize
from pcagpt.run.generate import cache_capacity, generate
from pcagpt.run.trained import Run
from pcagpt.sharding import placement

WINDOWS = 32  # evaluated at a time, as by `evaluate.batch_size`


class Model:
    """A trained model in memory; `load` opens it.

    path: the folder of the run; step: of the checkpoint; vocab_size: V; block_size:
    tokens that it reads at a time; width: D.
    """

    def __init__(self, run: Run, settings: Settings):
        """Loads the weights of a run; `settings` has `model` and `data.tokenizer`."""
        self._run, self._settings = run, settings
        self._mesh = placement.make_mesh(1, 1)
        self._gpt, self._variables = run.load(settings.model, self._mesh)
        config = self._gpt.config
        self.path, self.step = run.folder, run.step
        self.vocab_size, self.block_size = config.vocab_size, config.block_size
        self.width = config.n_embd
        self._logits = jax.jit(self._gpt.apply)
        score = functools.partial(
            score_tokens, model=self._gpt, chunks=settings.train.loss_chunks
        )
        self._score = placement.jit(score, self._mesh)

    def __repr__(self) -> str:
        """Path, step and sizes."""
        shape = f"[{self.vocab_size}, {self.width}]"
        return f"<pcagpt.Model {self.path}, step {self.step}, table {shape}>"

    def loss(self, text: ArrayLike) -> float:
        """Mean loss in nats per token of a text, each token after the first predicted.

        The text is cut into windows of `block_size` tokens that do not overlap, as by
        the task evaluate. The first token is not predicted: begin with '<|endoftext|>'
        to have the loss of a whole document.

        Args:
          text: a str, or token ids [T].

        Raises:
          UserError: fewer than two tokens, ids that the model does not know, the path
            of a file, or a str although the model has no tokenizer.
        """
        with call():
            tokens_T = self._text_tokens(text)
            if len(tokens_T) < 2:
                raise UserError(
                    f"the text has {len(tokens_T)} tokens: at least two are needed, to "
                    "predict one from the other"
                )
            count = math.ceil((len(tokens_T) - 1) / self.block_size)
            # Powers of two, so that few programs are compiled.
            at_once = min(WINDOWS, 1 << (count - 1).bit_length())
            batches = EvaluationBatches(tokens_T, self.block_size, at_once)
            score = functools.partial(self._score, self._variables)
            found = score_windows(score, batches, self._mesh)
            loss = summarize(*found, None).metrics["loss"]
            assert loss is not None
            return float(loss)

    def logits(self, text: ArrayLike) -> np.ndarray:
        """The logits of the token after each one: float32 [T, V].

        Args:
          text: a str, or token ids [T]; at most `block_size` tokens.

        Raises UserError as `loss` does, and for no token or too many.
        """
        with call():
            tokens_T = self._text_tokens(text)
            if not 1 <= len(tokens_T) <= self.block_size:
                raise UserError(
                    f"the text has {len(tokens_T)} tokens: the model reads from 1 to "
                    f"{self.block_size} at a time"
                )
            # Few lengths are compiled. Later tokens do not change earlier logits.
            length = cache_capacity(len(tokens_T), self.block_size)
            read_BT = np.zeros((1, length), np.int32)
            read_BT[0, : len(tokens_T)] = tokens_T
            logits_BTV = self._logits(self._variables, read_BT)
            return np.array(logits_BTV[0, : len(tokens_T)], np.float32)

    def generate(
        self,
        prompt: ArrayLike = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        stop: str | Sequence[str] | None = (),
        seed: int = 1,
    ) -> Iterator[str]:
        """Continues a prompt; yields the new text in pieces, as it is drawn.

        The pieces are whole characters. Together they are what the task sample prints
        after the prompt, except that a character cut by the last token is left out. The
        text ends before the first token that ends a text of this model, as its
        generation_config.json or its tokenizer says, or before the first of `stop`.

        Args:
          prompt: a str, or token ids [T]; without a token, a document begins.
          max_tokens: number of tokens to draw at most.
          temperature: divides the logits; 0 takes the likeliest token.
          top_k: draws from this many likeliest tokens; 0 means all.
          top_p: draws from the likeliest tokens, as many as have this probability
            together; 1 means all.
          stop: strings at which the text ends. They are not part of it.
          seed: the same seed draws the same text.

        Raises:
          UserError: at once, for a value out of range, and as `loss` does.
        """
        with call():
            given = {
                "sample.tokens": max_tokens,
                "sample.temperature": temperature,
                "sample.top_k": top_k,
                "sample.top_p": top_p,
                "seed": seed,
            }
            settings = settings_of("sample", {"model_path": str(self.path), **given})
            stops = list_of("stop", stop)
            if not all(stops):
                raise UserError(f"stop is {stop!r}: it must hold texts that are not ''")
            tokenizer, options = self._tokenizer, settings.sample
            text_T = self._tokens(prompt)
            self._check_have_text(text_T)
            given = prompt if isinstance(prompt, str) else ""
            first = text_T if len(text_T) else beginning_of(tokenizer, given)
            prompt_T = np.array(first)
            drawn = generate(
                self._gpt,
                self._variables,
                prompt_T,
                samples=1,
                seed=settings.seed,
                temperature=options.temperature,
                top_k=options.top_k,
                ids=self._has_text,
                top_p=options.top_p,
                limit=options.tokens,
            )
        ends = self._run.tokens.ends(tokenizer)
        tokens = itertools.takewhile(lambda token: token not in ends, _numbers(drawn))
        pieces = texts_of(([one] for one in tokens), tokenizer.decode, text_T.tolist())
        return until(pieces, stops)

    def encode(self, text: str) -> np.ndarray:
        """The token ids of a text, int32 [T].

        '<|endoftext|>' is the token that ends a text for the tokenizer, if it has one.

        Raises UserError if the model has no tokenizer, or it has neither a token for a
        character nor one for unknown text.
        """
        with call():
            if not isinstance(text, str):
                raise UserError(f"the text is {text!r}: it must be a str")
            return np.array(encoded(self._tokenizer, text), np.int32)

    def decode(self, tokens: ArrayLike) -> str:
        """The text of token ids [T]; UserError as for `encode`, or for unknown ids."""
        with call():
            ids = ids_of(tokens, self._tokenizer.n_vocab)
            self._check_have_text(ids)
            return self._tokenizer.decode(ids.tolist())

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The table of the input embedding, read-only float32 [V, D].

        That of a factorized or compressed model is multiplied out. The output head has
        the same table, unless the model has two scale matrices. The mean row of a
        centred factorization is in the position embeddings instead.
        """
        plain = {"compute_dtype": "float32", "attention": "xla", "kernels": "xla"}
        gpt = GPT(dataclasses.replace(self._gpt.config, **plain))

        # flax calls a submodule only through a method of the model.
        def embed(model, tokens_N):
            return model.embed(tokens_N)

        with call(), jax.default_matmul_precision("highest"):
            tokens_V = jnp.arange(self.vocab_size)
            return np.asarray(gpt.apply(self._variables, tokens_V, method=embed))

    @functools.cached_property
    def _tokenizer(self):
        # This may read the run's corpus for its characters. Its hashes are not kept.
        settings = self._settings.replace({"data.cache_dir": os.devnull})
        return tokenizer_of(self._run, settings)

    @functools.cached_property
    def _has_text(self) -> np.ndarray:
        return ids_with_text(self._tokenizer)

    def _check_have_text(self, ids_T: np.ndarray) -> None:
        known_T = np.isin(ids_T, np.flatnonzero(self._has_text))
        if not known_T.all():
            raise UserError(
                f"token id {ids_T[~known_T][0]} is unknown: the tokenizer of this "
                "model has no text for it"
            )

    def _text_tokens(self, text: ArrayLike) -> np.ndarray:
        if isinstance(text, str):
            check_is_no_file(text, "the text")
        return self._tokens(text)

    def _tokens(self, text: ArrayLike) -> np.ndarray:
        # A tokenizer may have added tokens that the model lacks.
        ids = self.encode(text) if isinstance(text, str) else text
        return ids_of(ids, self.vocab_size)


def _numbers(drawn: Iterator[np.ndarray]) -> Iterator[int]:
    """The token of the only sample; it is drawn when it is asked for."""
    while True:
        with call():
            token_B = next(drawn, None)
        if token_B is None:
            return
        yield int(token_B[0])


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str = "auto",
    compute_dtype: str = "auto",
) -> Model:
    """Opens a model and loads its weights.

    Args:
      path: a run of pcagpt or one of its checkpoints (RUN/ckpt/STEP), a compressed
        model, a Hugging Face folder of a GPT-2, or nanoGPT's ckpt.pt.
      tokenizer: for a model that names none: sotu4096, gpt2, or a file or folder.
      compute_dtype: auto (bfloat16 on GPUs), float32 or bfloat16.

    Raises:
      UserError: there is no model, it is damaged, or pcagpt would compute it in another
        way than the program that made it.
    """
    with call():
        tokenizer = named(tokenizer)
        given = {"data.tokenizer": tokenizer, "model.compute_dtype": compute_dtype}
        settings = settings_of("sample", {"model_path": absolute(path), **given})
        return Model(Run.asked(settings).with_tokenizer(tokenizer), settings)
