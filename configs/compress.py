r"""Compresses a trained model's token table without training, in every way there is.

    python -m pcagpt.main --config=configs/compress.py \
        --config.model_path=checkpoints/gpt_baseline

Measures methods x ranks x frequency bands on the validation split and writes
checkpoints/compressed/: sweep.json, report.html, and the best model of each rank as a
run that can be evaluated and fine-tuned; --config.compress.recover_ranks=128 trains
that of a rank on, beside D. One table only, as small as a loss allows:
--config.compress.max_added_loss=0.05 (or .max_params=, .max_bytes=).
Cost: about 2 seconds a table on a GPU for GPT-2 small, after a minute of calibration.
"""

from pcagpt.config import base


def get_config():
    """The base config as a sweep, on the corpus the run was trained on."""
    config = base()
    config.task = "compress"
    config.data.source = ""
    config.ranks = (32, 64, 128, 256)
    return config
