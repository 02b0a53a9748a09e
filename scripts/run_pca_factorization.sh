#!/usr/bin/env bash
# Factorizes the embedding of a trained model and writes the table and scale matrices
# of each rank to checkpoints/pca_factorized/.
#
#   bash scripts/run_pca_factorization.sh [RANKS [ARGUMENT...]]
#   MODEL_PATH=checkpoints/demo/gpt_baseline bash scripts/run_pca_factorization.sh 8,16
#
# RANKS is 64,128,256 by default. MODEL_PATH is a run or a .npy table; its default is
# checkpoints/gpt_baseline. Arguments are passed to:
# python -m pcagpt.main --config=configs/factorize.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
ranks=${1-64,128,256}
require_ranks "$ranks"
run_pcagpt --config=configs/factorize.py \
  --config.model_path="${MODEL_PATH:-checkpoints/gpt_baseline}" \
  --config.ranks="$ranks" "${@:2}"
