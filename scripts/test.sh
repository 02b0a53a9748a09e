#!/usr/bin/env bash
# Lint, formatting and the whole test suite; sets up .venv first if need be.
#
#   bash scripts/test.sh
#   bash scripts/test.sh -k checkpoint
#
# Arguments go to pytest.

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
echo "$script: lint, formatting and tests passed"
