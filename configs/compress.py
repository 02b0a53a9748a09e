r"""Compresses the token table of a trained model without training it.

    python -m pcagpt.main --config=configs/compress.py \
        --config.model_path=checkpoints/gpt_baseline

Measures methods x ranks x frequency bands on the validation split and writes
checkpoints/compressed/: sweep.json, report.html, and the best models of each rank: with
factors, coded, and packed. They can be evaluated like a run, and, but for packed ones,
trained further. Tables of another architecture can only be exported, those of a GGUF
file cannot.
--config.compress.recover_ranks=128 also trains the best factors and the coded table of
that rank, and D for the same steps.
--config.compress.max_added_loss=0.05 (or .max_params=, .max_bytes=) finds the one table
that fits a bound. --config.split=test measures on the test split instead; it writes
checkpoints/compressed_test/, without models.

--config.model_path=table.npy compresses a token table [V, d] without its model. There
is no loss then: checkpoints/compressed_table/ gets the relative error of each table,
the best ones as files, and a report; or, with .max_bytes=, the best table of at most
that size. Without table.statistics.npz beside it, only methods that need no statistics
are tried.

On a GPU, calibration takes a minute, and each table of GPT-2 small about 2 seconds.
Each table of coded, packed, gptq and pq takes up to half a minute on the host;
--config.compress.methods can leave these out. On a CPU, the demo's D takes two to three
minutes: by default, fewer tables are tried, on fewer tokens. For a table of 10,000,000
numbers or more that is at least 256 wide, the command tries six tables: codes and GPTQ,
and no factors (best_k*). With 20,480 calibration tokens, SmolLM2-135M takes 16 minutes
on two cores. To try as much as on a GPU, add:
    --config.compress.methods=all --config.compress.bands=1,7,12
    --config.compress.calibration_tokens=1048576
"""

from pcagpt.config import base


def get_config():
    """Task compress: sweeps on the corpus that the run was trained on."""
    config = base()
    config.task = "compress"
    config.data.source = ""
    config.ranks = ()
    return config
