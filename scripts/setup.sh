#!/usr/bin/env bash
# Makes .venv and installs pcagpt, the pinned versions of its dependencies, and the
# tools for its tests. Does nothing if all of it is installed. demo.sh and test.sh run
# it first.
#
#   bash scripts/setup.sh
#   PYTHON=/path/to/python3.12 bash scripts/setup.sh
#
# PYTHON is the Python (3.11 or newer) that makes .venv; the default is the newest one on
# PATH. An existing .venv is reused and never removed.

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"

requirement='.[dev]'
python=.venv/bin/python
stamp=.venv/pcagpt-installed
log=.venv/pcagpt-install.log

# runs PYTHON: succeeds if it runs and is 3.11 or newer. A shim may exist but not run.
runs() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# make_environment: makes .venv with the first Python that can make one.
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
      "(on Debian and Ubuntu: python3-venv, or for example python3.12-venv)"
  [[ -z ${PYTHON-} ]] ||
    refuse "PYTHON is '$PYTHON', which does not run as Python 3.11 or newer"
  refuse "found no Python 3.11 or newer: install one, or name it, for example:" \
    "PYTHON=/path/to/python3.12 bash scripts/$script"
}

# fingerprint: a hash of all that the installation depends on, and of this folder's path.
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
  refuse ".venv has no working Python 3.11 or newer: remove it (rm -r .venv)" \
    "and start again"
if ! "$python" -m pip --version >/dev/null 2>&1; then
  "$python" -m ensurepip >/dev/null 2>&1 ||
    refuse ".venv has no pip and pip cannot be installed: remove it (rm -r .venv)" \
      "and start again"
fi

echo "installing pcagpt and the pinned versions into .venv (about a minute) ..."
rm -f "$stamp"
if ! "$python" -m pip install --no-input --progress-bar off \
  --disable-pip-version-check --constraint constraints.txt \
  --editable "$requirement" >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "$script: the installation failed; the end of $log is shown above" >&2
  exit 1
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
