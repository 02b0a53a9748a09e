# shellcheck shell=bash
# The scripts in this folder source this file. It changes to the repository root, prints
# the header of the script for --help, and defines the functions below.

set -euo pipefail
script=${0##*/}
cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "scripts/$script"
  exit 0
fi

# refuse WORD...: prints one line about what to correct; exits with 2.
refuse() {
  printf '%s: %s\n' "$script" "$*" >&2
  exit 2
}

# require_rank VALUE: refuses anything but a positive whole number.
require_rank() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] ||
    refuse "the first argument is '$1', not a rank: give a positive whole number," \
      "for example: bash scripts/$script 128"
}

# require_ranks VALUE [MORE]: refuses anything but positive whole numbers and commas.
# MORE: the other arguments of an example.
require_ranks() {
  [[ $1 =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] ||
    refuse "the first argument is '$1', not a list of ranks: give positive whole" \
      "numbers separated by commas, for example: bash scripts/$script 64,128${2:+ $2}"
}

# find_python: sets `python` to that of the active virtual environment, of .venv if none
# is active, or to python3 if there is no .venv.
find_python() {
  python=python3
  if [[ -n ${VIRTUAL_ENV-} && -x $VIRTUAL_ENV/bin/python ]]; then
    python=$VIRTUAL_ENV/bin/python
  elif [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
  elif ! python3 -c 'import jax, ml_collections' 2>/dev/null; then
    refuse "pcagpt is not installed for python3: run bash scripts/setup.sh once"
  fi
}

# run_pcagpt ARGUMENT...: becomes pcagpt.
run_pcagpt() {
  find_python
  exec "$python" -m pcagpt.main "$@"
}
