"""D, A, C and B at GPT-2-small size, at one or several ranks, and the report.

    python -m pcagpt.main --config=configs/experiment.py:128 --config.data.source=FOLDER
    python -m pcagpt.main --config=configs/experiment.py:64,128,256 ...

D is trained once. train.* holds for every arm; B gets the share of it that `finetune`
declares. Controls: --config.experiment.arms. Error bars: --config.experiment.seeds.
Frequency bands: --config.factorize.bands=12 --config.factorize.method=context.
"""

from pcagpt.config import base, ranks_of


def get_config(ranks="128"):
    """The base config as an experiment over the given ranks."""
    config = base()
    config.task = "experiment"
    config.ranks = ranks_of(ranks)
    return config
