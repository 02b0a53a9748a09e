"""Trains D, A, C and B at GPT-2 small size and one or several ranks; reports on them.

    python -m pcagpt.main --config=configs/experiment.py:128 --config.data.source=FOLDER
    python -m pcagpt.main --config=configs/experiment.py:64,128,256 ...

D is always trained, once for all ranks. train.* is D's budget; finetune.* is the share
of it that B, Bd and D+ get. --config.experiment.arms names the other arms to train:
pca,random,pca_finetune,continued also trains D+. --config.experiment.seeds gives error
bars. For bands: --config.factorize.bands=12 --config.factorize.method=context.
"""

from pcagpt.config import base, ranks_of


def get_config(ranks="128"):
    """Task experiment at the given ranks, as in '64,128'."""
    config = base()
    config.task = "experiment"
    config.ranks = ranks_of(ranks)
    return config
