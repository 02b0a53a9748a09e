#!/usr/bin/env bash
# Checks lint and formatting and runs the tests. Sets up .venv if needed.
#
#   bash scripts/test.sh                  all tests
#   bash scripts/test.sh -m "not slow"    the fast tests only
#   bash scripts/test.sh -k checkpoint    the tests with this word in their name
#
# Arguments are passed to pytest.

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
echo "$script: lint, formatting and tests passed"
