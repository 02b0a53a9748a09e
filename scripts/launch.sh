# shellcheck shell=bash
# Sourced by the scripts beside it: goes to the repository root, prints the script's
# header when asked for help, and defines how ranks are checked and pcagpt is run.

set -euo pipefail
script=${0##*/}
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "scripts/$script"
  exit 0
fi

# refuse WORD...: one clear line about what the person can mend, and exit code 2.
refuse() {
  printf '%s: %s\n' "$script" "$*" >&2
  exit 2
}

# require_rank VALUE: a positive whole number.
require_rank() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] ||
    refuse "the first argument is '$1', not a rank: give a positive whole number," \
      "as in: bash scripts/$script 128"
}

# require_ranks VALUE: positive whole numbers with commas between.
require_ranks() {
  [[ $1 =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] ||
    refuse "the first argument is '$1', not a list of ranks: give positive whole" \
      "numbers with commas between, as in: bash scripts/$script 64,128"
}

# run_pcagpt ARGUMENT...: with the active virtual environment, else .venv, else python3.
run_pcagpt() {
  local python=python3
  if [[ -n ${VIRTUAL_ENV-} && -x $VIRTUAL_ENV/bin/python ]]; then
    python=$VIRTUAL_ENV/bin/python
  elif [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
  elif ! python3 -c 'import jax, ml_collections' 2>/dev/null; then
    refuse "pcagpt is not installed for python3: run bash scripts/setup.sh once"
  fi
  exec "$python" -m pcagpt.main "$@"
}
