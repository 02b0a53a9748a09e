#!/usr/bin/env bash
# C: trains a model from scratch whose low-rank embedding starts at random.
#
#   bash scripts/train_random_lowrank.sh [RANK [ARGUMENT...]]
#   bash scripts/train_random_lowrank.sh 128 --config.train.steps=2000
#
# RANK is 128 unless given; what the run needs and lacks is made first. Arguments go to:
# python -m pcagpt.main --config=configs/random_k128.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
rank=${1-128}
require_rank "$rank"
run_pcagpt --config=configs/random_k128.py --config.model.n_embd_wte="$rank" "${@:2}"
