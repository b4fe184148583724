#!/usr/bin/env bash
# Prints the path of a Python >= 3.12 that can make virtual environments; one line on stderr and exit 1 if there is none.
# PYTHON=/path/to/python overrides the search.
set -uo pipefail

# Running a candidate is the only proof: a pyenv shim exists for every version, and fails for those not selected.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
    printf '%s\n' python3.12 python3.13 python3.14 python3 python
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python 2>/dev/null
    uv python find --no-project '>=3.12' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && command -v "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is not a Python >= 3.12 with the venv module: set PYTHON to one that is, or unset it." >&2
    exit 1
fi
while IFS= read -r candidate; do
    usable "$candidate" && command -v "$candidate" && exit 0
done < <(candidates)
echo "No Python >= 3.12 with the venv module was found: install python3.12 (and python3.12-venv on Debian or Ubuntu; or" \
    "'pyenv install 3.12', 'uv python install 3.12', 'brew install python@3.12'), or set PYTHON=/path/to/python." >&2
exit 1
