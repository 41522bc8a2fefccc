#!/usr/bin/env bash
# Starts the HTTP server over vLLM, in .venv-serve, which it makes first (a few minutes, 3.5 GB; a GPU's build is larger).
#
#   bash scripts/serve.sh --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --port 8000
#   bash scripts/serve.sh --help
#
# All flags go to autoregressive/serve/server.py. SERVE_DEVICE=gpu or cpu chooses vLLM's build, PYTHON the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for argument in "$@"; do
    case "$argument" in -h | --help) PYTHONPATH=$root exec "${PYTHON:-python3}" -m autoregressive.serve.server --help ;; esac
done
bash "$root/scripts/setup.sh" serve
exec "$root/.venv-serve/bin/python" -m autoregressive.serve.server "$@"
