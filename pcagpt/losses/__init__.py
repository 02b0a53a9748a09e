"""Token losses from the hidden state and the output head, in parts that save memory."""

from pcagpt.losses.chunks import scan_chunks
from pcagpt.losses.cross_entropy import cross_entropy
from pcagpt.losses.distillation import distillation
from pcagpt.losses.logits import (
    divergence,
    negative_log_likelihood,
    token_losses,
)
