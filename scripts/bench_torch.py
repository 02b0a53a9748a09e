"""The PyTorch systems of scripts/bench.py: a plain GPT-2 and Hugging Face's.

Both train as pcagpt does: float32 parameters, bfloat16 products (on a CPU float32),
gradient clipping, AdamW with weight decay on matrices only, no dropout, and the table's
rows padded to a multiple of 64. Both decode with all weights in bfloat16.
"""

import importlib.util
import shutil
import time

import numpy as np
import torch
from bench_pcagpt import WARM_STEPS, flops_per_token, rank_of
from torch import nn
from torch.nn import functional

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def why_left_out(name: str, quick: bool) -> str:
    """Why a system cannot be measured here; empty if it can."""
    if not (HAS_GPU or quick):
        return "PyTorch sees no GPU; --quick measures it on a CPU"
    if name.endswith("transformers") and not importlib.util.find_spec("transformers"):
        return "it is not installed (pip install transformers)"
    return ""


def forget_compiled() -> None:
    """Resets torch.compile.

    After two batch sizes, it would compile slower kernels that work with any size.
    """
    torch._dynamo.reset()


def release_memory() -> None:
    """Returns unused memory to the GPU, so that JAX can take it."""
    if HAS_GPU:
        torch.cuda.empty_cache()


def has_compiler() -> bool:
    """Whether torch.compile has what it needs: on a CPU, a compiler of C++."""
    return HAS_GPU or any(map(shutil.which, ("g++", "clang++")))


def causal_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal attention for transformers that ignores its mask.

    transformers gives a mask to a compiled model, but flash attention accepts no mask.
    """
    del module, attention_mask
    y = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return y.transpose(1, 2).contiguous(), None


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).split(width, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        h = functional.gelu(self.fc(self.ln_2(x)), approximate="tanh")
        return x + self.out(h)


class PlainBody(nn.Module):
    """Positions, blocks and the final norm, on embeddings [B, T, D]."""

    def __init__(self, size):
        super().__init__()
        self.wpe = nn.Parameter(0.02 * torch.randn(size.block_size, size.n_embd))
        blocks = [Block(size.n_embd, size.n_head) for _ in range(size.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_f = nn.LayerNorm(size.n_embd)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]."""
        x = x + self.wpe[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)


class TransformersBody(nn.Module):
    """Positions, blocks and the final norm of Hugging Face's GPT-2."""

    def __init__(self, size):
        super().__init__()
        from transformers import AttentionInterface, GPT2Config, GPT2Model

        AttentionInterface.register("causal", causal_attention)
        config = GPT2Config(
            vocab_size=1,  # `WithTable` holds the table.
            bos_token_id=0,
            eos_token_id=0,
            n_positions=size.block_size,
            n_embd=size.n_embd,
            n_layer=size.n_layer,
            n_head=size.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="causal",
        )
        self.body = GPT2Model(config)
        self.body.wte.requires_grad_(False)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]."""
        return self.body(inputs_embeds=x, use_cache=False).last_hidden_state


class WithTable(nn.Module):
    """A body between a tied embedding and head; the table is full or factorized."""

    def __init__(self, body, size, rank: int | None):
        super().__init__()
        rows = -(-size.vocab_size // 64) * 64
        self.body = body
        self.wte = nn.Parameter(0.02 * torch.randn(rows, rank or size.n_embd))
        self.scale = None
        if rank:
            self.scale = nn.Parameter(0.02 * torch.randn(rank, size.n_embd))

    def hidden(self, tokens):
        """The body's output for tokens [B, T]: [B, T, D]."""
        x = functional.embedding(tokens, self.wte)
        return self.body(x if self.scale is None else x @ self.scale)

    def logits(self, h):
        """[..., D] -> [..., V]."""
        return (h if self.scale is None else h @ self.scale.T) @ self.wte.T

    def forward(self, tokens, targets):
        """Mean loss of tokens [B, T]."""
        logits = self.logits(self.hidden(tokens)).flatten(0, 1)
        return functional.cross_entropy(logits.float(), targets.flatten())


class Peer:
    """A PyTorch model that takes turns with pcagpt; `body` has all but its table."""

    name: str
    body: type[nn.Module]
    devices = 1
    rests = True

    def __init__(self, size, model: str, batch: int, folder):
        torch.manual_seed(0)
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.set_float32_matmul_precision("high")
        is_compiled = has_compiler()
        self.model, self.batch = model, batch
        self.details = {"compiled": is_compiled, "threads": torch.get_num_threads()}
        self.tokens_per_step = batch * size.block_size
        self.flops_per_token = flops_per_token(size, model)
        module = WithTable(self.body(size), size, rank_of(model)).to(DEVICE)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=6e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.module = module
        if is_compiled:
            self.module = torch.compile(module, dynamic=False, fullgraph=True)
        length = size.block_size + 1
        tokens = np.fromfile(folder / "train.bin", np.uint16, count=batch * length)
        tokens = torch.from_numpy(tokens.astype(np.int64)).to(DEVICE)
        self.tokens = tokens.view(batch, length)
        self.go(WARM_STEPS)
        self.peak_bytes = (
            torch.cuda.max_memory_allocated() - before if HAS_GPU else None
        )

    def go(self, steps: int) -> None:
        """Trains for this many steps and waits until they are done."""
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16, enabled=HAS_GPU):
                loss = self.module(self.tokens[:, :-1], self.tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if HAS_GPU:
            torch.cuda.synchronize()

    def seconds_per_step(self, steps: int) -> float:
        """Mean over the steps, after a few that are not timed."""
        self.go(WARM_STEPS)
        start = time.perf_counter()
        self.go(steps)
        return (time.perf_counter() - start) / steps


class Plain(Peer):
    """A plain GPT-2."""

    name, body = "torch", PlainBody


class Transformers(Peer):
    """Hugging Face's GPT-2."""

    name, body = "transformers", TransformersBody


class DecodingPeer:
    """Greedy decoding by PyTorch, which takes turns with pcagpt's."""

    name: str
    devices, rests, flops_per_token = 1, False, None

    def __init__(self, size, model: str, batch: int, folder):
        del folder
        torch.manual_seed(0)
        self.size, self.model, self.batch = size, model, batch
        self.tokens_per_step = batch
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        dtype = torch.bfloat16 if HAS_GPU else torch.float32
        self.module = self.make(rank_of(model)).to(DEVICE, dtype).eval()
        self.prompt = torch.ones(
            batch, size.prompt_tokens, dtype=torch.int64, device=DEVICE
        )
        self.seconds(size.decoded_tokens + 1)  # Compiles what it compiles.
        self.peak_bytes = (
            torch.cuda.max_memory_allocated() - before if HAS_GPU else None
        )
        self.details = {
            "steps": size.decoded_tokens,
            "threads": torch.get_num_threads(),
        }

    def make(self, rank: int | None) -> nn.Module:
        """The model."""
        raise NotImplementedError

    def decode(self, count: int) -> torch.Tensor:
        """The prompt and `count` more tokens [B, T]."""
        raise NotImplementedError

    @torch.inference_mode()
    def seconds(self, count: int) -> float:
        """The time to read the prompt and draw `count` tokens."""
        start = time.perf_counter()
        self.decode(count)
        if HAS_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def seconds_per_step(self, steps: int) -> float:
        """Mean over the tokens after the first, which comes with the prompt."""
        del steps
        count = self.size.decoded_tokens
        self.seconds(count + 1)  # As for pcagpt, the GPU must not wake in a turn.
        first = self.seconds(1)
        return (self.seconds(count + 1) - first) / count


class PlainDecoding(DecodingPeer):
    """A plain GPT-2 that reads the whole text for each token, as nanoGPT's does."""

    name = "decode-torch"

    def make(self, rank):
        """Its body is that of training."""
        return WithTable(PlainBody(self.size), self.size, rank)

    def decode(self, count):
        """Keeps neither keys nor values."""
        tokens = self.prompt
        for _ in range(count):
            h = self.module.hidden(tokens[:, -self.size.block_size :])
            drawn = self.module.logits(h[:, -1:]).argmax(dim=-1)
            tokens = torch.cat((tokens, drawn), dim=1)
        return tokens


class TransformersDecoding(DecodingPeer):
    """Hugging Face's GPT-2 with a static cache; on a GPU, generate compiles it."""

    name = "decode-transformers"

    def make(self, rank):
        """A low-rank table takes the place of both tables."""
        from transformers import GPT2Config, GPT2LMHeadModel

        size, rows = self.size, -(-self.size.vocab_size // 64) * 64
        config = GPT2Config(
            vocab_size=rows,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            n_positions=size.block_size,
            n_embd=size.n_embd,
            n_layer=size.n_layer,
            n_head=size.n_head,
        )
        model = GPT2LMHeadModel(config)
        if rank:
            lookup, head = nn.Embedding(rows, rank), nn.Linear(rank, rows, bias=False)
            head.weight = lookup.weight
            up = nn.Linear(rank, size.n_embd, bias=False)
            down = nn.Linear(size.n_embd, rank, bias=False)
            model.transformer.wte = nn.Sequential(lookup, up)
            model.lm_head = nn.Sequential(down, head)
        return model

    def decode(self, count):
        """The cache has the same size for any count."""
        return self.module.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
        )
