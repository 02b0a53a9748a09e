#!/usr/bin/env bash
# Runs the whole experiment on a small model and the corpus in the package: trains the
# baseline, compresses its embedding, trains and fine-tunes the compressed models, and
# writes the report. Takes a few minutes on two CPU cores. Sets up .venv if needed.
#
#   bash scripts/demo.sh
#   bash scripts/demo.sh --config.seed=2 --config.overwrite=True
#
# Arguments are passed to: python -m pcagpt.main --config=configs/demo.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
bash scripts/setup.sh
exec .venv/bin/python -m pcagpt.main --config=configs/demo.py "$@"
