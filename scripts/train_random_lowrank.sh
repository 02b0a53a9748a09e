#!/usr/bin/env bash
# Trains C: the low-rank embedding and all other weights start random.
#
#   bash scripts/train_random_lowrank.sh [RANK [ARGUMENT...]]
#   bash scripts/train_random_lowrank.sh 128 --config.train.steps=2000
#
# RANK is 128 by default. Arguments are passed to:
# python -m pcagpt.main --config=configs/random_k128.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
rank=${1-128}
require_rank "$rank"
run_pcagpt --config=configs/random_k128.py --config.model.n_embd_wte="$rank" "${@:2}"
