r"""Trains a compressed model further, from all its weights, on a teacher's predictions.

    python -m pcagpt.main --config=configs/recover.py \
        --config.init.weights_from=checkpoints/compressed/best_k128 \
        --config.distill.teacher=checkpoints/gpt_baseline

The folder in init.weights_from determines every size of the model. train.* is D's
budget. finetune.* is the share of it that this run gets, as for B. Without a teacher,
the loss is the cross entropy. The control is D, trained further for the same steps:
--config.init.weights_from=checkpoints/gpt_baseline.
"""

from pcagpt.config import base


def get_config():
    """Task train, as fine-tuning; the command line names the run to start from."""
    config = base()
    config.arm = "pca_finetune"
    return config
