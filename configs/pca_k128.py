"""A, PCA-scratch: embedding from D's factorization at rank 128, random blocks.

    python -m pcagpt.main --config=configs/pca_k128.py --config.data.source=FOLDER

Trains D and factorizes its table first if WORKDIR does not have them.
--config.model.n_embd_wte=64 sets another rank.
"""

from pcagpt.config import base


def get_config():
    """The base config at rank 128, starting from D's factors."""
    config = base()
    config.arm = "pca"
    config.model.n_embd_wte = 128
    return config
