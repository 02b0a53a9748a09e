#!/usr/bin/env bash
# B: fine-tunes the baseline after its embedding is replaced by the factorized one.
#
#   bash scripts/train_pca_finetune.sh [RANK [ARGUMENT...]]
#   bash scripts/train_pca_finetune.sh 128 --config.finetune.steps_share=0.2
#
# RANK is 128 unless given; what the run needs and lacks is made first. Arguments go to:
# python -m pcagpt.main --config=configs/pca_finetune_k128.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
rank=${1-128}
require_rank "$rank"
run_pcagpt --config=configs/pca_finetune_k128.py \
  --config.model.n_embd_wte="$rank" "${@:2}"
