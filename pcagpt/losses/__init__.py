"""Token losses straight from the hidden state, without a full [N, V] of logits.

A head is a sequence of bands (wte [V, K], scale_down [K, D] or None, real rows).
"""

from pcagpt.losses.chunks import scan_chunks
from pcagpt.losses.cross_entropy import cross_entropy
from pcagpt.losses.distillation import Distillation, distillation
from pcagpt.losses.logits import Head, token_losses

__all__ = [
    "Distillation",
    "Head",
    "cross_entropy",
    "distillation",
    "scan_chunks",
    "token_losses",
]
