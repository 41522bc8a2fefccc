#!/usr/bin/env bash
# Sets up and runs everything that guards the project: format, lint, tests.
#
#   bash scripts/test.sh             # all of it
#   bash scripts/test.sh --fast      # without the tests marked slow
#   bash scripts/test.sh -k layout   # anything else goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
source .venv/bin/activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done

ruff format --check .
ruff check .
python -m pytest ${arguments[@]+"${arguments[@]}"}
