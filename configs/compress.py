r"""Compresses the token table of a trained model without training it.

    python -m pcagpt.main --config=configs/compress.py \
        --config.model_path=checkpoints/gpt_baseline

Measures methods x ranks x frequency bands on the validation split and writes
checkpoints/compressed/: sweep.json, report.html, and the best model of each rank. This
model can be evaluated and fine-tuned like a run. --config.compress.recover_ranks=128
also trains the best model of that rank, and D for the same steps. To find the one table
that fits a bound: --config.compress.max_added_loss=0.05 (or .max_params=, .max_bytes=).
--config.split=test measures on the test split instead; it writes
checkpoints/compressed_test/, without models.

Cost: on a GPU, a minute of calibration, about 2 seconds per table of GPT-2 small, and
up to half a minute of the host for each of coded, packed, gptq and pq
(--config.compress.methods without them leaves them out).
On a CPU, two to three minutes for the demo's D: by default it tries fewer tables and
measures them on fewer tokens. As much as on a GPU:
    --config.compress.methods=all --config.compress.bands=1,7,12
    --config.compress.calibration_tokens=1048576
"""

from pcagpt.config import base


def get_config():
    """Task compress: sweeps on the corpus that the run was trained on."""
    config = base()
    config.task = "compress"
    config.data.source = ""
    config.ranks = (32, 64, 128, 256)
    return config
