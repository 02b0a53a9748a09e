"""D, the baseline: GPT-2 small with its full 768-wide token embedding.

    python -m pcagpt.main --config=configs/baseline.py --config.data.source=FOLDER

It has 124,439,808 parameters with GPT-2's vocabulary and needs a GPU.
"""

from pcagpt.config import base


def get_config():
    """The base config: its defaults describe this run."""
    return base()
