#!/usr/bin/env bash
# Makes .venv in the project root and installs what is asked for; a second call with nothing changed is instant.
#
#   bash scripts/setup.sh            # requirements.txt
#   bash scripts/setup.sh dev        # requirements-dev.txt: also ruff and pytest
#
# PYTHON chooses the interpreter (default python3; 3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=requirements.txt
[ "${1:-}" = dev ] && requirements=requirements-dev.txt

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; '$python' is $("$python" --version 2>&1 || true). Set PYTHON to another one." >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What is installed is known by the files that ask for it.
wanted=$(cat requirements.txt pyproject.toml $([ "$requirements" = requirements-dev.txt ] && echo requirements-dev.txt) | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=.venv/installed-$requirements
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "installing $requirements into .venv (several minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . --config-settings editable_mode=compat
    echo "$wanted" >"$stamp"
fi
