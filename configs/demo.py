"""The whole experiment on the speeches in the package, for the CPU of a laptop.

    python -m pcagpt.main --config=configs/demo.py

The model has 4 layers of width 128 and 4,096 tokens; the rank is 32. The experiment
takes about 5 minutes on 2 CPU cores and writes checkpoints/demo/report.html.
"""

from pcagpt.config import base


def get_config():
    """The experiment at rank 32 on a model of 1.3 million parameters."""
    config = base()
    config.task = "experiment"
    config.workdir = "checkpoints/demo"
    config.ranks = (32,)
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.n_embd = 128
    config.model.block_size = 128
    config.train.steps = 300
    config.train.batch_size = 16
    config.train.learning_rate = 3e-3
    config.train.warmup_steps = 30
    config.train.loss_chunks = 1
    config.finetune.steps_share = 0.25
    config.evaluate.every = 75
    config.checkpoint.every = 75
    config.telemetry.every = 5
    return config
