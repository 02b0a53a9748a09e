"""A, PCA-scratch: embedding from D's factorization at rank 128, random blocks.

    python -m pcagpt.main --config=configs/pca_k128.py --config.data.source=FOLDER

Trains D and factorizes its table first, where WORKDIR lacks them. Another rank:
--config.model.n_embd_wte=64.
"""

from pcagpt.config import base


def get_config():
    """The base config at rank 128, started from D's factors."""
    config = base()
    config.arm = "pca"
    config.model.n_embd_wte = 128
    return config
