r"""Trains a compressed model on, from all its weights, towards a teacher's predictions.

    python -m pcagpt.main --config=configs/recover.py \
        --config.init.weights_from=checkpoints/compressed/best_k128 \
        --config.distill.teacher=checkpoints/gpt_baseline

The folder to go on from decides every size of the model. train.* is D's budget: this
run gets the share of it that finetune.* declares, as B does. Without a teacher it
minimises the cross entropy alone. The control, D trained on for as long:
--config.init.weights_from=checkpoints/gpt_baseline.
"""

from pcagpt.config import base


def get_config():
    """The base config as a fine-tuning; the run to go on from is to be named."""
    config = base()
    config.arm = "pca_finetune"
    return config
