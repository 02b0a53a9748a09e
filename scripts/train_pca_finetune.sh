#!/usr/bin/env bash
# Trains B: replaces the baseline's embedding by its factorization and fine-tunes.
#
#   bash scripts/train_pca_finetune.sh [RANK [ARGUMENT...]]
#   bash scripts/train_pca_finetune.sh 128 --config.finetune.steps_share=0.2
#
# RANK is 128 by default. Missing prerequisites are made first. Arguments are passed to:
# python -m pcagpt.main --config=configs/pca_finetune_k128.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
rank=${1-128}
require_rank "$rank"
run_pcagpt --config=configs/pca_finetune_k128.py \
  --config.model.n_embd_wte="$rank" "${@:2}"
