r"""Writes a trained or compressed model for other programs.

    python -m pcagpt.main --config=configs/export.py \
        --config.model_path=checkpoints/gpt_pca_finetune_k128 --config.format=hf

Writes WORKDIR/exported/RUN_FORMAT/. hf: a folder that transformers loads as it is, with
the tokenizer and a model card; the table is multiplied out, so this form saves no
memory. hf-factored: one that transformers loads with trust_remote_code=True at its
small size. coded: one with the table as its coded file. npz: only the table or its
factors, as the files that init.import_* read. The model may be a run, or the compressed
table of another architecture, such as checkpoints/compressed/best_coded_k128.
"""

from pcagpt.config import base


def get_config():
    """Task export; the command line names the model."""
    config = base()
    config.task = "export"
    return config
