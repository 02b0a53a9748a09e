r"""The experiment at GPT-2 small's size, in an hour on one H100 or H200.

    python -m pcagpt.main --config=configs/gpt2_small_hour.py \
        --config.data.source=FOLDER
    python -m pcagpt.main --config=configs/gpt2_small_hour.py:proxy \
        --config.data.source=FOLDER

Trains D, A, C, B and D+ at rank 128, on GPT-2's tokens. D, A and C see 197 million
tokens each, B and D+ a tenth of them. The command can be interrupted and given again.
The weight decay was tried on 38 million tokens of text, which D sees five times. With
more text, lower train.weight_decay.

'proxy' is a model of 30 million parameters at the same share of rank and width, with
three seeds. It takes about a third of the time.
"""

from pcagpt.config import base

SIZES = {  # {name: (layers and heads, width, rank, steps, seeds)}
    "small": (12, 768, 128, 6000, ()),
    "proxy": (6, 384, 64, 3000, (1, 2, 3)),
}


def get_config(size="small"):
    """The experiment at one of `SIZES`."""
    if size not in SIZES:
        raise ValueError(f"give one of {', '.join(SIZES)} instead of {size}")
    layers, width, rank, steps, seeds = SIZES[size]
    config = base()
    config.task = "experiment"
    config.workdir = f"checkpoints/gpt2_{size}_hour"
    config.ranks = (rank,)
    config.experiment.arms = "pca,random,pca_finetune,continued"
    config.experiment.seeds = seeds
    config.model.n_layer = config.model.n_head = layers
    config.model.n_embd = width
    config.train.weight_decay = 1.0  # 0.1 lets D learn the text by heart
    config.train.steps = steps
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 300
    config.evaluate.every = 500
    config.checkpoint.every = 2000
    config.checkpoint.keep_last = 1
    config.telemetry.sample_tokens = 0
    return config
