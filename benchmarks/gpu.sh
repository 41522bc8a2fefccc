#!/usr/bin/env bash
# Measures this project on one NVIDIA GPU within nine minutes, installing nothing (packages: benchmarks/README.md).
#
#   bash benchmarks/gpu.sh OUT                        # OUT/report.md, and a .json of each part, written as they come
#   bash benchmarks/gpu.sh OUT --device cpu --small   # the same script on small models, to try the script itself
#   bash benchmarks/gpu.sh OUT --parts sampling_b vq  # some parts only
#
# PYTHON chooses the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# The driver ends each part at its limit; this limit is for the driver itself.
exec timeout --kill-after=5 "${GPU_SECONDS:-535}" "${PYTHON:-python3}" -m benchmarks.gpu "$@"
