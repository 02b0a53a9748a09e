"""B, PCA-finetune: embedding from D's factorization, all other weights from D.

    python -m pcagpt.main --config=configs/pca_finetune_k128.py

train.steps and train.learning_rate are B's own: the shares of D's that `finetune`
declares. Where WORKDIR lacks D, it is trained with D's full budget.
"""

from pcagpt.config import base


def get_config():
    """The base config at rank 128, started from D, with B's share of D's budget."""
    config = base()
    config.arm = "pca_finetune"
    config.model.n_embd_wte = 128
    config.train.steps = round(config.train.steps * config.finetune.steps_share)
    config.train.warmup_steps = round(
        config.train.warmup_steps * config.finetune.steps_share
    )
    config.train.learning_rate *= config.finetune.learning_rate_share
    return config
