#!/usr/bin/env bash
# Trains D, the baseline: GPT-2 small with its full token embedding.
#
#   bash scripts/train_baseline_gpt2.sh [ARGUMENT...]
#   bash scripts/train_baseline_gpt2.sh --config.data.source=FOLDER
#
# Arguments are passed to: python -m pcagpt.main --config=configs/baseline.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
run_pcagpt --config=configs/baseline.py "$@"
