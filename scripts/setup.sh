#!/usr/bin/env bash
# Makes .venv and installs pcagpt, the pinned versions of all it needs, and its tests'
# tools. Costs nothing when that is done already; demo.sh and test.sh begin with it.
#
#   bash scripts/setup.sh
#   PYTHON=/path/to/python3.12 bash scripts/setup.sh
#
# PYTHON makes .venv (3.11 or newer; otherwise the newest on PATH does). A .venv that is
# there already is installed into, never removed.

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"

requirement='.[dev]'
python=.venv/bin/python
stamp=.venv/pcagpt-installed
log=.venv/pcagpt-install.log

# runs PYTHON: whether it is 3.11 or newer, by running it (a shim may exist and fail).
runs() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# make_environment: .venv from the first Python that can make one.
make_environment() {
  local candidate without_venv=''
  local candidates=(python3.13 python3.12 python3.11 python3 python)
  [[ -z ${PYTHON-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    runs "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      "$candidate" -m venv .venv
      return
    fi
    without_venv=${without_venv:-$candidate}
  done
  [[ -z $without_venv ]] ||
    refuse "$without_venv cannot make virtual environments: install its venv package" \
      "(on Debian and Ubuntu python3-venv, or python3.12-venv and the like)"
  [[ -z ${PYTHON-} ]] ||
    refuse "PYTHON is '$PYTHON', which does not run as Python 3.11 or newer"
  refuse "found no Python 3.11 or newer: install one, or name it, as in:" \
    "PYTHON=/path/to/python3.12 bash scripts/$script"
}

# fingerprint: of all that an installation depends on, this folder's place included.
fingerprint() {
  "$python" -I - "$requirement" <<'EOF'
import hashlib, os, sys
parts = [sys.version, os.getcwd(), sys.argv[1]]
parts += [open(name).read() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
EOF
}

if [[ -f $stamp ]] && runs "$python" && [[ $(<"$stamp") == "$(fingerprint)" ]]; then
  exit 0
fi

if [[ ! -e $python && ! -L $python ]]; then
  make_environment
fi
runs "$python" ||
  refuse ".venv holds no Python 3.11 or newer that runs: remove it (rm -r .venv)" \
    "and start again"
if ! "$python" -m pip --version >/dev/null 2>&1; then
  "$python" -m ensurepip >/dev/null 2>&1 ||
    refuse ".venv has no pip and cannot get one: remove it (rm -r .venv)" \
      "and start again"
fi

echo "installing pcagpt and the pinned versions into .venv (about a minute) ..."
rm -f "$stamp"
if ! "$python" -m pip install --no-input --progress-bar off \
  --disable-pip-version-check --constraint constraints.txt \
  --editable "$requirement" >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "$script: the installation failed, pip says why above and in $log" >&2
  exit 1
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
