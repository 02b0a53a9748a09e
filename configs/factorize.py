r"""Factorizes the token table of a run, or a table [V, d] in a .npy file.

    python -m pcagpt.main --config=configs/factorize.py \
        --config.model_path=checkpoints/gpt_baseline --config.ranks=64,128

Writes WORKDIR/pca_factorized/: wte_pca_k{k}.npy, scale_mats_pca_k{k}.npz, the spectrum
and the share of energy that each rank keeps. The SVD takes a minute at GPT-2's size on
a CPU.
"""

from pcagpt.config import base


def get_config():
    """Task factorize."""
    config = base()
    config.task = "factorize"
    config.data.source = ""
    return config
