"""C, random-scratch: embedding of rank 128 and blocks at random initialisation.

    python -m pcagpt.main --config=configs/random_k128.py --config.data.source=FOLDER

C is the control of A. For frequency bands instead of one rank, with 50,257 tokens:
--config.model.band_sizes=6000,44257 --config.model.band_ranks=256,64.
"""

from pcagpt.config import base


def get_config():
    """The base config at rank 128."""
    config = base()
    config.arm = "random"
    config.model.n_embd_wte = 128
    return config
