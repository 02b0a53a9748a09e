r"""Continues a text with a trained or compressed model and prints it.

    python -m pcagpt.main --config=configs/sample.py \
        --config.model_path=checkpoints/gpt_baseline --config.sample.prompt="The people"

Without a prompt, the model begins a document. --config.sample.count=5 draws five
samples; --config.seed=2 draws other ones. --config.sample.temperature=0 always takes
the likeliest token.
"""

from pcagpt.config import base


def get_config():
    """Task sample; the command line names the model."""
    config = base()
    config.task = "sample"
    return config
