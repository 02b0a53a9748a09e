#!/usr/bin/env bash
# Trains D, then A, B and C at each rank, and writes the report that compares them.
#
#   bash scripts/run_all_experiments.sh [RANKS [ARGUMENT...]]
#   bash scripts/run_all_experiments.sh 64,128,256 --config.data.source=FOLDER
#
# RANKS is 128 by default. The baseline is trained once for all ranks. Arguments are
# passed to: python -m pcagpt.main --config=configs/experiment.py:RANKS

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
ranks=${1-128}
require_ranks "$ranks"
run_pcagpt --config=configs/experiment.py:"$ranks" "${@:2}"
