"""GPT-2 with a token table that may be factorized, in one or several frequency bands.

Shape letters: B batch, T sequence, N = B*T, V vocabulary, D model width, K rank,
H heads, C head width, F = 4D.

    x = wte[t] @ scale_up + wpe           [N,K] @ [K,D]
    h = ln_f(blocks(x))                   [N,D]
    logits = (h @ scale_down.T) @ wte.T   [N,K] @ [K,V]

A band is a range of columns of the logits with its own table and scale matrices. The
baseline has one band without scale matrices, a model of a single rank has one band with
them. A model of several bands also stores the column of each token id.
"""

from pcagpt.model.config import (
    BLOCK_KNOBS,
    BLOCK_RANK,
    DEVICE_KNOBS,
    LEVELS,
    TABLE_KNOBS,
    WIDTHS,
    BandSpec,
    GPTConfig,
)
from pcagpt.model.embedding import (
    ALIGNED,
    CONSTANTS,
    FULL_TABLE,
    TABLES,
    BandLeaves,
    Head,
    HeadBand,
    full_table,
    head_logits,
    is_order,
    order_constants,
    packed_constants,
    products,
    project,
    table_leaves,
    token_order,
    without_embedding,
)
from pcagpt.model.gpt import GPT
from pcagpt.model.packed import PackedBand, SharedArrays
from pcagpt.model.size import (
    embedding_parameters,
    total_parameters,
    training_flops_per_token,
    weight_bytes,
)
