r"""Evaluates a trained run, or one checkpoint of it, on any split of any corpus.

    python -m pcagpt.main --config=configs/evaluate.py \
        --config.model_path=checkpoints/gpt_baseline --config.split=test

Prints the result and writes it beside the run. The corpus is the run's own unless
--config.data.source names another whose tokens the model knows.
"""

from pcagpt.config import base


def get_config():
    """The base config as an evaluation, on the corpus the run was trained on."""
    config = base()
    config.task = "evaluate"
    config.data.source = ""
    return config
