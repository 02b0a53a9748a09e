#!/usr/bin/env bash
# The whole experiment on a small model and the corpus in the package: trains the
# baseline, compresses its embedding, trains and fine-tunes the compressed models, and
# writes the report. Minutes on two CPU cores; sets up .venv first if need be.
#
#   bash scripts/demo.sh
#   bash scripts/demo.sh --config.seed=2 --config.overwrite=True
#
# Arguments go to: python -m pcagpt.main --config=configs/demo.py

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
bash scripts/setup.sh
exec .venv/bin/python -m pcagpt.main --config=configs/demo.py "$@"
