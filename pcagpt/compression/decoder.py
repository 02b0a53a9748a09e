"""A causal language model of transformers: its table, statistics and measurements.

It does in PyTorch what `run.calibrate` and `compression.score` do for our own models,
for any architecture whose head multiplies the last hidden states by a table: that of
the input, or another one. The model's own code embeds the tokens, so a scaled embedding
(Gemma) counts as it is.

Shape letters: B batch, T sequence, N = B*T, n tokens of a chunk, W windows, V
vocabulary, D width, E deciles.
"""

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import checkpoint

from pcagpt.compression.open_decoder import device, open_model, own_torch, tables_of
from pcagpt.compression.score import swap_scores
from pcagpt.compression.sides import INPUT, OUTPUT
from pcagpt.errors import OF_NO_FILE, UserError, reason_of
from pcagpt.factorization import Statistics
from pcagpt.losses.deciles import DECILES
from pcagpt.rows import SwapScores
from pcagpt.run.generate import draw, key_of

# Names of the model's length in configs. If a config has two, the first counts.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
)
# Windows that pass through the model at a time.
WINDOWS_ON_CPU, WINDOWS_ON_GPU = 1, 2
# Numbers in a chunk of logits, and in all arrays of that shape that live at a time.
LOGITS, ARRAYS = 2**25, 5
# Hidden states of the model itself that `score` keeps for the next table, as a share of
# the model's memory.
KEPT = 0.5
# Relative distance between the model's own logits and those of the plain product.
LOGITS_AGREE = 1e-4


class _Kept(dict[tuple[tuple[int, ...], bytes], torch.Tensor]):
    """{(shape, content) of tokens: hidden states}, and the bytes that may be added."""

    def __init__(self, free_bytes: float):
        super().__init__()
        self.free_bytes = free_bytes


def _longest(config: Any, folder: Path) -> int | None:
    """The tokens that a model reads at a time; None if it has no limit (-1 in XLNet).

    None also if its config does not say. UserError for a length that is not a positive
    whole number.
    """
    lengths = [getattr(config, name, None) for name in _LENGTHS]
    length = next((length for length in lengths if length is not None), None)
    if type(length) is int and length == -1:
        return None
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(
            f"{folder}: its config.json says that the model reads {length!r:.60} "
            "tokens at a time: restore it, or download the model again"
        )
    return length


class Decoder:
    """A model in float32 on the first GPU or the CPU; implements `original.Model`."""

    compute_dtype, device_count, side = "float32", 1, ""
    packages = ("torch", "transformers")

    @own_torch()
    def __init__(self, folder: Path, window: int):
        """Opens a folder; UserError if its model cannot be measured.

        The model reads `window` tokens at a time, or as many as it was made for.
        """
        self.folder = folder
        self.device = device()
        self.model = open_model(folder).to(self.device).requires_grad_(False).eval()
        self._embedding, self._head = tables_of(self.model, folder)
        is_tied = self._head.weight is self._embedding.weight
        self.sides = () if is_tied else (INPUT, OUTPUT)
        config = self.model.config.get_text_config()
        self.window = min(window, _longest(config, folder) or window)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._check_head()
        parameters = self.model.parameters()
        # Both sides of an untied model share it.
        self._kept = _Kept(KEPT * sum(p.nbytes for p in parameters))

    @property
    def table_VD(self) -> np.ndarray:
        """The token table, or that of the side: float32 [V, D]."""
        table = self._head if self.side == OUTPUT else self._embedding
        return table.weight.detach().float().cpu().numpy()

    def of_side(self, side: str) -> Self:
        """The same model; `score` replaces the table of this side only."""
        other = copy.copy(self)
        other.side = side
        return other

    @own_torch()
    def statistics(
        self, frequency_V: np.ndarray, batches: Iterable[np.ndarray]
    ) -> Statistics:
        """Statistics over batches of token ids, int [B, T].

        Targets are drawn with a fixed seed. Sums over batches are float64.
        """
        chance = torch.Generator(self.device).manual_seed(0)
        total: dict[str, Any] = {}
        tokens = 0
        for batch_BT in batches:
            for name, sums in self._sums(self._put(batch_BT), chance).items():
                total[name] = total.get(name, 0) + sums.double().cpu().numpy()
            tokens += batch_BT.size
        means = {name: value / tokens for name, value in total.items()}
        return Statistics(frequency=frequency_V, **means)

    @own_torch()
    def score(
        self,
        table_VD: np.ndarray,
        decile_V: np.ndarray,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> SwapScores:
        """Scores of a table in place of the side's own; as `score.TableSwap`."""
        new_VD, decile_V = self._put(table_VD), self._put(decile_V)
        with torch.inference_mode():
            return swap_scores(
                self._part_scores(new_VD, decile_V, *part)
                for batch in batches
                for part in zip(
                    *(self._put(a_BT).split(self.part) for a_BT in batch),
                    strict=True,
                )
                if (part[1] >= 0).any()  # The last batch may end with padding.
            )

    def generate(
        self,
        table_VD: np.ndarray,
        prompt: np.ndarray,
        ids: np.ndarray,
        seed: int,
        temperature: float,
    ) -> Iterator[int]:
        """Draws the next tokens with a table in place of the side's own, without end.

        Arguments are those of `run.generate.generate`. The model sees the last `window`
        tokens, and reads them anew for each token.
        """
        new_VD, own_VD = self._put(table_VD), self._embedding.weight
        in_VD = own_VD if self.side == OUTPUT else new_VD
        out_VD = self._head.weight if self.side == INPUT else new_VD
        tokens, key = [int(token) for token in prompt], key_of(seed)
        while True:
            window_BT = self._put(np.array([tokens[-self.window :]]))
            with own_torch(), torch.inference_mode(), self._embedding_of(in_VD):
                logits_BV = self._logits(self._hidden(window_BT)[-1:], out_VD)
            logits_BV = jnp.asarray(logits_BV.cpu().numpy())
            drawn_B = draw(logits_BV, ids, len(tokens), key, temperature)
            tokens.append(int(drawn_B[0]))
            yield tokens[-1]

    @property
    def part(self) -> int:
        """Windows that pass through the model at a time."""
        return WINDOWS_ON_GPU if self.device.type == "cuda" else WINDOWS_ON_CPU

    def _chunks(self, *arrays_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Parts of arrays, so short that all arrays of logits are at most `LOGITS`."""
        size = max(1, LOGITS // ARRAYS // len(self._embedding.weight))
        return zip(*(array_N.split(size) for array_N in arrays_N), strict=True)

    def _part_scores(self, new_VD, decile_V, inputs_BT, targets_BT):
        """Sums of all scores over a batch; `windows`: added loss and count of each."""
        own_VD = self._head.weight
        swapped_ND = own_ND = self._own_hidden(inputs_BT)
        if self.side != OUTPUT:
            with self._embedding_of(new_VD):
                swapped_ND = self._hidden(inputs_BT)
        if self.side == INPUT:
            new_VD = own_VD
        names = ("loss", "added_loss", "added_loss_input", "added_loss_head", "kl")
        names += ("top1_agreement", "count")
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        deciles_E2 = torch.zeros(DECILES, 2, device=self.device)
        added = []
        targets_N = targets_BT.reshape(-1)
        for own_nD, swapped_nD, targets_n in self._chunks(
            own_ND, swapped_ND, targets_N
        ):
            counted_n = targets_n >= 0
            own_nV, both_nV = (
                self._log_probabilities(h_nD, rows_VD)
                for h_nD, rows_VD in ((own_nD, own_VD), (swapped_nD, new_VD))
            )

            def loss_n(log_p_nV, targets_n=targets_n, counted_n=counted_n):
                found = log_p_nV.gather(1, targets_n.clamp(min=0)[:, None])[:, 0]
                return torch.where(counted_n, -found, 0)

            own_n = loss_n(own_nV)
            added_n = loss_n(both_nV) - own_n
            kl_n = (own_nV.exp() * (own_nV - both_nV)).sum(1)
            same_n = own_nV.argmax(1) == both_nV.argmax(1)
            del both_nV
            of_input_nV = self._log_probabilities(swapped_nD, own_VD)
            of_input_n = loss_n(of_input_nV) - own_n
            del of_input_nV
            of_head_n = loss_n(self._log_probabilities(own_nD, new_VD)) - own_n
            parts = (own_n, added_n, of_input_n, of_head_n)
            parts += (torch.where(counted_n, kl_n, 0), counted_n & same_n, counted_n)
            totals += torch.stack([a_n.sum(dtype=torch.float64) for a_n in parts])
            of_decile_n = decile_V[targets_n.clamp(min=0)]
            pairs_n2 = torch.stack([added_n, counted_n.float()], 1)
            deciles_E2.index_add_(0, of_decile_n, pairs_n2)
            added.append(added_n)
        by_window = torch.cat(added).reshape(targets_BT.shape), targets_BT >= 0
        windows_W2 = torch.stack([a.sum(1, dtype=torch.float32) for a in by_window], 1)
        found = {"deciles": deciles_E2.T, "windows": windows_W2}
        found |= dict(zip(names, totals, strict=True))
        return {name: a.cpu().numpy() for name, a in found.items()}

    def _sums(self, tokens_BT, chance) -> dict[str, torch.Tensor]:
        """Sums over a batch of all statistics except the frequency."""
        table_VD = self._head.weight
        rows_ND = self._embedding.weight[tokens_BT.reshape(-1)].requires_grad_()
        places_BT = torch.arange(tokens_BT.numel(), device=self.device)
        # Each place has a row of its own, so that the gradient is that of one place.
        embedding, layers = self._embedding_of(rows_ND), self._recomputed_layers()
        with torch.enable_grad(), embedding, layers:
            h_ND = self._hidden(places_BT.reshape(tokens_BT.shape))
        probability_V = torch.zeros(len(table_VD), device=self.device)
        expected, gradient = [], []
        with torch.no_grad():
            for (h_nD,) in self._chunks(h_ND):
                logits_nV = self._logits(h_nD, table_VD)
                p_nV = logits_nV.softmax(1)
                expected.append(p_nV @ table_VD)
                probability_V += p_nV.sum(0)
                drawn_n1 = torch.multinomial(p_nV, 1, generator=chance)
                if self._cap:
                    p_nV.scatter_add_(1, drawn_n1, torch.full_like(p_nV[:, :1], -1))
                    p_nV *= 1 - (logits_nV / self._cap) ** 2  # the slope of the cap
                    gradient.append(p_nV @ table_VD)
                else:
                    gradient.append(expected[-1] - table_VD[drawn_n1[:, 0]])
        (of_rows_ND,) = torch.autograd.grad(h_ND, rows_ND, torch.cat(gradient))
        h_ND = h_ND.detach()
        return {
            "probability": probability_V,
            "hidden_mean": h_ND.sum(0),
            "hidden_moment": h_ND.T @ h_ND,
            "gradient_moment": of_rows_ND.T @ of_rows_ND,
            "context_moment": h_ND.T @ torch.cat(expected),
        }

    def _hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states that the head multiplies by its table: float32 [N, D]."""
        # Some models also read the ids; the rows of `_embedding_of` have none.
        embedded_BTD = self._embedding(tokens_BT)
        body = self.model.base_model
        found = body(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
        return found.reshape(-1, found.shape[-1])

    def _own_hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """`_hidden` with the model's own table; the same tokens come for each table."""
        key = tuple(tokens_BT.shape), tokens_BT.cpu().numpy().tobytes()
        if (kept_ND := self._kept.get(key)) is not None:
            return kept_ND
        h_ND = self._hidden(tokens_BT)
        if h_ND.nbytes <= self._kept.free_bytes:
            self._kept.free_bytes -= h_ND.nbytes
            self._kept[key] = h_ND
        return h_ND

    def _logits(self, h_nD: torch.Tensor, table_VD: torch.Tensor) -> torch.Tensor:
        logits_nV = h_nD @ table_VD.T
        if self._head.bias is not None:
            logits_nV += self._head.bias
        if self._cap:
            logits_nV = self._cap * torch.tanh(logits_nV / self._cap)
        return logits_nV

    def _log_probabilities(self, h_nD, table_VD) -> torch.Tensor:
        return self._logits(h_nD, table_VD).log_softmax(1)

    @contextlib.contextmanager
    def _embedding_of(self, rows: torch.Tensor) -> Iterator[None]:
        """The model's embedding looks up these rows meanwhile."""
        # torch gives the padding token no gradient; the row of another place may be it.
        own, padding = self._embedding.weight, self._embedding.padding_idx
        del self._embedding.weight
        self._embedding.weight, self._embedding.padding_idx = rows, None
        try:
            yield
        finally:
            del self._embedding.weight
            self._embedding.weight, self._embedding.padding_idx = own, padding

    @contextlib.contextmanager
    def _recomputed_layers(self) -> Iterator[None]:
        """For a gradient, each layer keeps its input only: less memory, more time."""
        depth = self.model.config.get_text_config().num_hidden_layers
        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList)]
        layers = next((layers for layers in lists if len(layers) == depth), ())
        for layer in layers:
            # transformers would do it only in training, where dropout is active.
            layer.forward = functools.partial(
                *(checkpoint.checkpoint, layer.forward),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _put(self, array: np.ndarray) -> torch.Tensor:
        is_ids = np.issubdtype(array.dtype, np.integer)
        return torch.as_tensor(
            np.asarray(array, np.int64 if is_ids else np.float32), device=self.device
        )

    def _check_head(self) -> None:
        """UserError unless the plain product gives the model's own probabilities.

        These must not depend on later tokens, nor on more of a token than its row.
        """
        name, size = type(self.model).__name__, len(self._embedding.weight)
        reads_more = UserError(
            f"{self.folder}: {name} reads more of a token than its row of the table, "
            "such as an embedding for each layer; it cannot be measured"
        )
        config = self.model.config.get_text_config()
        if getattr(config, "hidden_size_per_layer_input", 0):
            # To find the ids, Gemma compares with all rows, which takes gigabytes.
            raise reads_more
        if self.model.base_model is self.model:
            raise UserError(
                f"{self.folder}: transformers does not say which part of {name} "
                "computes the hidden states before its head; it cannot be measured"
            )
        # Two at least: a later token must not change the logits of an earlier one.
        length = max(2, min(8, self.window) // 2 * 2)
        # No token is the number of its place, which may stand for its row.
        tokens_BT = torch.arange(length, 0, -1, device=self.device)[None] // 2 % size
        other_BT = tokens_BT.clone()
        other_BT[:, -1] = (other_BT[:, -1] + 1) % size
        try:
            with torch.inference_mode():
                own_nV, other_nV = (
                    self.model(input_ids=one_BT, use_cache=False).logits[0].float()
                    for one_BT in (tokens_BT, other_BT)
                )
                own_nV, other_nV = own_nV.log_softmax(1), other_nV.log_softmax(1)
                h_ND = self._hidden(tokens_BT)
                found_nV = self._log_probabilities(h_ND, self._head.weight)
                near = LOGITS_AGREE * own_nV.abs().max()
                is_product = bool((found_nV - own_nV).abs().max() <= near)
                is_causal = bool((other_nV - own_nV)[:-1].abs().max() <= near)
        except (*OF_NO_FILE, torch.OutOfMemoryError):
            raise
        # Architectures differ in what they take, and fail in many ways.
        except Exception as error:
            raise UserError(
                f"{self.folder}: {name} does not compute logits from embedded tokens "
                f"as other decoders do ({reason_of(error)}); it cannot be measured"
            ) from None
        if not is_product:
            raise UserError(
                f"{self.folder}: {name} does not multiply its last hidden states by "
                "its table alone; such a head cannot be measured"
            )
        if not is_causal:
            raise UserError(
                f"{self.folder}: {name} reads the tokens that it should predict; give "
                "a causal language model"
            )
        if not self._reads_rows_alone(tokens_BT, h_ND):
            raise reads_more

    def _reads_rows_alone(self, tokens_BT: torch.Tensor, h_ND: torch.Tensor) -> bool:
        """Whether the hidden states stay if each place has a row of its own."""
        rows_ND = self._embedding.weight[tokens_BT.reshape(-1)]
        places_BT = torch.arange(tokens_BT.numel(), device=self.device)[None]
        try:
            with torch.inference_mode(), self._embedding_of(rows_ND):
                change_ND = self._hidden(places_BT) - h_ND
        except (*OF_NO_FILE, torch.OutOfMemoryError):
            raise
        except Exception:  # A model that looks rows up may find some twice, or none.
            return False
        return bool(change_ND.abs().max() <= LOGITS_AGREE * h_ND.abs().max())
