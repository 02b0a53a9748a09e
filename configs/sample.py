r"""Continues a text by any trained or compressed model, and prints it.

    python -m pcagpt.main --config=configs/sample.py \
        --config.model_path=checkpoints/gpt_baseline --config.sample.prompt="The people"

Without a prompt a document begins. --config.sample.count=5 draws several,
--config.seed=2 others; temperature 0 takes the likeliest token always.
"""

from pcagpt.config import base


def get_config():
    """The base config as sampling; the model is to be named."""
    config = base()
    config.task = "sample"
    return config
