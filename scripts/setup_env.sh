#!/usr/bin/env bash
# Makes or updates .venv with this package, the extras named in the first argument, and the tested versions.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-dev}

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
    python=$(scripts/find_python.sh)
    rm -rf .venv
    "$python" -m venv .venv
fi
log=.venv/install.log
echo "environment: installing sdar-jax[$extras] into .venv ($(.venv/bin/python --version)), log in $log"
if ! .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "environment: the installation failed; the last lines of $log are above" >&2
    exit 1
fi
echo "environment: ready in ${SECONDS} s"
