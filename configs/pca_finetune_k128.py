r"""B, PCA-finetune: embedding from D's factorization, all other weights from D.

    python -m pcagpt.main --config=configs/pca_finetune_k128.py \
        --config.data.source=FOLDER

Trains D and factorizes its table first if WORKDIR does not have them.
train.* is D's budget. B trains for finetune.steps_share of the steps, at
finetune.learning_rate_share of the learning rate.
"""

from pcagpt.config import base


def get_config():
    """The base config at rank 128, starting from D."""
    config = base()
    config.arm = "pca_finetune"
    config.model.n_embd_wte = 128
    return config
