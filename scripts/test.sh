#!/usr/bin/env bash
# Sets up and runs everything that guards the project: format, lint, types, tests, and those of serving with vLLM.
#
#   bash scripts/test.sh               # all of it, by two processes
#   bash scripts/test.sh --no-serve    # without vLLM and its environment (.venv-serve, several GB)
#   bash scripts/test.sh --serve       # the tests of vLLM in that environment alone
#   bash scripts/test.sh --fast        # without the tests marked slow, which those of vLLM are
#   bash scripts/test.sh -k layout     # anything else goes to pytest, in one process
set -euo pipefail
cd "$(dirname "$0")/.."

main=1 serve=1 threads=1
# A file stays with one process: its tests share what they have made.
parallel=(-n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
arguments=("${parallel[@]}")
case "$*" in
    "") ;;
    --no-serve) serve=0 ;;
    --serve) main=0 ;;
    --fast) serve=0 && arguments+=(-m "not slow") ;;
    *)
        serve=0 threads=2 arguments=()
        for argument in "$@"; do
            case "$argument" in
                --fast) arguments+=(-m "not slow") ;;
                --no-serve) ;;
                *) arguments+=("$argument") ;;
            esac
        done
        ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} OMP_WAIT_POLICY=passive  # the threads of one test leave the core to another

if [ "$main" = 1 ]; then
    bash scripts/setup.sh dev
    .venv/bin/ruff format --check .
    .venv/bin/ruff check .
    .venv/bin/pyrefly check --output-format min-text
    (source .venv/bin/activate && python -m pytest ${arguments[@]+"${arguments[@]}"})
fi
if [ "$serve" = 1 ]; then
    bash scripts/setup.sh serve-dev
    # A process of vLLM takes as many threads as it is told to, wherever the others run.
    (source .venv-serve/bin/activate && VLLM_CPU_OMP_THREADS_BIND=nobind python -m pytest tests/serve -k vllm "${parallel[@]}")
fi
