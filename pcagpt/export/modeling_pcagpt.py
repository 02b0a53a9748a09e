"""A causal language model of transformers whose token table stays compressed.

pcagpt copies this file into an exported folder. transformers runs it there:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It needs only torch and transformers. Input and output head share one table; the head
may have a bias of its own. `config.table` says how the table is made.

Shape letters: N tokens, V rows of a band, D model width, K rank or directions.
"""

import torch
import transformers
from torch import nn
from torch.nn import functional

ARCHITECTURE = "GPT2LMHeadModel"  # An export has the name of its own model here.
BLOCK_RANK, WIDTHS = 8, (8, 6, 5, 4, 3, 2, 1)  # of packed tables
TILE = 2048  # packed rows of the head that are unpacked at the same time

_Model = getattr(transformers, ARCHITECTURE)
_Config = _Model.config_class


class FactorizedBand(nn.Module):
    """The rows wte @ scale_up for the input, wte @ scale_down for the head."""

    def __init__(self, size: int, rank: int, width: int, is_tied: bool):
        super().__init__()
        self.wte = nn.Parameter(torch.empty(size, rank or width))
        self.scale_up = nn.Parameter(torch.empty(rank, width)) if rank else None
        has_own = rank and not is_tied
        self.scale_down = nn.Parameter(torch.empty(rank, width)) if has_own else None

    def rows(self, rows_N: torch.Tensor, _) -> torch.Tensor:
        """Rows of the table: [N, D]."""
        found_NK = functional.embedding(rows_N, self.wte)
        return found_NK if self.scale_up is None else found_NK @ self.scale_up

    def logits(self, h_ND: torch.Tensor, _) -> torch.Tensor:
        """Products with all rows: [N, V]."""
        down_KD = self.scale_up if self.scale_down is None else self.scale_down
        z_NK = h_ND if down_KD is None else h_ND @ down_KD.T
        return z_NK @ self.wte.T


class Directions(nn.Module):
    """What all bands of a packed table share."""

    def __init__(self, directions: int, width: int):
        super().__init__()
        self.register_buffer("basis", torch.empty(directions, width, dtype=torch.int8))
        self.register_buffer("columns", torch.empty(width))
        self.register_buffer("levels", torch.empty(sum(2**bits for bits in WIDTHS)))


class PackedBand(nn.Module):
    """The rows columns * (scales * levels[codes]) @ basis, unpacked when they are used.

    Eight directions are a block: their codes have the same width in bits. Byte i of a
    block has bit i of its eight codes. Wide blocks come first.
    """

    def __init__(self, size: int, blocks: list[int]):
        super().__init__()
        self.blocks = blocks
        length = sum(count * bits for count, bits in zip(blocks, WIDTHS, strict=True))
        self.register_buffer("codes", torch.empty(size, length, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(BLOCK_RANK * sum(blocks)))

    def rows(self, rows_N: torch.Tensor, shared: Directions) -> torch.Tensor:
        """Rows of the table: [N, D]."""
        values_NK = self._unpack(self.codes[rows_N], shared) * self.scales
        basis_KD = shared.basis[: len(self.scales)].to(values_NK.dtype)
        return (values_NK @ basis_KD) * shared.columns

    def logits(self, h_ND: torch.Tensor, shared: Directions) -> torch.Tensor:
        """Products with all rows: [N, V]."""
        basis_KD = shared.basis[: len(self.scales)].to(h_ND.dtype)
        z_NK = ((h_ND * shared.columns) @ basis_KD.T) * self.scales
        tiles = (self._unpack(tile, shared) for tile in self.codes.split(TILE))
        return torch.cat([z_NK @ values_VK.T for values_VK in tiles], dim=-1)

    def _unpack(self, codes: torch.Tensor, shared: Directions) -> torch.Tensor:
        """The values of packed rows: [N, bytes] uint8 -> [N, K]."""
        values, byte, level = [], 0, 0
        places_8 = torch.arange(BLOCK_RANK, device=codes.device)
        for bits, count in zip(WIDTHS, self.blocks, strict=True):
            size = count * bits
            own_NSB1 = (
                codes[:, byte : byte + size].int().reshape(len(codes), count, bits, 1)
            )
            numbers_NSB8 = (own_NSB1 >> places_8 & 1) << places_8[:bits, None]
            of_width = shared.levels[level : level + 2**bits]
            values_NSB = of_width[numbers_NSB8.sum(2)]
            values.append(values_NSB.reshape(len(codes), count * BLOCK_RANK))
            byte, level = byte + size, level + 2**bits
        return torch.cat(values, dim=1)


class CompressedEmbedding(nn.Module):
    """The token table in bands of tokens; input and head use it.

    position: the column of each token among the columns of all bands; mean: row that is
    added to all rows; scale: factor of the input that some architectures have.
    """

    def __init__(self, table: dict, width: int, scale: float):
        super().__init__()
        sizes, blocks = table["sizes"], table["blocks"]
        self.scale, self.width = scale, width
        self.shared = None
        if blocks:
            self.shared = Directions(BLOCK_RANK * max(map(sum, blocks)), width)
            bands = [PackedBand(*band) for band in zip(sizes, blocks, strict=True)]
        else:
            bands = [
                FactorizedBand(size, rank, width, table["is_tied"])
                for size, rank in zip(sizes, table["ranks"], strict=True)
            ]
        self.bands = nn.ModuleList(bands)
        self.starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        mean = torch.empty(width) if table["has_mean"] else None
        self.register_buffer("mean", mean)
        position = torch.empty(sum(sizes), dtype=torch.int32)
        self.register_buffer("position", position if len(sizes) > 1 else None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape [...] -> [..., D]."""
        tokens_N = tokens.reshape(-1)
        if self.position is None:
            x_ND = self.bands[0].rows(tokens_N, self.shared)
        else:
            columns_N, x_ND = self.position[tokens_N].long(), 0
            # Every band looks up all tokens, so that shapes do not depend on values.
            for number, band in enumerate(self.bands):
                start, end = self.starts[number : number + 2]
                is_here_N1 = ((columns_N >= start) & (columns_N < end))[:, None]
                rows_N = (columns_N - start).clamp(0, end - start - 1)
                found_ND = band.rows(rows_N, self.shared)
                x_ND = x_ND + torch.where(is_here_N1, found_ND, 0)
        if self.mean is not None:
            x_ND = x_ND + self.mean
        return (self.scale * x_ND).reshape(*tokens.shape, self.width)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits by token id [..., V]."""
        h_ND = h.reshape(-1, self.width)
        parts = [band.logits(h_ND, self.shared) for band in self.bands]
        logits_NV = torch.cat(parts, dim=-1)
        if self.position is not None:
            logits_NV = logits_NV[:, self.position.long()]
        if self.mean is not None:
            logits_NV = logits_NV + (h_ND @ self.mean)[:, None]
        return logits_NV.reshape(*h.shape[:-1], -1)


class CompressedHead(nn.Module):
    """The output head; it computes with the table of the input, and its own bias."""

    def __init__(self, embedding: CompressedEmbedding, bias: torch.Tensor | None):
        super().__init__()
        self._tied = (embedding,)  # A tuple: its weights are stored only once.
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor of the table's dtype, which Mamba reads from its head."""
        band = self._tied[0].bands[0]
        return (band.scales if self._tied[0].shared else band.wte).new_empty(0)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        logits = self._tied[0].logits(h)
        return logits if self.bias is None else logits + self.bias


class CompressedConfig(_Config):
    """The config of the architecture; its field `table` describes the token table.

    Its own model_type keeps transformers from opening the folder without this file: it
    would go on with a random table.
    """

    model_type = f"pcagpt_{_Config.model_type}"


class CompressedForCausalLM(_Model):
    """The model of the architecture with a compressed table."""

    config_class = CompressedConfig
    _tied_weights_keys = None  # The head has no weights to tie, in version 4 or 5.

    def __init__(self, config):
        super().__init__(config)
        own = self.get_input_embeddings()
        # Architectures name it differently; older versions have only a tensor of it.
        scale = getattr(own, "scalar_embed_scale", getattr(own, "embed_scale", 1))
        if isinstance(scale, torch.Tensor):
            raise ImportError("This model needs transformers 4.57 or newer.")
        embedding = CompressedEmbedding(config.table, own.embedding_dim, float(scale))
        self.set_input_embeddings(embedding)
        head = CompressedHead(embedding, self.get_output_embeddings().bias)
        self.set_output_embeddings(head)

    def tie_weights(self, *args, **kwargs):
        """Does nothing: the head reads the table of the input."""

    def resize_token_embeddings(self, *args, **kwargs):
        """Not supported."""
        raise NotImplementedError("A compressed table keeps its tokens.")
