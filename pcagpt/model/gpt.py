"""The whole model, from token ids to logits.

Shape letters: B batch, T sequence, N = B*T, V vocabulary, D model width, K rank.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pcagpt.model.block import Block, ResidualNorm, repeated
from pcagpt.model.config import INIT_STD, GPTConfig
from pcagpt.model.embedding import Head, TokenEmbedding, head_logits


class GPT(nn.Module):
    """GPT-2 with a tied, possibly factorized token embedding.

    Training calls `hidden` on the inputs and `renumber` on the targets; `pcagpt.losses`
    computes the loss from both and from `head`.
    """

    config: GPTConfig

    def setup(self):
        """Declares embedding, positions, blocks and the final norm."""
        config = self.config
        self.embed = TokenEmbedding(config)
        init = nn.initializers.normal(INIT_STD)
        self.wpe = self.param("wpe", init, (config.block_size, config.n_embd))
        self.blocks = [Block(config, name=f"block_{i}") for i in range(config.n_layer)]
        self.ln_f = ResidualNorm(config)
        self.embedding_dropout = nn.Dropout(config.dropout)

    def hidden(self, tokens_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """Token ids [B, T] int32 -> output of ln_f [N, D] in the compute dtype.

        Dropout (not deterministic) needs an rng named 'dropout'.
        """
        x_ND = self.embed(tokens_BT.reshape(-1))
        return self.contextualize(x_ND, tokens_BT.shape[1], deterministic)

    def contextualize(
        self, x_ND: jax.Array, length: int, deterministic: bool = True, position=None
    ) -> jax.Array:
        """Token embeddings [N, D] -> output of ln_f [N, D] in the compute dtype.

        The N rows are sequences of `length` tokens. With a `position`, `length` is 1,
        and the rows are the tokens at that position; see `next_hidden`.
        """
        wpe_TD = self.wpe[:length] if position is None else self.wpe[position][None]
        wpe_TD = wpe_TD.astype(x_ND.dtype)
        if self.config.dropout and not deterministic:
            x_ND += repeated(wpe_TD, x_ND.shape[0])
            x_ND = self.embedding_dropout(x_ND, deterministic=False)
            wpe_TD = jnp.zeros_like(wpe_TD)
        # The first norm adds the position embeddings, like any other update.
        update = wpe_TD, jnp.zeros(x_ND.shape[-1])
        for block in self.blocks:
            x_ND, update = block(x_ND, update, length, deterministic, position)
        return self.ln_f(x_ND, *update, has_few_rows=position is not None)[1]

    def next_hidden(self, tokens_B: jax.Array, position: jax.Array) -> jax.Array:
        """The next token of each sequence, at `position` -> output of ln_f [B, D].

        Reads the keys and values of the earlier tokens from the collection 'cache', and
        adds those of the new ones. `hidden` fills this collection; the caller keeps it.
        """
        return self.contextualize(self.embed(tokens_B), 1, position=position)

    def head(self) -> Head:
        """The bands of the output head; their columns follow one another."""
        return tuple(part.head() for part in self.embed.band_embeddings)

    def renumber(self, tokens: jax.Array) -> jax.Array:
        """Token ids -> columns of the head; -1 (no token) stays -1."""
        return self.embed.renumber(tokens)

    def logits(self, h_ND: jax.Array) -> jax.Array:
        """Outputs of ln_f [N, D] -> logits [N, V] float32 by token id, for sampling.

        It computes in the dtype of the parameters. Training and evaluation use
        `pcagpt.losses` instead, because these store fewer logits.
        """
        head = self.head()
        h_ND = h_ND.astype(self.wpe.dtype)
        padded = head_logits(h_ND, head, jnp.float32)
        logits_NV = jnp.concatenate(
            [found[:, : band.size] for found, band in zip(padded, head, strict=True)],
            axis=-1,
        )
        return logits_NV[:, self.renumber(jnp.arange(self.config.vocab_size))]

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids [B, T] int32 -> logits [B, T, V] float32 of the next tokens."""
        return self.logits(self.hidden(tokens_BT)).reshape(*tokens_BT.shape, -1)
