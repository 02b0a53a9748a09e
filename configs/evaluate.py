r"""Evaluates a run, or one of its checkpoints, on any split of any corpus.

    python -m pcagpt.main --config=configs/evaluate.py \
        --config.model_path=checkpoints/gpt_baseline --config.split=test

Prints the result and writes it to the folder of the run. The default is the
corpus that the run was trained on. --config.data.source names another one; the model
must know its tokens.
"""

from pcagpt.config import base


def get_config():
    """Task evaluate, on the corpus that the run was trained on."""
    config = base()
    config.task = "evaluate"
    config.data.source = ""
    return config
