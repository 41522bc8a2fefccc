#!/usr/bin/env bash
# Sets up and runs everything that guards the project: format, lint, tests.
#
#   bash scripts/test.sh             # all of it, by two processes
#   bash scripts/test.sh --fast      # without the tests marked slow
#   bash scripts/test.sh -k layout   # anything else goes to pytest, in one process
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
source .venv/bin/activate

# A file stays with one process: its tests share what they have made.
arguments=(-n "${TEST_PROCESSES:-2}" --dist loadfile)
threads=1
case "$*" in
    "") ;;
    --fast) arguments+=(-m "not slow") ;;
    *)
        arguments=() threads=2
        for argument in "$@"; do
            if [ "$argument" = --fast ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
        done
        ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

ruff format --check .
ruff check .
python -m pytest ${arguments[@]+"${arguments[@]}"}
