"""Trains D, A, C and B at GPT-2 small size and one or several ranks; reports on them.

    python -m pcagpt.main --config=configs/experiment.py:128 --config.data.source=FOLDER
    python -m pcagpt.main --config=configs/experiment.py:64,128,256 ...

D is trained once. train.* applies to every arm; finetune.* is B's share of it.
--config.experiment.arms=pca,random,pca_finetune,continued names all arms besides D;
--config.experiment.seeds gives error bars. For frequency bands:
--config.factorize.bands=12 --config.factorize.method=context.
"""

from pcagpt.config import base, ranks_of


def get_config(ranks="128"):
    """Task experiment at the given ranks, as in '64,128'."""
    config = base()
    config.task = "experiment"
    config.ranks = ranks_of(ranks)
    return config
