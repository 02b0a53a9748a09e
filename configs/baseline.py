"""D, the baseline: GPT-2 small with its full 768-wide token embedding.

    python -m pcagpt.main --config=configs/baseline.py --config.data.source=FOLDER

Cost: 124,439,808 parameters at GPT-2's vocabulary; meant for a GPU.
"""

from pcagpt.config import base


def get_config():
    """The base config: its defaults are this run."""
    return base()
