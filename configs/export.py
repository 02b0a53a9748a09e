r"""Writes a trained or compressed model for other programs.

    python -m pcagpt.main --config=configs/export.py \
        --config.model_path=checkpoints/gpt_pca_finetune_k128 --config.format=hf

Writes WORKDIR/exported/RUN_hf/, a folder that transformers loads as a GPT-2, with the
tokenizer and a model card. transformers has no factorized table, so the table is
multiplied out, and this form saves no memory. --config.format=npz writes the table or
its factors instead, as the files that init.import_* read.
"""

from pcagpt.config import base


def get_config():
    """Task export; the command line names the model."""
    config = base()
    config.task = "export"
    return config
