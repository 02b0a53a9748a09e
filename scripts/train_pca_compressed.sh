#!/usr/bin/env bash
# Trains A: its embedding is the baseline's, factorized; all other weights start random.
#
#   bash scripts/train_pca_compressed.sh [RANK [ARGUMENT...]]
#   bash scripts/train_pca_compressed.sh 128 --config.train.steps=2000
#
# RANK is 128 by default. Missing prerequisites are made first. Arguments are passed to:
# python -m pcagpt.main --config=configs/pca_k128.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
rank=${1-128}
require_rank "$rank"
run_pcagpt --config=configs/pca_k128.py --config.model.n_embd_wte="$rank" "${@:2}"
